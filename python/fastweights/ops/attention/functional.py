"""Window and hybrid attention: the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastweights import _load as _load
from fastweights.ops._common import (
    needs_reference,
    refuse_double_backward,
    refuse_forward_ad,
    refuse_gradients,
)
from fastweights.ops.attention import reference
from fastweights.ops.attention.state import (
    HybridState,
    Layout,
    per_channel,
    state_after,
    state_dtype,
)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over a sliding window, in time and memory O(T · window).

    `o_i = Σ_j softmax_j(scale · q_i · k_j) v_j` over the `window` latest keys, i itself included:
    `i − window < j <= i`; with `causal=False` also over their mirror image, `|i − j| < window`.
    A window of at least T is full attention.

    Args:
        q: `[B, T, HQ, K]`, float32, bfloat16, float16 or float64.
        k: `[B, T, HKV, K]`; query head h reads key head h // (HQ / HKV).
        v: `[B, T, HKV, V]`.
        window: number of keys, at least 1.
        causal: whether later keys are hidden.
        scale: factor of the scores; None is K^-0.5.
        return_lse: also return the logarithm (natural) of each row's sum of exponentials.
        cu_seqlens: int32 or int64 `[N + 1]`, ascending from 0 to T: packed sequences; needs B = 1.

    Returns:
        o `[B, T, HQ, V]` in q's dtype, and with `return_lse` lse `[B, T, HQ]` in float32 (float64
        for float64 inputs). Both are differentiable.

    Raises:
        RuntimeError: shapes, dtypes, devices or lengths that do not fit.

    Example:
        >>> import torch, fastweights as fw
        >>> q, k, v = torch.randn(3, 1, 1000, 4, 64)
        >>> fw.functional.window_attention(q, k, v, window=128).shape
        torch.Size([1, 1000, 4, 64])
    """
    refuse_forward_ad("window_attention", q, k, v)
    if needs_reference(q, k, v):
        return reference.window_attention(
            q, k, v, window=window, causal=causal, scale=scale, return_lse=return_lse,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
    o, lse = torch.ops.fastweights.window_attention(
        q, k, v, cu_seqlens, window=window, causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale, return_lse=return_lse,
    )  # fmt: skip
    return (o, lse) if return_lse else o


def _window_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, return_lse: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=state_dtype(q.dtype))
    return q.new_empty(*q.shape[:3], v.shape[-1]), lse


