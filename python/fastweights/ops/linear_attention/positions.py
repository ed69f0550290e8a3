"""Where a token stands in its sequence, and the rotations that tell it to the queries and keys."""

import torch
from torch import Tensor, nn

__all__ = [
    "LRPE",
    "check_cu_seqlens",
    "final_positions",
    "rotary",
    "token_positions",
    "token_sequences",
]


def check_cu_seqlens(kind: str, batch: int, length: int, cu_seqlens: Tensor | None) -> None:
    """Refuse packing that is not 0 = c_0 ≤ c_1 ≤ … ≤ c_N = T with B = 1.

    Raises:
        ValueError: With `kind` in front.
    """
    if cu_seqlens is None:
        return
    if batch != 1:
        raise ValueError(f"{kind}: expected batch size 1 with cu_seqlens, got {batch}")
    ends = cu_seqlens.tolist()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
        raise ValueError(
            f"{kind}: expected cu_seqlens to ascend from 0 to T = {length}, got {ends}"
        )


def token_sequences(batch: int, length: int, cu_seqlens: Tensor | None) -> Tensor:
    """The number of the sequence that each token belongs to, int64 `[B, T]`.

    Without `cu_seqlens` this is the batch index; with it (B = 1), the packed segment.
    """
    if cu_seqlens is None:
        return torch.arange(batch)[:, None].expand(batch, length)
    tokens = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True)[None]


def token_positions(
    batch: int, length: int, cu_seqlens: Tensor | None = None, start: Tensor | None = None
) -> Tensor:
    """Each token's position in its own sequence, int64 `[B, T]` (`[1, T]` where all rows agree).

    Args:
        batch: B, which is 1 when sequences are packed.
        length: T.
        cu_seqlens: None or `[N + 1]`.
        start: The position of each sequence's first token, `[N]` (N = B without packing), or None
            for 0.
    """
    if cu_seqlens is None:
        device = None if start is None else start.device
        positions = torch.arange(length, device=device)[None]
        return positions if start is None else positions + start[:, None]
    sequence = token_sequences(batch, length, cu_seqlens)
    positions = torch.arange(length, device=cu_seqlens.device)[None] - cu_seqlens.long()[sequence]
    return positions if start is None else positions + start[sequence]


def final_positions(
    batch: int, length: int, cu_seqlens: Tensor | None = None, start: Tensor | None = None
) -> Tensor:
    """The position that each sequence's next token will have, int64 `[N]`; arguments as above."""
    if cu_seqlens is None:
        device = None if start is None else start.device
        lengths = torch.full((batch,), length, device=device)
    else:
        lengths = cu_seqlens.long().diff()
    return lengths if start is None else start + lengths


def _cos_sin(positions: Tensor, frequencies: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position · frequency, `[..., 1, D/2]` in x's dtype."""
    # bfloat16 cannot tell position 257 from 256.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    angle = positions[..., None, None].to(x.device, wide) * frequencies.to(wide)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def rotary(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) by position · base^(-2i/D) (RoFormer, arXiv:2104.09864).

    The halves are paired as in GPT-NeoX, Llama and fla. The frequencies are made anew at each call:
    a buffer would be rounded when a model is cast to bfloat16, and left empty by a meta device.

    Args:
        x: `[..., H, D]`, D even.
        positions: `[...]`.
        base: See above.
    """
    width = x.shape[-1]
    exponent = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
    cos, sin = _cos_sin(positions, base**-exponent, x)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class LRPE(nn.Module):
    """TransNormer's position map: a fixed reflection, then rotation by trained angles.

    x ← R(position·θ)·(x - 2(x·v)v) with a unit vector v that is drawn once and kept, and neighbours
    (x_0, x_1), (x_2, x_3), … rotated as pairs. The product of a mapped query and a mapped key
    depends on their distance only. Parameter and buffer carry the names and shapes of the authors'
    `urpe` (arXiv:2210.10340, and arXiv:2307.09270 for the family of such maps).

    Args:
        dim: Width D of a head, even.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"LRPE: expected an even dim, got {dim}")
        angles = 10000 ** (-2 / dim * torch.arange(dim // 2))
        self.theta = nn.Parameter(angles.reshape(1, 1, -1))
        reflected = torch.randn(1, dim, 1)
        self.register_buffer("v", reflected / reflected.norm())
        self.v: Tensor

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Map x `[..., H, D]` at positions `[...]`."""
        v = self.v.reshape(-1).to(x.dtype)
        x = x - 2 * (x @ v)[..., None] * v
        cos, sin = _cos_sin(positions, self.theta.reshape(-1), x)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
