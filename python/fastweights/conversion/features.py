"""The Hedgehog feature map, with its own matrix for every head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# A gain beyond e^±15 is an outlier that no training text showed; it must not become infinite.
_LOG_GAIN = 15.0


class HedgehogFeatures(nn.Module):
    """φ(x) = [softmax(xW), softmax(−xW)]: positive, spiky features (Hedgehog, 2024, eq. 6).

    Each half sums to one, so that a head's features sum to two whatever the size of x.

    With a gain, φ(x) = exp(a · x + b) [softmax(xW), softmax(−xW)]: some tokens matter more than
    others.

    Args:
        heads: number of heads H of the input, each with its own W.
        head_dim: size K of one head.
        features: columns F/2 of W; the map returns twice as many features.
        gain: train a and b, zeros at first.

    Attributes:
        weight: W, `[H, K, F/2]`, the identity at first.
        gain_weight: a, `[H, K]`, or None.
        gain_bias: b, `[H]`, or None.

    Shape:
        `[B, T, H, K]` to `[B, T, H, F]`, computed in float32 at least.
    """

    def __init__(self, heads: int, head_dim: int, features: int, *, gain: bool = False) -> None:
        super().__init__()
        self.heads, self.head_dim, self.features = heads, head_dim, features
        self.weight = nn.Parameter(torch.empty(heads, head_dim, features))
        self.gain_weight = nn.Parameter(torch.zeros(heads, head_dim)) if gain else None
        self.gain_bias = nn.Parameter(torch.zeros(heads)) if gain else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity, or its first columns if F/2 < K: attention starts out monotone."""
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.head_dim, self.features).expand_as(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Features of `x`."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        y = torch.einsum("bthk,hkf->bthf", x, self.weight)
        features = torch.cat((y.softmax(-1), (-y).softmax(-1)), -1)
        if self.gain_weight is None or self.gain_bias is None:
            return features
        log_gain = (x * self.gain_weight).sum(-1) + self.gain_bias
        return features * log_gain.clamp(-_LOG_GAIN, _LOG_GAIN).exp()[..., None]

    def extra_repr(self) -> str:
        """Sizes."""
        return f"heads={self.heads}, head_dim={self.head_dim}, features=2x{self.features}"
