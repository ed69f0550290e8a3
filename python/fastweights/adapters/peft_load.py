"""`load_peft`: adapters from PEFT's folders, read without trust."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastweights.adapters.activate import activate, refuse_merged
from fastweights.adapters.inject import adapt, check_name
from fastweights.adapters.lora import LoRA, layer_for
from fastweights.adapters.lora_linear import LoRALinear
from fastweights.adapters.peft_config import config_from_peft
from fastweights.adapters.peft_slots import check_tensors, slots, suffix_paths
from fastweights.adapters.peft_tensors import (
    adapter_folder,
    read_peft_config,
    read_peft_tensors,
)
from fastweights.adapters.rules import pattern_value, saved_paths, selected_paths
from fastweights.adapters.to_lora import doubled

__all__ = ["load_peft"]

Model = TypeVar("Model", bound=nn.Module)


def load_peft(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    subfolder: str | None = None,
    initial: str | os.PathLike[str] | None = None,
    trainable: bool = False,
) -> Model:
    """Puts an adapter of LoRA that PEFT or `save_peft` wrote on a model, in place.

    It is the active one then. The folder is not trusted: nothing is executed, every setting and
    every tensor is checked before the model is touched, and what the file has and the model has
    not, or the other way round, is an error.

    Args:
        model: bare, or with other adapters.
        folder: with adapter_config.json and adapter_model.safetensors (or .bin, of which only plain
            tensors are read). If it has a folder of the adapter's name with these, that is taken:
            there PEFT puts adapters that are not called "default".
        name: of the adapter in the model.
        subfolder: of `folder`.
        initial: the folder of the same adapter before it was trained. What PiSSA, CorDA, OLoRA or
            LoRA-GA took out of the base is known then, and the adapter becomes plain LoRA of twice
            the rank for the original base. Without it, PiSSA and OLoRA take the same out of the
            base again, as in PEFT.
        trainable: whether the adapter's parameters require gradients.

    Returns:
        The model.

    Raises:
        ValueError: a folder that is damaged, of another method or of a variant that is not
            supported, or that does not fit the model.

    Example:
        >>> import tempfile, torch, fastweights as fw
        >>> from fastweights.adapters import LoRA, load_peft, save_peft
        >>> folder = tempfile.mkdtemp()
        >>> save_peft(fw.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoRA(rank=2)), folder)
        >>> model = load_peft(torch.nn.Sequential(torch.nn.Linear(8, 8)), folder)
        >>> model[0].lora_A["default"].shape
        torch.Size([2, 8])
    """
    check_name(model, name)
    refuse_merged("load_peft", model)
    place = adapter_folder(folder, subfolder, name)
    values, source = read_peft_config(place)
    config = config_from_peft(values, source, plain=initial is not None)
    tensors, file = read_peft_tensors(place)
    if initial is not None:
        start = adapter_folder(initial, None, name)
        config, tensors = _with_initial(config, tensors, file, start)
    try:
        config = _as_saved(model, config)
        adapted = selected_paths(model, config)
        found = slots(model, config, name, adapted, saved_paths(model, config))
        if type(config) is not LoRA:
            _check_residual(model, config, adapted)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_peft: {source}: {error}") from error
    tensors = check_tensors(tensors, found, config, file)
    adapt(model, config, name=name)
    with torch.no_grad():
        for key, tensor in tensors.items():
            found[key].find().copy_(tensor)
    if not trainable:
        model.requires_grad_(False)
        activate(model, name, trainable=False)
    return model


def _as_saved(model: nn.Module, config: LoRA) -> LoRA:
    """With the modules that PEFT takes for `modules_to_save`, which it finds by the end of text."""
    meant = suffix_paths(model, config.modules_to_save)
    if not meant or meant == saved_paths(model, config):
        return config
    return replace(config, modules_to_save=tuple(meant))


def _check_residual(model: nn.Module, config: LoRA, adapted: Sequence[str]) -> None:
    """Raises where what an adapter starts from could not be taken out of the base."""
    for path in adapted:
        module = model.get_submodule(path)
        layer = module if isinstance(module, LoRALinear) else layer_for(module, path)
        if not isinstance(layer, LoRALinear):
            raise ValueError(f"expected {path} to be linear, got {type(module).__name__}")
        layer.float_base()
        rank = pattern_value(path, config.rank_pattern, config.rank)
        alpha = pattern_value(path, config.alpha_pattern, config.alpha)
        most = min(layer.in_features, layer.out_features)
        if rank > most or (alpha is not None and alpha <= 0):
            raise ValueError(
                f"expected a rank up to {most} and alpha > 0 at {path}, got {rank} and {alpha}"
            )


def _with_initial(
    config: LoRA, tensors: Mapping[str, Tensor], file: str, folder: Path
) -> tuple[LoRA, dict[str, Tensor]]:
    """Plain LoRA of what training changed: A' = [A; A₀], B' = [B, -B₀]."""
    values, source = read_peft_config(folder)
    first = config_from_peft(values, source, plain=True)
    for key in ("rank", "alpha", "rslora", "rank_pattern", "alpha_pattern"):
        if getattr(first, key) != getattr(config, key):
            raise ValueError(
                f"load_peft: {source}: expected the {key} of {file}, {getattr(config, key)!r:.80}, "
                f"got {getattr(first, key)!r:.80}"
            )
    if config.dora or first.dora:
        raise ValueError(f"load_peft: {source}: expected no DoRA with initial")
    starts, from_file = read_peft_tensors(folder)
    joined = dict(tensors)
    for key, tensor in tensors.items():
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            continue
        start = starts.get(key)
        if start is None or start.shape != tensor.shape or tensor.dim() != 2:
            came = None if start is None else list(start.shape)
            raise ValueError(
                f"load_peft: {from_file}: expected {key} of shape {list(tensor.shape)}, got {came}"
            )
        if not (start.is_floating_point() and tensor.is_floating_point()):
            raise ValueError(f"load_peft: {from_file}: expected {key} to be floating-point numbers")
        down = key.endswith(".lora_A.weight")
        joined[key] = torch.cat([tensor, start if down else -start], 0 if down else 1)
    return doubled(config), joined
