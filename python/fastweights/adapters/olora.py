"""OLoRA: LoRA that starts from an orthonormal basis of the weight's columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastweights.adapters.lora import LoRA
from fastweights.adapters.lora_layer import LoRALayer
from fastweights.adapters.pissa import linear_of, weight_of

__all__ = ["OLoRA"]


@dataclass(frozen=True, kw_only=True)
class OLoRA(LoRA):
    r"""Orthonormal low-rank adaptation (Büyükakyüz 2024, arXiv:2406.01775).

    .. math::
        W = Q R, \quad A = R_{:r}, \quad B = Q_{:, :r}, \quad W_{res} = W - s B A

    All else is as with `fastweights.adapters.PiSSA`.

    Args:
        rank: see `LoRA`, as are the others but `init`, which has no effect.

    Raises:
        ValueError: an argument out of range; a rank that a layer does not have.
        TypeError: a layer that is not linear, or quantized: adapt first, `quantize_` then.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.adapters import OLoRA
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(16, 16)), torch.ones(1, 16)
        >>> y = model(x)
        >>> torch.allclose(fw.adapt(model, OLoRA(rank=4))(x), y, atol=1e-5)
        True
    """

    @torch.no_grad()
    def initialize(self, layer: LoRALayer, name: str, known: Any) -> None:
        """Takes s Q R, of the first r columns and rows, out of the base."""
        linear = linear_of(layer, name, "OLoRA")
        q, r = torch.linalg.qr(weight_of(linear))
        rank = len(linear.lora_A[name])
        linear.take_out(name, r[:rank], q[:, :rank])
