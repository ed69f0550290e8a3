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


def without_padding(kind: str, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of a padded batch as packed sequences.

    Args:
        kind: In front of an error.
        x: `[B, T, D]`.
        attention_mask: `[B, T]`, 1 or True for a token and 0 for padding, on either side.

    Returns:
        The tokens `[1, total, D]`, where each sequence begins and ends, int64 `[B + 1]`, and the
        places of the tokens in the B·T of the batch, int64 `[total]`.

    Raises:
        ValueError: A mask of another shape, or of floating numbers.
    """
    if attention_mask.shape != x.shape[:2] or attention_mask.is_floating_point():
        raise ValueError(
            f"{kind}: expected attention_mask of shape [B, T] = {list(x.shape[:2])} of 0 and 1 or "
            f"bool, got {list(attention_mask.shape)} of {attention_mask.dtype}"
        )
    kept = attention_mask.bool()
    # By index: masked_scatter and a boolean index take several times as long.
    places = kept.flatten().nonzero().squeeze(1)
    ends = kept.sum(dim=1).cumsum(dim=0)
    return x.flatten(0, 1).index_select(0, places).unsqueeze(0), F.pad(ends, (1, 0)), places


def with_padding(y: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Packed `[1, total, D]` back in its places of a batch of `shape` [B, T]; padding is 0."""
    padded = y.new_zeros(shape.numel(), y.shape[-1])
    return padded.index_copy_(0, places, y.squeeze(0)).view(*shape, y.shape[-1])
