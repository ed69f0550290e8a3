"""What hybrid attention carries between calls, and which key is in whose window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["sliding", "terraced"]


@dataclass
class HybridState:
    """The constant-size memory of `hybrid_attention`: plain tensors, saved and restored as such.

    Token t lives in slot `t % R` of the rings, R = `window` for the sliding layout and 2 `window`
    for the terraced one. Everything is float32 (float64 for float64 inputs) but `position`.

    Attributes:
        k: `[B, HKV, R, K]`, the latest keys.
        v: `[B, HKV, R, V]`, the latest values.
        kf: `[B, HKF, R, F]`, the latest key features; HKF is HKV or HQ.
        S: `[B, HS, F, V]`, the decayed sum of `kf_j v_jᵀ` over keys that have left the window; HS
            is HQ if `kf` or `g` has HQ heads, else HKV.
        z: `[B, HS, F]`, the same sum of `kf_j`.
        position: int64 `[B]`, tokens seen so far; rows of a batch may differ.
    """

    k: Tensor
    v: Tensor
    kf: Tensor
    S: Tensor
    z: Tensor
    position: Tensor

    @classmethod
    def zeros(
        cls,
        batch: int,
        *,
        window: int,
        kv_heads: int,
        feature_heads: int,
        state_heads: int,
        key_dim: int,
        value_dim: int,
        feature_dim: int,
        layout: Layout = "sliding",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> HybridState:
        """The state before the first token."""
        ring = ring_size(window, layout)

        def empty(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        return cls(
            k=empty(kv_heads, ring, key_dim),
            v=empty(kv_heads, ring, value_dim),
            kf=empty(feature_heads, ring, feature_dim),
            S=empty(state_heads, feature_dim, value_dim),
            z=empty(state_heads, feature_dim),
            position=torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The fields in order."""
        return self.k, self.v, self.kf, self.S, self.z, self.position


torch.export.register_dataclass(HybridState, serialized_type_name="fastweights.HybridState")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(g: Tensor, k: Tensor, qf: Tensor) -> bool:
    """Whether a two-dimensional `g` of a step is `[HKV or HQ, F]` and not `[B, HKV or HQ]`."""
    return g.shape[1] == qf.shape[-1] and g.shape[0] in (k.shape[1], qf.shape[1])


def ring_size(window: int, layout: Layout) -> int:
    """Slots of the rings: the most tokens that a window holds."""
    return 2 * window if layout == "terraced" else window


def first_in_window(i: Tensor, window: int, layout: Layout) -> Tensor:
    """The first key in the window of query `i`, which ends at `i`; the linear part lies before."""
    return (i // window - 1) * window if layout == "terraced" else i - window + 1


def leaves_at(j: Tensor, window: int, layout: Layout) -> Tensor:
    """The first query whose window no longer holds key `j`."""
    return (j // window + 2) * window if layout == "terraced" else j + window


def state_after(
    k: Tensor,
    v: Tensor,
    kf: Tensor,
    S: Tensor,
    z: Tensor,
    before: HybridState | None,
    window: int,
    layout: Layout,
    cu_seqlens: Tensor | None,
) -> HybridState:
    """The state after tokens `k`, `v`, `kf` that follow `before`; S and z are those of the end."""
    size, length = ring_size(window, layout), k.shape[1]
    if cu_seqlens is None:
        offset = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
        lengths = torch.full_like(offset, length)
    else:
        offset = cu_seqlens.to(torch.int64)[:-1]
        lengths = cu_seqlens.to(torch.int64).diff()
    position = torch.zeros_like(offset) if before is None else before.position
    end = position + lengths
    # [N, size]: the newest token whose place is slot s; this call brought those >= position
    last = end[:, None] - 1
    newest = last - (last - torch.arange(size, device=k.device)) % size
    fresh = (newest >= position[:, None])[:, None, :, None]
    source = (newest - position[:, None] + offset[:, None]).clamp(0, max(length - 1, 0))
    row = torch.arange(len(offset), device=k.device)[:, None] if cu_seqlens is None else 0

    def ring(tokens: Tensor, old: Tensor | None) -> Tensor:
        if length == 0:
            tokens = tokens.new_zeros(tokens.shape[0], 1, *tokens.shape[2:])
        taken = tokens[row, source].transpose(1, 2).contiguous().to(state_dtype(tokens.dtype))
        return torch.where(fresh, taken, torch.zeros_like(taken) if old is None else old)

    return HybridState(
        k=ring(k, None if before is None else before.k),
        v=ring(v, None if before is None else before.v),
        kf=ring(kf, None if before is None else before.kf),
        S=S,
        z=z,
        position=end,
    )
