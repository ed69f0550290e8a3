"""From adapters that changed the base to plain LoRA for the original one."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import nn

from fastweights.adapters.activate import check_names, refuse_merged
from fastweights.adapters.lora import LoRA
from fastweights.adapters.lora_linear import LoRALinear
from fastweights.adapters.protocol import adapter_configs, adapter_layers

__all__ = ["doubled", "to_lora"]


@torch.no_grad()
def to_lora(model: nn.Module, name: str) -> None:
    """Makes an adapter of PiSSA or CorDA a LoRA of twice the rank, for the base as it was.

    s B A - s₀ B₀ A₀ is what training changed, s₀ being s unless `set_scale` changed it:
    A' = [A; A₀], B' = [B, -(s₀/s) B₀], with alpha doubled (times √2 with `rslora`), so that s
    stays. The base gets back what was taken out of it, with one rounding. Active adapters stay
    active.

    Args:
        model: with the adapter, unmerged.
        name: of the adapter.

    Raises:
        ValueError: the model does not have it, it left the base as it is, is merged, has DoRA, or
            its scale is 0.
        TypeError: the base was quantized since.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.adapters import PiSSA, to_lora
        >>> model = fw.adapt(torch.nn.Sequential(torch.nn.Linear(16, 16)), PiSSA(rank=4))
        >>> to_lora(model, "default")
        >>> model[0].lora_A["default"].shape
        torch.Size([8, 16])
    """
    check_names("to_lora", model, [name])
    refuse_merged("to_lora", model)
    old = adapter_configs(model)[name]
    layers = [layer for layer in adapter_layers(model) if name in layer.configs]
    changed = [m for m in layers if isinstance(m, LoRALinear) and name in m.initial_A]
    if not changed or not isinstance(old, LoRA):
        raise ValueError(f"to_lora: expected an adapter that changed the base, got {name!r}")
    if old.dora:
        raise ValueError(f"to_lora: expected an adapter without DoRA, got {name!r}")
    for linear in changed:
        linear.float_base()
        linear.start_taken_back(name)  # refuses before anything is changed
    config = doubled(old)
    for layer in layers:
        layer.configs[name] = config
    for linear in changed:
        start = linear.start_taken_back(name)
        for axis, parts in enumerate((linear.lora_A, linear.lora_B)):
            both = torch.cat([parts[name].detach(), start[axis]], axis)
            parts[name] = nn.Parameter(both, parts[name].requires_grad)
        linear.give_back(name)


def doubled(config: LoRA) -> LoRA:
    """Plain LoRA of twice the rank with the same scale."""
    alpha = config.rank if config.alpha is None else config.alpha
    times = 2**0.5 if config.rslora else 2.0
    kept = {f.name: getattr(config, f.name) for f in fields(LoRA)}
    return LoRA(
        **kept
        | {
            "rank": 2 * config.rank,
            "alpha": times * alpha,
            "rank_pattern": {k: 2 * r for k, r in config.rank_pattern.items()},
            "alpha_pattern": {k: times * a for k, a in config.alpha_pattern.items()},
        }
    )
