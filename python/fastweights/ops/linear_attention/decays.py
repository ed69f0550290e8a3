"""The fixed decays per head: natural logarithms, ≤ 0, float32 `[H]`.

Modules make them anew at each call: a buffer would be rounded when a model is cast to bfloat16.
"""

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["DecayRule", "alibi_slopes", "lightning_log_decay", "retention_log_decay"]

DecayRule = Literal["alibi", "linear"]


def retention_log_decay(num_heads: int, device: torch.device | None = None) -> Tensor:
    """Return ln γ_h, γ_h = 1 - 2^(-5-h) for h = 0…H-1 (RetNet, arXiv:2307.08621, eq. 8)."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(num_heads, device=device)))


def alibi_slopes(num_heads: int) -> list[float]:
    """The slopes of ALiBi, 2^(-8(h+1)/H) for H a power of two.

    Any other H takes the list of the nearest lower power of two, then every other entry (the 1st,
    the 3rd, …) of the list of the next one.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[0::2][: num_heads - power]
    return slopes


def lightning_log_decay(
    num_heads: int,
    layer_idx: int,
    num_layers: int,
    rule: DecayRule = "alibi",
    device: torch.device | None = None,
) -> Tensor:
    """The decay of Lightning Attention-2 in layer ℓ of L (arXiv:2401.04658).

    Args:
        num_heads: H.
        layer_idx: ℓ, from 0.
        num_layers: L.
        rule: `alibi`, the authors': -slope_h·(1 - ℓ/(L-1) + 1e-5). `linear`, fla's:
            -(8/H)·(1 - ℓ/L)·h, whose head 0 never decays.
        device: Where the result lives.

    Raises:
        ValueError: The layer is not one of `num_layers`, or the rule is unknown.
    """
    if not 0 <= layer_idx < num_layers:
        raise ValueError(
            f"lightning_log_decay: expected 0 <= layer_idx < num_layers = {num_layers}, "
            f"got {layer_idx}"
        )
    if rule == "linear":
        rate = (8 / num_heads) * (1 - layer_idx / num_layers)
        return -rate * torch.arange(num_heads, device=device, dtype=torch.float32)
    if rule != "alibi":
        raise ValueError(f'lightning_log_decay: expected rule "alibi" or "linear", got {rule!r}')
    # A model of one layer has no schedule: its only layer is the first.
    factor = 1 - layer_idx / max(num_layers - 1, 1) + 1e-5
    return torch.tensor([-slope * factor for slope in alibi_slopes(num_heads)], device=device)
