"""What every gated recurrence refuses alike, whatever its update rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastweights.testing.opspec import BadInput

__all__ = ["bad_recurrence_inputs"]


def bad_recurrence_inputs(op: Callable[..., Any]) -> tuple[BadInput, ...]:
    """Calls of `op(q, k, v, *, g, initial_state, cu_seqlens)` and the errors that they raise."""
    q = torch.rand(2, 5, 2, 4)
    one = q[:1]
    name = getattr(op, "__name__", "")

    def bad(message: str, *args: torch.Tensor, **kwargs: torch.Tensor) -> BadInput:
        return BadInput(lambda: op(*args, **kwargs), RuntimeError, f"{name}: expected {message}")

    def bad_starts(message: str, starts: list[float]) -> BadInput:
        return bad(message, one, one, one, cu_seqlens=torch.tensor(starts))

    return (
        bad(r"q of shape \[B, T, H, K\], got \[5, 2, 4\]", q[0], q, q),
        bad(
            r"k of shape \[B, T, H, K\] = \[2, 5, 2, 4\] \(from q\), got \[2, 4, 2, 4\]",
            *(q, q[:, :4], q),
        ),
        bad(r"v with a multiple of H = 2 heads \(from q\), got 1", q, q, q[:, :, :1]),
        bad(r"v of dtype float32 \(from q\), got float64", q, q, q.double()),
        bad(r"q of dtype float32, bfloat16, float16 or float64, got int32", *[q.int()] * 3),
        bad(
            r"g of shape \[B, T, HV\] = \[2, 5, 2\] \(from q and v\), got \[2, 2, 5\]",
            *(q, q, q),
            g=q[..., 0].mT,
        ),
        bad(
            r"g of shape \[HV\], \[B, T, HV\] or \[B, T, HV, K\], got \[5, 2\]",
            *(q, q, q),
            g=q[0, :, :, 0],
        ),
        bad(
            r"initial_state of shape \[N, HV, K, V\] = \[2, 2, 4, 4\]",
            *(q, q, q),
            initial_state=torch.zeros(1, 2, 4, 4),
        ),
        bad(
            r"initial_state of dtype float32, got bfloat16",
            *(q, q, q),
            initial_state=torch.zeros(2, 2, 4, 4).bfloat16(),
        ),
        bad("B = 1 with cu_seqlens, got 2", q, q, q, cu_seqlens=torch.tensor([0, 5])),
        bad_starts("cu_seqlens to ascend, got 2 after 4", [0, 4, 2, 5]),
        bad_starts("cu_seqlens to end with T = 5, got 4", [0, 4]),
        bad_starts("cu_seqlens to begin with 0, got -3", [-3, 5]),
        bad_starts("cu_seqlens of dtype int32 or int64, got float32", [0.0, 5.0]),
    )
