"""`adapt`: adapters on the modules of a model, by rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from fastweights.adapters.activate import activate, refuse_merged
from fastweights.adapters.protocol import (
    Adapter,
    AdapterLayer,
    adapter_configs,
    adapter_layers,
    adapter_names,
)
from fastweights.adapters.rules import paths, saved_paths, selected_paths
from fastweights.adapters.saved import SavedModule
from fastweights.quantization.samples import read_samples
from fastweights.quantization.walk import set_module

__all__ = ["adapt", "remove"]

Model = TypeVar("Model", bound=nn.Module)


def adapt(
    model: Model,
    adapter: Adapter,
    *,
    name: str = "default",
    calibration: Any = None,
    tokenizer: Any = None,
) -> Model:
    """Puts an adapter on a model, in place; what it trains is all that requires gradients then.

    Adapters of other names stay, and become inactive (`fastweights.adapters.activate`).

    Args:
        model: any module.
        adapter: the method and its rules, such as `fastweights.adapters.LoRA`.
        name: of the adapter; without a dot.
        calibration: what methods that look at inputs, such as `fastweights.adapters.CorDA`, run
            through the model: rows of a tensor, batches, or texts (see `fastweights.quantize_`).
        tokenizer: of Hugging Face, for texts.

    Returns:
        The model.

    Raises:
        ValueError: the name is taken or cannot be one, or no module is selected.
        TypeError: a selected module is of a kind that the method does not adapt.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.adapters import LoRA
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Linear(32, 8))
        >>> fw.adapt(model, LoRA(rank=2, targets=["1"]))[1].lora_A["default"].shape
        torch.Size([2, 32])
    """
    check_name(model, name)
    refuse_merged("adapt", model)
    _check_biases(model, adapter)
    chosen, saved = selected_paths(model, adapter), saved_paths(model, adapter)
    samples = [] if calibration is None else read_samples(calibration, tokenizer, "adapt")
    made: dict[nn.Module, AdapterLayer] = {}

    def put(path: str, build: Callable[[nn.Module], AdapterLayer]) -> None:
        module = model.get_submodule(path)
        if module not in made:
            made[module] = build(module)
        if made[module] is not module:
            set_module(model, path, made[module])

    try:
        for path, known in adapter.survey(model, chosen, samples):
            put(path, lambda m, path=path, known=known: adapter.build(m, path, name, known))
        for path in saved:
            put(path, lambda module, path=path: _save(module, adapter, path, name))
    except BaseException:
        if any(name in layer.configs for layer in adapter_layers(model)):
            remove(model, name)
        raise
    model.requires_grad_(False)
    activate(model, name)
    _train_biases(model, adapter, name)
    return model


def remove(model: nn.Module, name: str) -> None:
    """Takes an adapter off a model, in place; layers without adapters become plain again.

    Raises:
        ValueError: the model does not have it, or it is merged.
    """
    if name not in adapter_names(model):
        raise ValueError(f"remove: expected one of {adapter_names(model)}, got {name!r}")
    for path, layer in list(paths(model)):
        if not isinstance(layer, AdapterLayer):
            continue
        if name in layer.merged:
            raise ValueError(f"remove: expected adapters to be unmerged first, got {name!r} merged")
        if name in layer.configs:
            layer.remove(name)
        if not layer.configs:
            set_module(model, path, layer.bare())


def _save(module: nn.Module, adapter: Adapter, path: str, name: str) -> SavedModule:
    layer = module if isinstance(module, SavedModule) else SavedModule(module)
    if isinstance(module, AdapterLayer) and layer is not module:
        raise TypeError(f"adapt: expected {path} without adapters, got {type(module).__name__}")
    layer.add(name, adapter, path)
    return layer


def check_name(model: nn.Module, name: str) -> None:
    if name in adapter_names(model):
        raise ValueError(f"adapt: expected a name other than {adapter_names(model)}, got {name!r}")
    taken = hasattr(nn.ParameterDict(), name) or hasattr(nn.ModuleDict(), name)
    if not name or "." in name or taken:
        raise ValueError(
            f"adapt: expected a name without dots that is no attribute of nn.Module, got {name!r}"
        )


def _check_biases(model: nn.Module, adapter: Adapter) -> None:
    """Biases of the model cannot be switched, so only one adapter may train them."""
    other = [n for n, c in adapter_configs(model).items() if getattr(c, "bias", "none") != "none"]
    if other and getattr(adapter, "bias", "none") != "none":
        raise ValueError(f"adapt: expected bias='none' beside {other[0]!r}, which trains biases")


def _train_biases(model: nn.Module, adapter: Adapter, name: str) -> None:
    which = getattr(adapter, "bias", "none")
    if which == "all":
        own = {id(p) for layer in adapter_layers(model) for p in layer.own_parameters(name)}
        for path, parameter in model.named_parameters():
            if path.endswith("bias") and id(parameter) not in own:
                parameter.requires_grad_(True)
    elif which == "lora_only":
        for layer in adapter_layers(model):
            if name in layer.configs and isinstance(layer.bias, nn.Parameter):
                layer.bias.requires_grad_(True)
