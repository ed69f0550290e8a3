"""`save_peft`: adapters as PEFT writes them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastweights.adapters.activate import check_names, refuse_merged
from fastweights.adapters.base import is_conv1d
from fastweights.adapters.corda import CorDA
from fastweights.adapters.lora import LoRA
from fastweights.adapters.lora_embedding import LoRAEmbedding
from fastweights.adapters.lora_layer import LoRALayer
from fastweights.adapters.lora_linear import LoRALinear
from fastweights.adapters.peft_config import config_to_peft, plain_number
from fastweights.adapters.peft_slots import slots, suffix_paths
from fastweights.adapters.peft_tensors import write_peft
from fastweights.adapters.protocol import adapter_configs
from fastweights.adapters.rules import is_selected, paths, pattern_value, saved_paths
from fastweights.adapters.to_lora import doubled

__all__ = ["save_peft"]


def save_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    residual: bool = False,
    embeddings: bool = False,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes an adapter of LoRA as PEFT does: adapter_config.json and adapter_model.safetensors.

    Scales are written as they are, those that `set_scale` changed with them. An adapter that took
    something out of the base (`PiSSA`, `CorDA`, `OLoRA`) becomes plain LoRA of twice the rank in
    the file, for the original base.

    Args:
        model: with the adapter.
        folder: made if it is not there. An adapter that is not called "default" is written to a
            folder of its name within.
        name: of the adapter.
        residual: write `PiSSA` and `OLoRA` as they are: who loads them takes the same out of the
            base again.
        embeddings: write the base's embeddings, too, as PEFT does where they are adapted or were
            resized. Who reads the file gets them in the base.
        base_model: the base's name or path, for the file; None: what transformers knows of it.
        task_type: such as "CAUSAL_LM", by which PEFT chooses its class.

    Raises:
        ValueError: the model does not have the adapter, it is merged, or no file can hold it.
        TypeError: it is not LoRA.
    """
    check_names("save_peft", model, [name])
    refuse_merged("save_peft", model)
    config = adapter_configs(model)[name]
    if not isinstance(config, LoRA):
        raise TypeError(f"save_peft: expected LoRA, got {type(config).__name__}")
    if any(c in name for c in "/\\:\0"):
        raise ValueError(f"save_peft: expected a name that a folder can have, got {name!r}")
    layers: dict[str, LoRALayer] = {}
    for path, module in paths(model):
        known = isinstance(module, LoRALayer) and name in module.configs
        if known and module not in layers.values():
            layers[path] = module  # type: ignore[assignment]
    found = slots(model, config, name, list(layers), saved_paths(model, config))
    extra = _embeddings([k for k, slot in found.items() if not slot.required]) if embeddings else ()
    tensors = {k: s.find().detach() for k, s in found.items() if s.required or k in extra}
    changed = [m for m in layers.values() if isinstance(m, LoRALinear) and name in m.initial_A]
    written = config
    if residual:
        _check_residual(config, name, changed)
    elif changed:
        written = _plain(config, name, layers, tensors)
    values = config_to_peft(
        written,
        target_modules=_targets(model, config, list(layers)),
        modules_to_save=_saved(model, config),
        fan_in_fan_out=any(is_conv1d(layer.base_layer) for layer in layers.values()),
        base_model_name_or_path=base_model or getattr(model, "name_or_path", None) or None,
        task_type=task_type,
        auto_mapping=None if task_type else _class_of(model),
        **_patterns(written, name, layers, tensors),
    )
    place = Path(folder) if name == "default" else Path(folder) / name
    write_peft(place, values, tensors)


def _embeddings(keys: list[str]) -> list[str]:
    """Of the embeddings those that are adapted, or else all."""
    return [key for key in keys if key.endswith(".base_layer.weight")] or keys


def _plain(
    config: LoRA, name: str, layers: Mapping[str, LoRALayer], tensors: dict[str, Tensor]
) -> LoRA:
    """What training changed, as plain LoRA: see `fastweights.adapters.to_lora`."""
    if config.dora:
        raise ValueError(f"save_peft: expected residual=True for {name!r}, which has DoRA")
    for path, layer in layers.items():
        assert isinstance(layer, LoRALinear)
        a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        start = layer.start_taken_back(name)
        tensors[a] = torch.cat([tensors[a], start[0]])
        tensors[b] = torch.cat([tensors[b], start[1]], 1)
    return doubled(config)


def _check_residual(config: LoRA, name: str, changed: Sequence[LoRALinear]) -> None:
    if not changed:
        raise ValueError(f"save_peft: expected an adapter that changed the base, got {name!r}")
    if isinstance(config, CorDA):
        raise ValueError(
            "save_peft: expected residual=False with CorDA, whose file cannot tell what it took "
            "out of the base"
        )


def _targets(model: nn.Module, config: LoRA, adapted: list[str]) -> str | list[str]:
    """The rule as it was given; names of modules for what depends on who reads it."""
    targets = config.targets
    if isinstance(targets, str) and targets.lower() != "all-linear":
        return targets
    if targets is not None and not isinstance(targets, str):
        return list(targets)
    names = sorted({path.rpartition(".")[2] for path in adapted})
    rule = replace(config, targets=names)
    same = {path for path, _ in paths(model) if is_selected(path, rule)} == set(adapted)
    return names if same else adapted


def _saved(model: nn.Module, config: LoRA) -> list[str] | None:
    """`modules_to_save`, in full where PEFT would take more modules for them than they are."""
    names, exact = list(config.modules_to_save), saved_paths(model, config)
    return (names if suffix_paths(model, names) == exact else exact) or None


def _patterns(
    config: LoRA, name: str, layers: Mapping[str, LoRALayer], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Patterns for the ranks and scales that there are.

    The file sorts them, which changes their meaning where several fit: then, and where scales were
    changed, every layer has its own.
    """
    ranks, alphas = {}, {}
    for path, layer in layers.items():
        end = "" if isinstance(layer, LoRAEmbedding) else ".weight"
        size = len(tensors[f"{path}.{layer.down}{end}"])
        ranks[path] = size
        alphas[path] = layer.scaling[name] * (math.sqrt(size) if config.rslora else size)
    rank = config.rank
    alpha = float(rank if config.alpha is None else config.alpha)
    return {
        "rank_pattern": _pattern(config.rank_pattern, rank, ranks),
        "alpha_pattern": {
            k: plain_number(v) for k, v in _pattern(config.alpha_pattern, alpha, alphas).items()
        },
    }


def _pattern(
    patterns: Mapping[str, Any], otherwise: Any, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    ordered = dict(sorted(patterns.items()))
    if all(
        math.isclose(pattern_value(path, ordered, otherwise), value, rel_tol=1e-9)
        for path, value in wanted.items()
    ):
        return ordered
    return {f"^{re.escape(path)}": value for path, value in wanted.items() if value != otherwise}


def _class_of(model: nn.Module) -> dict[str, str]:
    kind = type(model)
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}
