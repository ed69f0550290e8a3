"""One adapter from several: sums and concatenations, and mixtures of what is left after pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastweights.adapters.activate import check_names
from fastweights.adapters.inject import check_name
from fastweights.adapters.lora import LoRA
from fastweights.adapters.lora_layer import LoRALayer
from fastweights.adapters.protocol import adapter_configs, adapter_layers
from fastweights.adapters.rules import paths

__all__ = ["KINDS", "combine"]

_MIXTURES = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
KINDS = ("cat", "svd", *_MIXTURES, *(f"{kind}_svd" for kind in _MIXTURES[1:]))
_MAJORITIES = ("total", "frequency")


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    kind: str = "svd",
    rank: int | None = None,
    density: float | None = None,
    majority: str = "total",
    clamp: float | None = None,
) -> None:
    """Adds an adapter that is a weighted combination of others, as PEFT defines each kind.

    It has scale 1 and is neither active nor trained until `fastweights.adapters.activate` says so.
    With Δ_i = s_i B_i A_i and weights w_i:

    - "cat": Σ w_i Δ_i exactly, of the ranks' sum.
    - "svd": the best approximation of Σ w_i Δ_i of a rank (in the Frobenius norm).
    - "linear": A = Σ ±√|w_i s_i| A_i and B = Σ √|w_i s_i| B_i: cheap, and a product of sums, which
      is *not* the sum of the products. Adapters of one rank only, as all kinds without "svd".
    - "magnitude_prune": as "linear", of the entries of A_i and of B_i that are largest.
    - "ties": the same, and where signs differ, the mean of those of the majority's (TIES, 2023,
      arXiv:2306.01708).
    - "dare_linear", "dare_ties": the same with entries dropped by chance and the others made larger
      to make up for it (DARE, 2023, arXiv:2311.03099).
    - with "_svd": the same on Δ_i in place of A_i and B_i, then as "svd".

    Args:
        model: with adapters of LoRA.
        weights: of the adapters, by name; they may be negative.
        name: of the new adapter.
        kind: see above. A single adapter is taken as by "linear".
        rank: for "svd" kinds; None: the largest of the adapters.
        density: the share of the entries that pruning leaves; required by the kinds that prune.
        majority: of "ties" kinds: the sign of the sum ("total") or of most entries ("frequency").
        clamp: for "svd" kinds: limit A and B to this quantile of their entries.

    Raises:
        ValueError: unknown names, kinds or settings; ranks that differ where they must not; DoRA,
            `lora_bias` or `modules_to_save`, which do not combine.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.adapters import LoRA, activate, combine
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> for name in ("a", "b"):
        ...     model = fw.adapt(model, LoRA(rank=2, init="random"), name=name)
        >>> combine(model, {"a": 0.5, "b": 0.5}, name="mean", kind="cat")
        >>> activate(model, "mean")
        >>> model[0].delta("mean").allclose((model[0].delta("a") + model[0].delta("b")) / 2)
        True
    """
    _check(model, weights, name, kind, density, majority)
    kind = "linear" if len(weights) == 1 else kind
    layers = {
        path: layer
        for path, layer in paths(model)
        if isinstance(layer, LoRALayer) and any(n in layer.configs for n in weights)
    }
    made = {}
    for path, layer in layers.items():
        here = {n: w for n, w in weights.items() if n in layer.configs}
        made[path] = _factors(layer, here, path, kind, rank, density, majority, clamp)
    size = max(len(a) for a, _ in made.values())
    first = next(c for n, c in adapter_configs(model).items() if n in weights)
    assert isinstance(first, LoRA)
    config = LoRA(targets=list(layers), rank=size, dropout=first.dropout, dtype=first.dtype)
    for path, layer in layers.items():
        if name in layer.configs:  # a module that has two paths
            continue
        layer.add(name, config, path)
        for parameter, value in zip(layer.factors(name), made[path], strict=True):
            parameter.requires_grad_(False).zero_()
            small = parameter[: len(value)] if parameter is layer.factors(name)[0] else parameter
            small.flatten(1)[:, : value.shape[1]].copy_(value)


def _check(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    kind: str,
    density: float | None,
    majority: str,
) -> None:
    if kind not in KINDS:
        raise ValueError(f"combine: expected kind in {KINDS}, got {kind!r}")
    if majority not in _MAJORITIES:
        raise ValueError(f"combine: expected majority in {_MAJORITIES}, got {majority!r}")
    prunes = "prune" in kind or "ties" in kind or "dare" in kind
    if prunes and (density is None or not 0 < density <= 1):
        raise ValueError(f"combine: expected 0 < density <= 1 with {kind!r}, got {density}")
    if not weights:
        raise ValueError("combine: expected the weight of at least one adapter, got none")
    check_names("combine", model, list(weights))
    check_name(model, name)
    for layer in adapter_layers(model):
        changed = [n for n in getattr(layer, "initial_A", ()) if n in weights]
        if changed:
            raise ValueError(
                f"combine: expected adapters that leave the base as it is, got {changed[0]!r}; "
                "use fastweights.adapters.to_lora first"
            )
    for one, config in adapter_configs(model).items():
        if one not in weights:
            continue
        if not isinstance(config, LoRA):
            raise ValueError(f"combine: expected LoRA, got {type(config).__name__} for {one!r}")
        if config.dora or config.lora_bias or config.modules_to_save:
            raise ValueError(
                "combine: expected adapters without DoRA, lora_bias and modules_to_save, "
                f"got {one!r}"
            )


def _factors(
    layer: LoRALayer,
    weights: Mapping[str, float],
    path: str,
    kind: str,
    rank: int | None,
    density: float | None,
    majority: str,
    clamp: float | None,
) -> tuple[Tensor, Tensor]:
    """A and B of a layer's combination, as matrices."""
    pairs = [tuple(t.flatten(1) for t in layer.factors(n)) for n in weights]
    factors = [w * layer.scaling[n] for n, w in weights.items()]
    if kind == "cat":
        downs = [a * f for (a, _), f in zip(pairs, factors, strict=True)]
        return torch.cat(downs), torch.cat([b for _, b in pairs], 1)
    if kind.endswith("svd"):
        mixture = kind.removesuffix("svd").removesuffix("_") or "linear"
        deltas = [layer.delta(n, b.dtype) for n, (_, b) in zip(weights, pairs, strict=True)]
        delta = mix(mixture, deltas, list(weights.values()), density, majority)
        return _truncated(delta, rank or max(len(a) for a, _ in pairs), clamp)
    ranks = sorted({len(a) for a, _ in pairs})
    if len(ranks) > 1:
        raise ValueError(f"combine: expected one rank at {path} with {kind!r}, got {ranks}")
    roots = [math.sqrt(abs(f)) for f in factors]
    signed = [math.copysign(r, f) for r, f in zip(roots, factors, strict=True)]
    down = mix(kind, [a for a, _ in pairs], signed, density, majority)
    return down, mix(kind, [b for _, b in pairs], roots, density, majority)


