"""`fla.modules.rotary`: what its autograd function calls in both directions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotary_embedding_fwdbwd"]


def rotary_embedding_fwdbwd(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """`rotary_embedding_fwdbwd` of fla: pairs of channels turned by the angle of their position.

    Args:
        x: [B, T, H, D].
        cos: of the angles, [positions, R], 2 R at most D; channels from 2 R on stay.
        sin: like cos.
        seqlen_offsets: position of the first token, of all sequences or of each [N].
        cu_seqlens: [N + 1], B = 1; positions are those in the sequence.
        interleaved: pairs are neighbours, and not one of either half.
        inplace: write to x.
        conjugate: turn back, which is the backward.
        chunk_indices: ignored.

    Returns:
        Of x's shape and dtype; x itself with `inplace`.

    Raises:
        ValueError: a position that cos does not have.
    """
    length, half = x.shape[1], cos.shape[1]
    if cu_seqlens is None:
        position = torch.arange(length) + _column(seqlen_offsets)
    else:
        lengths = cu_seqlens.diff()
        starts = cu_seqlens[:-1] - seqlen_offsets
        position = torch.arange(length) - starts.repeat_interleave(lengths)
        position = position.unsqueeze(0)
    if length and not 0 <= int(position.min()) <= int(position.max()) < cos.shape[0]:
        raise ValueError(
            f"rotary_embedding: positions must be in [0, {cos.shape[0]}), got "
            f"{int(position.min())} to {int(position.max())}"
        )
    c, s = cos[position].unsqueeze(2), sin[position].unsqueeze(2)
    s = -s if conjugate else s
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        pairs = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        pairs = torch.cat((a * c - b * s, a * s + b * c), dim=-1)
    y = torch.cat((pairs, rest), dim=-1)
    return x.copy_(y) if inplace else y


def _column(offsets: int | Tensor) -> Tensor:
    return torch.as_tensor(offsets).reshape(-1, 1)
