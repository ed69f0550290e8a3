"""`fla.ops.hgrn`: the elementwise recurrence h_t = e^{g_t} h_{t-1} + x_t of HGRN.

There is no kernel for it: it is one fused multiplication and addition of torch for every token, on
[B, D] at a time, in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastweights.integrations.fla.ops import _arguments

__all__ = ["chunk_hgrn", "fused_recurrent_hgrn"]


def chunk_hgrn(
    x: Tensor, g: Tensor, initial_state: Tensor | None = None, output_final_state: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`chunk_hgrn` of fla; see `fused_recurrent_hgrn`.

    The initial state gets a gradient, and the final one passes its on, which fla's chunk function
    does not do.
    """
    return fused_recurrent_hgrn(x, g, initial_state, output_final_state)


def fused_recurrent_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_hgrn` of fla: h_t = e^{g_t} h_{t-1} + x_t for every channel.

    Args:
        x: [B, T, D].
        g: log-decay [B, T, D].
        initial_state: [N, D], any floating dtype.
        output_final_state: also return the last h, else None.
        cu_seqlens: [N + 1], B = 1.

    Returns:
        h [B, T, D] and the last h [N, D], both in x's dtype.

    Raises:
        ValueError: packing with B > 1, a wrong number of states.
    """
    _arguments.check_packing(x, cu_seqlens, initial_state)
    wide = _arguments.state_dtype(x)
    decay, inputs = g.to(wide).exp(), x.to(wide)
    # One axis of x is that of the sequences in the states: the batch, or time if they are packed.
    axis, length = (1, x.shape[1]) if cu_seqlens is None else (0, int(cu_seqlens[-1]))
    offsets = torch.tensor([0, length]) if cu_seqlens is None else cu_seqlens.long()
    if length != x.shape[1] or int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
        raise ValueError(f"`cu_seqlens` must rise from 0 to {x.shape[1]}, got {offsets.tolist()}.")
    used = (offsets.diff() > 0).nonzero().squeeze(1)
    first, last = offsets[used], offsets[used + 1] - 1
    if initial_state is not None:
        states = initial_state.to(wide).unsqueeze(axis)
        inputs = inputs.index_add(1, first, decay[:, first] * states[:, used])
    h = _Scan.apply(decay.index_fill(1, first, 0.0), inputs)
    if not output_final_state:
        return h.to(x.dtype), None
    if initial_state is None:
        states = inputs.new_zeros(x.shape[0], len(offsets) - 1, x.shape[2])
    final = states.index_copy(1, used, h[:, last]).squeeze(axis)
    return h.to(x.dtype), final.to(x.dtype)


class _Scan(torch.autograd.Function):
    """h_t = decay_t h_{t-1} + x_t over [B, T, D] from h_0 = 0."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, x: Tensor) -> Tensor:
        h = torch.empty_like(x)
        _scan(decay.unbind(1), x.unbind(1), h.unbind(1))
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor, Tensor]:
        decay, h = ctx.saved_tensors
        # The gradient runs the same recurrence from the end, each step by the decay after it.
        grad_x = torch.empty_like(h)
        after = decay.roll(-1, dims=1)
        _scan(after.unbind(1)[::-1], grad_h.unbind(1)[::-1], grad_x.unbind(1)[::-1])
        grad_decay = torch.zeros_like(decay)
        torch.mul(grad_x[:, 1:], h[:, :-1], out=grad_decay[:, 1:])
        return grad_decay, grad_x


def _scan(decay: Sequence[Tensor], x: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    if not out:
        return
    h = torch.zeros_like(out[0])
    for a, b, o in zip(decay, x, out, strict=True):
        torch.addcmul(b, a, h, out=o)
        h = o
