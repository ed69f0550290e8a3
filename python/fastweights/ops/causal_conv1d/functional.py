"""Causal depthwise convolution: the public functions and what torch must know about their ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastweights import _load  # noqa: F401  (defines torch.ops.fastweights)
from fastweights.ops import _common
from fastweights.ops.causal_conv1d import reference
from fastweights.ops.causal_conv1d.reference import Activation


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Short causal convolution over time, each channel with its own taps.

    .. math::
        y_t = \mathrm{act}\Big(\mathrm{bias} + \sum_{w=0}^{W-1} \mathrm{weight}_w
        \odot x_{t-W+1+w}\Big) + \mathrm{residual}_t

    Before the first token there is ``initial_state``, or zero. It is the short convolution of Mamba
    (arXiv:2312.00752, section 3.4), DeltaNet and their successors.

    Args:
        x: [B, T, D]; float32, bfloat16, float16 or float64. Read without a copy if its last
            dimension is contiguous, or its time: for [B, D, T] pass ``x.transpose(1, 2)``. The
            result has the same memory order.
        weight: taps [D, W], the latest token's last, W >= 1; any floating dtype. Sums are in
            float32 (float64 for float64 x), whatever x and weight are.
        bias: [D], any floating dtype.
        activation: None or "silu" (also "swish"), before the residual.
        residual: [B, T, D] in x's dtype, added to the result.
        initial_state: the latest S >= W - 1 inputs before the first token, the last one last:
            [N, D, S] in x's dtype, N = B without ``cu_seqlens``.
        output_final_state: also return the latest inputs after the last token; S is that of
            ``initial_state``, else W - 1.
        seq_idx: int32 or int64 [B, T]: where it changes along time, another sequence begins, which
            sees nothing of what was before. The initial state belongs to the first sequence of a
            batch entry, the final state to the last.
        cu_seqlens: int32 or int64 [N + 1], B = 1: sequence n is tokens cu_seqlens[n] to
            cu_seqlens[n + 1] - 1. An empty sequence returns its initial state.

    Returns:
        y [B, T, D] in x's dtype, and the final state [N, D, S] in x's dtype, or None.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; the message says which.
        ValueError: another activation.
        NotImplementedError: forward-mode differentiation or double backward; use
            `fastweights.reference.causal_conv1d`.

    Time is O(B T D W); memory besides inputs and outputs is O(D W), in the backward 1 / 128 of x.
    Results are the same bits for any number of threads. Gradients reach x, weight, bias, residual
    and the initial state, also through the final state.

    Example:
        >>> x, weight = torch.rand(1, 128, 64), torch.rand(64, 4)
        >>> y, state = causal_conv1d(x, weight, activation="silu", output_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([1, 128, 64]), torch.Size([1, 64, 3]))
    """
    _common.refuse_forward_ad("causal_conv1d", x, weight, bias, residual, initial_state)
    name = _activation("causal_conv1d", activation)
    if _common.needs_reference(x, weight):
        return reference.causal_conv1d(
            x,
            weight,
            bias,
            activation=activation,
            residual=residual,
            initial_state=initial_state,
            output_final_state=output_final_state,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
        )
    y, state = torch.ops.fastweights.causal_conv1d(
        x,
        weight,
        bias,
        residual,
        initial_state,
        seq_idx,
        cu_seqlens,
        activation=name,
        output_final_state=output_final_state,
    )
    return y, state if output_final_state else None