def _truncated(delta: Tensor, rank: int, clamp: float | None) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    a, b = vh[:rank], u[:, :rank] * s[:rank]
    if clamp is not None:
        limit = torch.cat([b.flatten(), a.flatten()]).quantile(clamp)
        a, b = a.clamp(-limit, limit), b.clamp(-limit, limit)
    return a, b


def mix(
    kind: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    density: float | None,
    majority: str = "total",
) -> Tensor:
    """A weighted sum of tensors of one shape, pruned before ("linear" is not)."""
    if kind != "linear":
        assert density is not None
        prune = _dropped if kind.startswith("dare") else _largest
        tensors = [prune(t, density) for t in tensors]
    stacked = torch.stack(list(tensors))
    by_tensor = torch.tensor(weights, dtype=stacked.dtype).view(-1, *[1] * tensors[0].dim())
    if not kind.endswith("ties"):
        return (stacked * by_tensor).sum(0)
    signs = stacked.sign()
    votes = stacked.sum(0) if majority == "total" else signs.sum(0)
    kept = signs == torch.where(votes >= 0, 1, -1)
    return (stacked * by_tensor * kept).sum(0) / kept.sum(0).clamp(min=1)


def _largest(t: Tensor, density: float) -> Tensor:
    count = int(density * t.numel())
    kept = torch.zeros_like(t).flatten()
    kept[t.abs().flatten().topk(count).indices] = 1
    return t * kept.view_as(t)


def _dropped(t: Tensor, density: float) -> Tensor:
    return t * torch.bernoulli(torch.full_like(t, density)) / density
