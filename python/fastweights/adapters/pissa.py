"""PiSSA: LoRA that starts from the principal components of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastweights.adapters.base import dtype_of, row_tiles
from fastweights.adapters.lora import LoRA
from fastweights.adapters.lora_layer import LoRALayer
from fastweights.adapters.lora_linear import LoRALinear

__all__ = ["PiSSA", "weight_of"]


@dataclass(frozen=True, kw_only=True)
class PiSSA(LoRA):
    r"""Principal singular values and vectors adaptation (Meng et al. 2024, arXiv:2404.02948).

    .. math::
        W = U S V^T, \quad A = \sqrt{S_r / s}\, V_r^T, \quad B = U_r \sqrt{S_r / s}, \quad
        W_{res} = W - s B A

    The base becomes W_res and is frozen; the largest components are trained. At the start nothing
    has changed but roundings. While the adapter is not in use, what it took is added to the base,
    so that `disabled`, other adapters and `merge` meet the model as it was;
    `fastweights.adapters.remove` restores it with one rounding, and
    `fastweights.adapters.to_lora` makes a LoRA of twice the rank for the original base.

    Args:
        rank: see `LoRA`, as are the others but `init`, which has no effect.
        iterations: None takes a full SVD; else that many power iterations of a randomised one.

    Raises:
        ValueError: an argument out of range; a rank that a layer does not have.
        TypeError: a layer that is not linear, or quantized: adapt first, `quantize_` then.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.adapters import PiSSA
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(16, 16)), torch.ones(1, 16)
        >>> y = model(x)
        >>> torch.allclose(fw.adapt(model, PiSSA(rank=4))(x), y, atol=1e-5)
        True
    """

    iterations: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations is not None and self.iterations < 0:
            raise ValueError(f"PiSSA: expected iterations >= 0, got {self.iterations}")

    @torch.no_grad()
    def initialize(self, layer: LoRALayer, name: str, known: Any) -> None:
        """Takes the principal components out of the base."""
        linear = linear_of(layer, name, "PiSSA")
        w, rank = weight_of(linear), len(linear.lora_A[name])
        if self.iterations is None:
            u, s, vh = torch.linalg.svd(w, full_matrices=False)
        else:
            u, s, v = torch.svd_lowrank(w, rank, niter=self.iterations)
            vh = v.t()
        root = (s[:rank] / linear.scaling[name]).sqrt()
        linear.take_out(name, root.unsqueeze(1) * vh[:rank], u[:, :rank] * root)


def linear_of(layer: LoRALayer, name: str, method: str) -> LoRALinear:
    """The layer, which has to be linear and of the adapter's rank at least."""
    if not isinstance(layer, LoRALinear):
        raise TypeError(f"{method}: expected linear layers, got {type(layer.base_layer).__name__}")
    rank, most = len(layer.lora_A[name]), min(layer.in_features, layer.out_features)
    if rank > most:
        raise ValueError(
            f"{method}: expected rank <= {most} for a layer of {layer.in_features} inputs and "
            f"{layer.out_features} outputs, got {rank}"
        )
    if layer.scaling[name] <= 0:
        raise ValueError(f"{method}: expected alpha > 0, got scale {layer.scaling[name]}")
    return layer


def weight_of(layer: LoRALinear) -> Tensor:
    """The weight as it was before any adapter, in float32 or more."""
    base = layer.float_base()
    wide = torch.float64 if dtype_of(base) == torch.float64 else torch.float32
    tiles = row_tiles(base, wide)
    return torch.cat([layer.original_rows(tile, part) for part, tile in tiles])