def causal_conv1d_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor,
    activation: Activation = None,
    residual: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next token, or tokens, of `causal_conv1d`; ``state`` is updated in place.

    Args:
        x: [B, D], or [B, L, D] for L tokens.
        weight: taps [D, W].
        bias: [D].
        state: the latest S >= W - 1 inputs [B, D, S] in x's dtype, any strides; it moves on by the
            tokens of x.
        activation: None or "silu" (also "swish").
        residual: of x's shape and dtype, added to the result.
        cache_seqlens: int32 or int64 [B], how many tokens came before those of x. The state is
            then a ring: token number t is kept in slot t mod S, and no other slot changes. Zeros
            are the state before the first token. The caller counts on.
        conv_state_indices: int32 or int64 [B]: entry b continues row conv_state_indices[b] of
            ``state`` [N, D, S], N of any size; the other rows stay as they are. All differ.

    Returns:
        y, of x's shape and dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, a negative number of tokens, rows
            that do not exist or are given twice; the message says which.
        ValueError: another activation.
        NotImplementedError: an input that requires a gradient; use `causal_conv1d`.

    Example:
        >>> state = torch.zeros(1, 64, 3)
        >>> causal_conv1d_update(torch.rand(1, 64), torch.rand(64, 4), state=state).shape
        torch.Size([1, 64])

        Two of the eight sequences that a server holds:

        >>> states, rows, seen = torch.zeros(8, 64, 3), torch.tensor([5, 2]), torch.tensor([0, 0])
        >>> for token in torch.rand(4, 2, 64):
        ...     y = causal_conv1d_update(
        ...         token,
        ...         torch.rand(64, 4),
        ...         state=states,
        ...         cache_seqlens=seen,
        ...         conv_state_indices=rows,
        ...     )
        ...     seen += 1
    """
    _common.refuse_forward_ad("causal_conv1d_update", x, weight, bias, residual, state)
    name = _activation("causal_conv1d_update", activation)
    if _common.needs_reference(x, weight):
        return reference.causal_conv1d_update(
            x,
            weight,
            bias,
            state=state,
            activation=activation,
            residual=residual,
            cache_seqlens=cache_seqlens,
            conv_state_indices=conv_state_indices,
        )
    y: Tensor = torch.ops.fastweights.causal_conv1d_update(
        x, weight, bias, residual, state, cache_seqlens, conv_state_indices, activation=name
    )
    return y


def _activation(op: str, activation: Activation) -> str:
    if activation is None:
        return "none"
    if activation in ("silu", "swish"):
        return "silu"
    raise ValueError(f"{op}: expected activation None, 'silu' or 'swish', got {activation!r}")


def _new_like(x: Tensor) -> Tensor:
    """A tensor of x's shape in the memory order that the op gives it.

    A size or stride that only the data tells counts as larger than 1. Should it be 1 after all, T
    or D is, and both orders are the same memory.
    """
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # slow to import

    batch, length, channels = x.shape
    rows = guard_or_false(channels > 1) and guard_or_false(x.stride(2) == 1)
    if guard_or_false(x.stride(1) == 1) and not rows:
        return x.new_empty((batch, channels, length)).transpose(1, 2)
    return x.new_empty((batch, length, channels))


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    if not output_final_state:
        return _new_like(x), x.new_empty((0,))
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kept = weight.shape[1] - 1 if initial_state is None else initial_state.shape[2]
    return _new_like(x), x.new_empty((sequences, x.shape[2], kept))


def _backward_fake(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
) -> tuple[Tensor, ...]:
    def like(t: Tensor | None) -> Tensor:
        return x.new_empty((0,)) if t is None else t.new_empty(t.shape)

    return _new_like(x), like(weight), like(bias), like(initial_state)


def _update_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    state: Tensor,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    *,
    activation: str,
) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    x, weight, bias, residual, initial_state, seq_idx, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.activation = keyword_only_inputs["activation"]
    ctx.adds_residual = residual is not None
    ctx.returns_state = keyword_only_inputs["output_final_state"]
    ctx.save_for_backward(x, weight, bias, initial_state, seq_idx, cu_seqlens)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state, seq_idx, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias, dstate = torch.ops.fastweights.causal_conv1d_backward(
        x.new_zeros(x.shape) if grad_y is None else grad_y,
        grad_state if ctx.returns_state else None,
        x,
        weight,
        bias,
        initial_state,
        seq_idx,
        cu_seqlens,
        activation=ctx.activation,
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        grad_y if ctx.adds_residual else None,
        None if initial_state is None else dstate,
        None,
        None,
    )


torch.library.register_fake("fastweights::causal_conv1d", _fake)
torch.library.register_fake("fastweights::causal_conv1d_backward", _backward_fake)
torch.library.register_fake("fastweights::causal_conv1d_update", _update_fake)
torch.library.register_autograd(
    "fastweights::causal_conv1d", _backward, setup_context=_setup_context
)
_common.refuse_double_backward("causal_conv1d")
_common.refuse_gradients("causal_conv1d_update")


def _autocast() -> None:
    """Under CPU autocast signals go to its dtype, in an update to that of the state."""
    autocast_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    forward = torch.ops.fastweights.causal_conv1d.default
    update = torch.ops.fastweights.causal_conv1d_update.default

    def to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return x if x is None or x.dtype == torch.float64 else x.to(dtype)

    def cast(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        initial_state: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        dtype = torch.get_autocast_dtype("cpu")
        signals = to(x, dtype), weight, bias, to(residual, dtype), to(initial_state, dtype)
        with torch._C._ExcludeDispatchKeyGuard(autocast_keys):
            return forward(*signals, *args, **kwargs)

    def cast_update(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        state: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        signals = to(x, state.dtype), weight, bias, to(residual, state.dtype), state
        with torch._C._ExcludeDispatchKeyGuard(autocast_keys):
            return update(*signals, *args, **kwargs)

    torch.library.impl("fastweights::causal_conv1d", "AutocastCPU", cast)
    torch.library.impl("fastweights::causal_conv1d_update", "AutocastCPU", cast_update)


_autocast()