def _window_backward_fake(
    grad_o: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _window_setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = dict(keyword_only_inputs)
    ctx.set_materialize_grads(False)


def _window_backward(ctx: Any, grad_o: Tensor | None, grad_lse: Tensor | None) -> Any:
    q, k, v, cu_seqlens = ctx.saved_tensors
    options = dict(ctx.options)
    if not options.pop("return_lse"):
        grad_lse = None
    if grad_o is None:
        grad_o = q.new_zeros(*q.shape[:3], v.shape[-1])
    grads = torch.ops.fastweights.window_attention_backward(
        grad_o, grad_lse, q, k, v, cu_seqlens, **options
    )
    return *grads, None


torch.library.register_fake("fastweights::window_attention", _window_fake)
torch.library.register_fake("fastweights::window_attention_backward", _window_backward_fake)
torch.library.register_autograd(
    "fastweights::window_attention", _window_backward, setup_context=_window_setup
)
refuse_double_backward("window_attention")


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qf: Tensor,
    kf: Tensor,
    mix: Tensor,
    g: Tensor | None = None,
    *,
    window: int,
    layout: Layout = "sliding",
    scale: float | None = None,
    sink: Tensor | None = None,
    initial_state: HybridState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, HybridState | None]:
    """Softmax over a window and linear attention over everything before it, in one normaliser.

    LoLCATs (2024) with an optional decay and sink. With `s_ij = scale · q_i · k_j` and `m_i` its
    maximum over the window W_i and the sink, `o_i = N_i / D_i`, where

        a_ij = Σ_f d_ijf qf_if kf_jf
        N_i = mix · Σ_{j in W_i} exp(s_ij − m_i) v_j  +  Σ_{j before W_i} a_ij v_j
        D_i = mix · (exp(sink_i − m_i) + Σ_{j in W_i} exp(s_ij − m_i))  +  Σ_{j before W_i} a_ij

    The sink is the score of one more key of the window, whose value is zero; without it its term is
    missing. `m_i` is subtracted in the softmax part only, so it changes the balance of the two, and
    gradients flow through it. `d_ijf` decays a key from the moment it leaves the window, at query
    l(j): `d_ijf = exp(Σ_{l(j) < t <= i} g_tf)`, where most g are the same for every f or every t.

    Layouts. "sliding": W_i holds the `window` latest keys, l(j) = j + window. "terraced": positions
    are cut in blocks of `window` from the start of the sequence; W_i is the block of i up to i and
    the block before, l(j) = (j // window + 2) · window.

    Time O(T · (window (K + V) + F V)), memory O(T).

    Args:
        q: `[B, T, HQ, K]`, float32, bfloat16, float16 or float64.
        k: `[B, T, HKV, K]`; query head h reads key head h // (HQ / HKV).
        v: `[B, T, HKV, V]`.
        qf: `[B, T, HQ, F]`, features of the queries, meant to be non-negative.
        kf: `[B, T, HKV or HQ, F]`, features of the keys, meant to be non-negative.
        mix: `[HQ]`, the weight of the softmax part: a gate in (0, 1], already squashed. As it goes
            to 0, rows with a linear part become linear attention over it.
        g: natural-log decays `<= 0`: None, `[HKV or HQ]` (the same at every token),
            `[HKV or HQ, F]` (one per channel of the features, the same at every token) or
            `[B, T, HKV or HQ]`. −inf forgets everything that left the window before.
        window: number of keys, at least 1.
        layout: "sliding" or "terraced".
        scale: factor of the scores; None is K^-0.5.
        sink: `[B, T, HQ]`, the score of one more key of the window, whose value is zero: where
            attention goes that no key deserves. None is no such key.
        initial_state: continue from this state instead of an empty past.
        output_final_state: also return the state after the last token.
        cu_seqlens: int32 or int64 `[N + 1]`, ascending from 0 to T: packed sequences; needs B = 1.
            The states then have N rows.

    Returns:
        o `[B, T, HQ, V]` in q's dtype, and a `HybridState` or None. Everything is differentiable,
        the states included.

    Raises:
        RuntimeError: shapes, dtypes, devices or lengths that do not fit.
        ValueError: an unknown layout.

    Example:
        >>> import torch, fastweights as fw
        >>> q, k, v = torch.randn(3, 1, 300, 4, 64)
        >>> qf, kf = torch.rand(2, 1, 300, 4, 32)
        >>> mix = torch.full((4,), 0.5)
        >>> o, state = fw.hybrid_attention(q, k, v, qf, kf, mix, window=64, output_final_state=True)
        >>> o.shape, state.S.shape
        (torch.Size([1, 300, 4, 64]), torch.Size([1, 4, 32, 64]))
    """
    if layout not in ("sliding", "terraced"):
        raise ValueError(
            f"hybrid_attention: expected layout 'sliding' or 'terraced', got {layout!r}"
        )
    past = (None,) * 6 if initial_state is None else initial_state.tensors()
    refuse_forward_ad("hybrid_attention", q, k, v, qf, kf, mix, g, sink, *past)
    if needs_reference(q, k, v, qf, kf, mix, g, sink):
        return reference.hybrid_attention(
            q, k, v, qf, kf, mix, g, window=window, layout=layout, scale=scale, sink=sink,
            initial_state=initial_state, output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
    dtype = state_dtype(q.dtype)
    o, S, z = torch.ops.fastweights.hybrid_attention(
        q, k, v, qf, kf, mix.to(dtype), None if g is None else g.to(dtype),
        None if sink is None else sink.to(dtype), *past, cu_seqlens,
        window=window, terraced=layout == "terraced",
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        output_final_state=output_final_state,
    )  # fmt: skip
    if not output_final_state:
        return o, None
    return o, state_after(k, v, kf, S, z, initial_state, window, layout, cu_seqlens)


def _state_heads(kf: Tensor, g: Tensor | None) -> int:
    if g is None:
        return kf.shape[2]
    return max(kf.shape[2], g.shape[0] if g.dim() == 2 else g.shape[-1])


def _hybrid_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qf: Tensor,
    kf: Tensor,
    mix: Tensor,
    g: Tensor | None,
    sink: Tensor | None,
    k_ring: Tensor | None,
    v_ring: Tensor | None,
    kf_ring: Tensor | None,
    S0: Tensor | None,
    z0: Tensor | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    output_final_state: bool,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    if not output_final_state:
        return o, mix.new_empty(0), mix.new_empty(0)
    heads = _state_heads(kf, g)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    features = qf.shape[-1]
    S = mix.new_empty(rows, heads, features, v.shape[-1])
    return o, S, mix.new_empty(rows, heads, features)


def _hybrid_backward_fake(
    grad_o: Tensor, grad_S: Tensor | None, grad_z: Tensor | None, *inputs: Tensor | None, **_: Any
) -> tuple[Tensor, ...]:
    """A gradient for every input from q to z0, empty and of mix's dtype where it is absent."""
    mix = inputs[5]
    assert mix is not None
    return tuple(mix.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:13])


