"""Which adapters of a model count: all the time, within a context, or by sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fastweights.adapters.protocol import adapter_layers, adapter_names

__all__ = ["activate", "disabled", "per_sample"]


def activate(model: nn.Module, names: str | Sequence[str], *, trainable: bool = True) -> None:
    """Chooses the adapters that count; the updates of several are added.

    Args:
        model: with adapters.
        names: of the adapters; none leaves the bare model.
        trainable: whether their parameters require gradients; those of the others do not.

    Raises:
        ValueError: a name that the model does not have, or adapters that are merged.
    """
    chosen = (names,) if isinstance(names, str) else tuple(names)
    check_names("activate", model, chosen)
    layers = list(adapter_layers(model))
    refuse_merged("activate", model)
    for layer in layers:
        layer.activate(chosen)
        for name in layer.configs:
            for parameter in layer.own_parameters(name):
                parameter.requires_grad_(trainable and name in chosen)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes without its adapters.

    Those merged with ``keep_base=True`` are left out, too; a merge without it is for good.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.adapters import LoRA, disabled
        >>> model = fw.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoRA(init="random"))
        >>> x = torch.ones(1, 8)
        >>> with disabled(model):
        ...     torch.equal(model(x), model[0].base_layer(x))
        True
    """
    layers = list(adapter_layers(model))
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
        layer.refresh()
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
            layer.refresh()


@contextmanager
def per_sample(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the context, sample i of a batch meets the adapter ``names[i]``, or None.

    For inference: one batch serves users of different adapters, in one call of the op per layer.

    Args:
        model: with adapters, in evaluation mode.
        names: one for every sample.

    Raises:
        ValueError: a name that the model does not have; a model in training mode; adapters that
            are merged or cannot be chosen by sample (DoRA).
    """
    if model.training:
        raise ValueError("per_sample: expected a model in evaluation mode, got one in training")
    wanted = tuple(dict.fromkeys(name for name in names if name is not None))
    check_names("per_sample", model, wanted)
    refuse_merged("per_sample", model)
    layers = list(adapter_layers(model))
    for layer in layers:
        layer.check_rows([name for name in wanted if name in layer.configs])
    try:
        for layer in layers:
            here = tuple(name for name in wanted if name in layer.configs)
            rows = [here.index(name) if name in here else -1 for name in names]
            layer.route(here, torch.tensor(rows))
        yield
    finally:
        for layer in layers:
            layer.route((), None)


def check_names(function: str, model: nn.Module, names: Sequence[str]) -> None:
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise ValueError(f"{function}: expected names of adapters in {known}, got {name!r}")


def refuse_merged(function: str, model: nn.Module) -> None:
    merged = sorted({name for layer in adapter_layers(model) for name in layer.merged})
    if merged:
        raise ValueError(f"{function}: expected adapters to be unmerged first, got {merged} merged")
