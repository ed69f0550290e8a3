"""What the token mixers of every family share."""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_mode(kind: str, mode: str, modes: tuple[str, ...]) -> None:
    """Refuse a `mode` that fla's layer does not have.

    Raises:
        ValueError: With `kind` in front.
    """
    if mode not in modes:
        raise ValueError(f"{kind}: expected mode to be one of {', '.join(modes)}, got {mode!r}")


def without_padding(kind: str, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of a padded batch as packed sequences.

    Args:
        kind: In front of an error.
        x: `[B, T, D]`.
        attention_mask: `[B, T]`, 1 or True for a token and 0 for padding, on either side.

    Returns:
        The tokens `[1, total, D]` and where each sequence begins and ends, int64 `[B + 1]`.

    Raises:
        ValueError: A mask of another shape, or of floating numbers.
    """
    if attention_mask.shape != x.shape[:2] or attention_mask.is_floating_point():
        raise ValueError(
            f"{kind}: expected attention_mask of shape [B, T] = {list(x.shape[:2])} of 0 and 1 or "
            f"bool, got {list(attention_mask.shape)} of {attention_mask.dtype}"
        )
    kept = attention_mask.bool()
    ends = kept.sum(dim=1).cumsum(dim=0)
    return x[kept].unsqueeze(0), F.pad(ends, (1, 0))


def with_padding(y: Tensor, attention_mask: Tensor) -> Tensor:
    """Packed `[1, total, D]` back in its places, `[B, T, D]`; padding is 0."""
    padded = y.new_zeros(*attention_mask.shape, y.shape[-1])
    return torch.masked_scatter(padded, attention_mask.bool().unsqueeze(-1), y)
