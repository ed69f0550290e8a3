"""Linear attention: the public functions and what torch must know about their ops."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastweights import _load  # noqa: F401  (defines torch.ops.fastweights)
from fastweights.ops import _common
from fastweights.ops.linear_attention import reference

State = Tensor | tuple[Tensor, Tensor]
Form = Literal["auto", "recurrent", "chunked"]

_SEGMENT = 64  # tokens between two stored states: kSegment in csrc/core/recurrence.h


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    initial_state: State | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    _form: Form = "auto",
) -> tuple[Tensor, State | None]:
    r"""Causal linear attention with an optional decay, in time linear in T.

    .. math::
        S_t = \mathrm{diag}(e^{g_t}) S_{t-1} + k_t v_t^\top, \qquad
        o_t = \mathrm{scale} \cdot S_t^\top q_t

    With ``normalize`` the output is divided by
    :math:`\mathrm{scale} \cdot q_t^\top z_t + \mathrm{eps}`, where
    :math:`z_t = e^{g_t} \odot z_{t-1} + k_t` (Katharopoulos et al. 2020, arXiv:2006.16236,
    eq. 18-20). With ``g`` per head it is RetNet (arXiv:2307.08621, eq. 6), per token and head the
    scalar gate of Mamba-2, per channel GLA (arXiv:2312.06635, eq. 3). Feature maps are applied by
    the caller.

    Args:
        q: queries [B, T, H, K]; float32, bfloat16, float16 or float64. Any strides whose last
            dimension is contiguous are read without a copy, here and in k, v and g.
        k: keys [B, T, H, K], q's dtype.
        v: values [B, T, HV, V], q's dtype; HV is a multiple of H and value head h reads query and
            key head h // (HV / H).
        g: natural-log decay, at most 0: None, [HV], [B, T, HV] or [B, T, HV, K]; any floating
            dtype. -inf resets the state exactly; NaN propagates.
        scale: factor of q; None means K ** -0.5.
        normalize: divide by the decayed sum of the weights.
        eps: added to the denominator.
        initial_state: state before the first token, [N, HV, K, V], float32 (float64 for float64
            inputs), N = B without ``cu_seqlens``; zeros by default. With ``normalize`` the pair
            (S, z) with z [N, HV, K], or S alone (z is 0).
        output_final_state: also return the state after the last token.
        state_v_first: states are [N, HV, V, K].
        reverse: run from the last token to the first; the final state is that after token 0.
        cu_seqlens: int32 or int64 [N + 1], B = 1: sequence n is tokens cu_seqlens[n] to
            cu_seqlens[n + 1] - 1. An empty sequence returns its initial state.

    Returns:
        o [B, T, HV, V] in q's dtype, and the final state in float32 (float64 for float64 inputs;
        the pair (S, z) with ``normalize``), or None.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; the message says which.
        TypeError: an initial state that is a pair without ``normalize``.
        NotImplementedError: forward-mode differentiation or double backward; use
            `fastweights.reference.linear_attention`.

    Time is O(B T HV K V) and memory O(B HV K V) besides inputs and outputs; when a gradient is
    recorded, one state per 64 tokens is kept. Results are the same bits for any number of threads.
    Gradients reach q, k, v, g and the initial state, also through the final state.

    Example:
        >>> q = torch.rand(1, 128, 4, 32)
        >>> k, v = torch.rand(1, 128, 4, 32), torch.rand(1, 128, 4, 64)
        >>> o, state = linear_attention(q, k, v, normalize=True, output_final_state=True)
        >>> o.shape, state[0].shape, state[1].shape
        (torch.Size([1, 128, 4, 64]), torch.Size([1, 4, 32, 64]), torch.Size([1, 4, 32]))
    """
    S, z = _split(initial_state, normalize)
    _common.refuse_forward_ad("linear_attention", q, k, v, g, S, z)
    if _common.needs_reference(q, k, v):
        return reference.linear_attention(
            q,
            k,
            v,
            g,
            scale=scale,
            normalize=normalize,
            eps=eps,
            initial_state=initial_state,
            output_final_state=output_final_state,
            state_v_first=state_v_first,
            reverse=reverse,
            cu_seqlens=cu_seqlens,
        )
    differentiated = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, g, S, z)
    )
    o, S, z, _ = torch.ops.fastweights.linear_attention(
        q,
        k,
        v,
        g,
        S,
        z,
        cu_seqlens,
        scale=_common.default_scale(q, scale),
        normalize=normalize,
        eps=eps,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        reverse=reverse,
        keep_states=differentiated,
        form=_form,
    )
    if not output_final_state:
        return o, None
    return o, (S, z) if normalize else S


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    state: State,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """One token of `linear_attention` for every head; ``state`` is updated in place.

    Args:
        q: queries [B, H, K].
        k: keys [B, H, K], q's dtype.
        v: values [B, HV, V], q's dtype.
        g: natural-log decay: None, [HV], [B, HV] or [B, HV, K].
        state: S [B, HV, K, V], float32 (float64 for float64 inputs), its last dimension contiguous;
            with ``normalize`` the pair (S, z) with z [B, HV, K].
        scale: factor of q; None means K ** -0.5.
        normalize: divide by the decayed sum of the weights.
        eps: added to the denominator.

    Returns:
        o [B, HV, V] in q's dtype: the only memory that is allocated.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; the message says which.
        TypeError: a state that is a pair without ``normalize``, or no pair with it.
        NotImplementedError: an input that requires a gradient; use `linear_attention`.

    Example:
        >>> state = torch.zeros(1, 4, 32, 64)
        >>> q, k, v = torch.rand(1, 4, 32), torch.rand(1, 4, 32), torch.rand(1, 4, 64)
        >>> linear_attention_step(q, k, v, state=state).shape
        torch.Size([1, 4, 64])
    """
    if normalize != isinstance(state, tuple):
        rule = "the pair (S, z) with normalize" if normalize else "a tensor without normalize"
        raise TypeError(
            f"linear_attention_step: expected state to be {rule}, got {type(state).__name__}"
        )
    S, z = _split(state, normalize)
    _common.refuse_forward_ad("linear_attention_step", q, k, v, g, S, z)
    if _common.needs_reference(q, k, v):
        return reference.linear_attention_step(
            q, k, v, g, state=state, scale=scale, normalize=normalize, eps=eps
        )
    o: Tensor = torch.ops.fastweights.linear_attention_step(
        q, k, v, g, S, z, scale=_common.default_scale(q, scale), eps=eps
    )
    return o


def _split(state: State | None, normalize: bool) -> tuple[Tensor | None, Tensor | None]:
    if not isinstance(state, tuple):
        return state, None
    if not normalize:
        raise TypeError(
            "linear_attention: expected initial_state to be a tensor without normalize, got a tuple"
        )
    S, z = state
    return S, z


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    initial_z: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    normalize: bool,
    eps: float,
    output_final_state: bool,
    state_v_first: bool,
    reverse: bool,
    keep_states: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, _, K = q.shape
    HV, V = v.shape[2], v.shape[3]
    N = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = _common.state_dtype(q.dtype)
    state_shape = (N, HV, V, K) if state_v_first else (N, HV, K, V)
    final = q.new_empty(state_shape if output_final_state else (0,), dtype=dtype)
    z_shape = (N, HV, K) if output_final_state and normalize else (0,)
    segments = (batch * length) // _SEGMENT + N
    states_shape = (segments, HV, K, V + normalize) if keep_states else (0,)
    return (
        q.new_empty(v.shape),
        final,
        q.new_empty(z_shape, dtype=dtype),
        q.new_empty(states_shape, dtype=dtype),
    )


def _backward_fake(
    grad_o: Tensor,
    grad_state: Tensor | None,
    grad_z: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    o: Tensor | None,
    initial_state: Tensor | None,
    initial_z: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    **options: Any,
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty((0,)) if x is None else x.new_empty(x.shape)

    return like(q), like(k), like(v), like(g), like(initial_state), like(initial_z)


def _step_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    z: Tensor | None,
    *,
    scale: float,
    eps: float,
) -> Tensor:
    return q.new_empty(v.shape)


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    q, k, v, g, initial_state, initial_z, cu_seqlens = inputs
    o, _, _, states = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(states)
    names = ("scale", "normalize", "eps", "state_v_first", "reverse", "form")
    ctx.options = {name: keyword_only_inputs[name] for name in names}
    ctx.returns_state = keyword_only_inputs["output_final_state"]
    ctx.save_for_backward(
        q,
        k,
        v,
        g,
        o if ctx.options["normalize"] else None,
        initial_state,
        initial_z,
        cu_seqlens,
        states,
    )


def _backward(
    ctx: Any, grad_o: Tensor | None, grad_state: Tensor | None, grad_z: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    q, k, v, g, o, initial_state, initial_z, cu_seqlens, states = ctx.saved_tensors
    inputs = (q, k, v, g, initial_state, initial_z)
    grads = torch.ops.fastweights.linear_attention_backward(
        v.new_zeros(v.shape) if grad_o is None else grad_o,
        grad_state if ctx.returns_state else None,
        grad_z if ctx.returns_state and ctx.options["normalize"] else None,
        q,
        k,
        v,
        g,
        o,
        initial_state,
        initial_z,
        cu_seqlens,
        states,
        **ctx.options,
    )
    return (
        *(None if x is None else grad for x, grad in zip(inputs, grads, strict=True)),
        None,
    )


torch.library.register_fake("fastweights::linear_attention", _fake)
torch.library.register_fake("fastweights::linear_attention_backward", _backward_fake)
torch.library.register_fake("fastweights::linear_attention_step", _step_fake)
torch.library.register_autograd(
    "fastweights::linear_attention", _backward, setup_context=_setup_context
)
_common.refuse_double_backward("linear_attention")
_common.refuse_gradients("linear_attention_step")

_common.autocast_qkv("linear_attention")
_common.autocast_qkv("linear_attention_step")