def _hybrid_setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = dict(keyword_only_inputs)
    ctx.set_materialize_grads(False)


def _hybrid_backward(
    ctx: Any, grad_o: Tensor | None, grad_S: Tensor | None, grad_z: Tensor | None
) -> Any:
    q, k, v, qf, kf, mix, g, sink, *past, position, cu_seqlens = ctx.saved_tensors
    options = dict(ctx.options)
    if not options.pop("output_final_state"):
        grad_S = grad_z = None
    elif grad_S is not None or grad_z is not None:
        heads = _state_heads(kf, g)
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (rows, heads, qf.shape[-1], v.shape[-1])
        grad_S = mix.new_zeros(shape) if grad_S is None else grad_S
        grad_z = mix.new_zeros(shape[:3]) if grad_z is None else grad_z
    if grad_o is None:
        grad_o = q.new_zeros(*q.shape[:3], v.shape[-1])
    grads = torch.ops.fastweights.hybrid_attention_backward(
        grad_o, grad_S, grad_z, q, k, v, qf, kf, mix, g, sink, *past, position, cu_seqlens,
        **options,
    )  # fmt: skip
    inputs = (q, k, v, qf, kf, mix, g, sink, *past)
    wanted = [None if x is None else grad for x, grad in zip(inputs, grads, strict=True)]
    return *wanted, None, None


torch.library.register_fake("fastweights::hybrid_attention", _hybrid_fake)
torch.library.register_fake("fastweights::hybrid_attention_backward", _hybrid_backward_fake)
torch.library.register_autograd(
    "fastweights::hybrid_attention", _hybrid_backward, setup_context=_hybrid_setup
)
refuse_double_backward("hybrid_attention")


def hybrid_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qf: Tensor,
    kf: Tensor,
    mix: Tensor,
    g: Tensor | None = None,
    *,
    state: HybridState,
    window: int,
    scale: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """`hybrid_attention` for one token; `state` is updated in place.

    The layout is that of the state: rings of `window` tokens slide, rings of 2 `window` are
    terraced. The rows of a batch may be at different positions. Time O(window (K + V) + F V) per
    head (plus `window · F V` at a block's first token when terraced), no memory but o's.

    Args:
        q: `[B, HQ, K]`; k, v, qf, kf likewise lack the T of `hybrid_attention`.
        k: `[B, HKV, K]`.
        v: `[B, HKV, V]`.
        qf: `[B, HQ, F]`.
        kf: `[B, HKV or HQ, F]`.
        mix: `[HQ]`.
        g: None, `[HKV or HQ]`, `[HKV or HQ, F]` or `[B, HKV or HQ]`; a shape that fits both of the
            latter is per channel.
        state: from `hybrid_attention(..., output_final_state=True)` or `HybridState.zeros`.
        window: number of keys.
        scale: factor of the scores; None is K^-0.5.
        sink: `[B, HQ]`, see `hybrid_attention`.

    Returns:
        o `[B, HQ, V]`.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, or an input that requires a gradient.
    """
    refuse_forward_ad("hybrid_attention_step", q, k, v, qf, kf, mix, g, sink, *state.tensors())
    if needs_reference(q, k, v, qf, kf, mix, g, sink):
        return reference.hybrid_attention_step(
            q, k, v, qf, kf, mix, g, state=state, window=window, scale=scale, sink=sink
        )
    dtype = state_dtype(q.dtype)
    if g is not None and g.dim() == 2 and per_channel(g, k, qf):
        g = g[None]
    return torch.ops.fastweights.hybrid_attention_step(  # type: ignore[no-any-return]
        q, k, v, qf, kf, mix.to(dtype), None if g is None else g.to(dtype),
        None if sink is None else sink.to(dtype), *state.tensors(),
        window=window, scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )  # fmt: skip


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[-1])


torch.library.register_fake("fastweights::hybrid_attention_step", _step_fake)
refuse_gradients("hybrid_attention_step")


def _autocast(op: str, count: int) -> None:
    """Under CPU autocast the first `count` arguments go to its dtype; gates and states stay."""
    overload = getattr(torch.ops.fastweights, op).default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def cast(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("cpu")
        tokens = [x if x.dtype == torch.float64 else x.to(dtype) for x in args[:count]]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*tokens, *args[count:], **kwargs)

    torch.library.impl(f"fastweights::{op}", "AutocastCPU", cast)


_autocast("window_attention", 3)
_autocast("hybrid_attention", 5)
_autocast("hybrid_attention_step", 5)
