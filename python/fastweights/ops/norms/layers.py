"""The norms of recurrent mixers as modules."""

from typing import Literal

import torch
from torch import Tensor, nn

from fastweights.ops.norms.functional import gated_rms_norm, rms_norm

__all__ = ["RMSNorm", "RMSNormGated", "SRMSNorm"]


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` by `fastweights.rms_norm`: in the input's dtype also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., D]` over D."""
        return rms_norm(x, self.weight, eps=self._eps(x))

    def _eps(self, x: Tensor) -> float:
        return torch.finfo(x.dtype).eps if self.eps is None else self.eps


class SRMSNorm(nn.Module):
    """x / (‖x‖₂ / √D + eps) over the last dimension, with no learned scale (arXiv:2210.10340).

    `SRMSNorm(a·x) = SRMSNorm(x)` for a > 0 as far as eps is small beside the root mean square, and
    eps is what bounds the gradient at x = 0 by 1/eps.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., D]`, in float32 at least, and return it in x's dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        y: Tensor = (wide / (rms + self.eps)).to(x.dtype)
        return y


class RMSNormGated(RMSNorm):
    """rmsnorm(x) · weight · act(gate): the output of RetNet, GLA and the gated delta rules.

    Args:
        dim: D, the width of a row.
        eps: Added to the mean square.
        elementwise_affine: Whether there is a weight.
        activation: "silu" or "sigmoid".
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        activation: Literal["silu", "sigmoid"] = "silu",
    ) -> None:
        super().__init__(dim, eps, elementwise_affine)
        self.activation: Literal["silu", "sigmoid"] = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise `[..., D]` over D and gate it by `[..., D]`."""
        return gated_rms_norm(x, gate, self.weight, activation=self.activation, eps=self._eps(x))
