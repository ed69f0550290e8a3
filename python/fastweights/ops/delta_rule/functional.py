"""The delta rule: the public functions and what torch must know about their ops."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastweights import _load  # noqa: F401  (defines torch.ops.fastweights)
from fastweights.ops import _common
from fastweights.ops.delta_rule import reference

Form = Literal["auto", "recurrent", "chunked"]

_SEGMENT = 64  # tokens between two stored states: kSegment in csrc/core/recurrence.h


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    _form: Form = "auto",
) -> tuple[Tensor, Tensor | None]:
    r"""A linear-attention state that is corrected, not only added to, in time linear in T.

    .. math::
        S^-_t = \mathrm{diag}(e^{g_t}) S_{t-1}, \qquad
        d_t = \beta_t (w_t \odot v_t) - S_t^{-\top} \beta_t (b_t \odot k_t), \qquad
        S_t = S^-_t + k_t d_t^\top, \qquad
        o_t = \mathrm{scale} \cdot S_t^\top q_t

    Without ``g`` it is DeltaNet (Yang et al. 2024, arXiv:2406.06484, eq. 1-3), with ``g`` per
    token and head Gated DeltaNet (arXiv:2412.06464, eq. 10), per channel Kimi Delta Attention
    (arXiv:2510.26692), with an erase gate ``b`` and a write gate ``w`` GDN-2
    (arXiv:2605.22791). Gated DeltaProduct (arXiv:2502.10297) is the call on n tokens for every
    one: g on the first, q on the last.

    Args:
        q: queries [B, T, H, K]; float32, bfloat16, float16 or float64. Any strides whose last
            dimension is contiguous are read without a copy, here and in k, v, g, erase and write.
        k: keys [B, T, H, K], q's dtype.
        v: values [B, T, HV, V], q's dtype; HV is a multiple of H and value head h reads query and
            key head h // (HV / H).
        beta: step size [B, T, HV], any floating dtype; None is 1.
        g: natural-log decay, at most 0: None, [HV], [B, T, HV] or [B, T, HV, K]; any floating
            dtype. -inf resets the state exactly; NaN propagates.
        erase: factor b of the key that is read, [B, T, HV, K], any floating dtype; None is 1.
        write: factor w of the value, [B, T, HV, V], any floating dtype; None is 1.
        scale: factor of q; None means K ** -0.5.
        qk_l2norm: divide each q and k by sqrt(sum of squares + 1e-6) first.
        A_log: [HV]. With it g is raw and the decay is -exp(A_log) softplus(g + dt_bias).
        dt_bias: added to a raw g: [HV], or [HV, K] with a gate per channel; None is 0.
        lower_bound: with it g is raw and the decay is
            lower_bound sigmoid(exp(A_log) (g + dt_bias)); A_log None is 0.
        beta_sigmoid: beta is raw: its sigmoid is taken.
        allow_neg_eigval: twice that sigmoid, so that a key's component can change its sign.
        initial_state: state before the first token, [N, HV, K, V], float32 (float64 for float64
            inputs), N = B without ``cu_seqlens``; zeros by default.
        output_final_state: also return the state after the last token.
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: int32 or int64 [N + 1], B = 1: sequence n is tokens cu_seqlens[n] to
            cu_seqlens[n + 1] - 1. An empty sequence returns its initial state.

    Returns:
        o [B, T, HV, V] in q's dtype, and the final state in float32 (float64 for float64 inputs),
        or None.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; the message says which.
        ValueError: ``allow_neg_eigval`` without ``beta_sigmoid``.
        NotImplementedError: forward-mode differentiation or double backward; use
            `fastweights.reference.delta_rule`.

    The state stays bounded where \|1 - beta \|k\|^2\| <= 1: with ``qk_l2norm`` for beta in [0, 2].
    Elsewhere it may grow without bound, as the recurrence itself does.

    Time is O(B T HV K V) and memory O(B HV K V) besides inputs and outputs; when a gradient is
    recorded, one state per 64 tokens and d of every token are kept. Results are the same bits for
    any number of threads. Gradients reach every tensor but ``cu_seqlens``, also through the final
    state.

    Example:
        >>> q, k = torch.randn(1, 128, 4, 32), torch.randn(1, 128, 4, 32)
        >>> v, beta = torch.randn(1, 128, 4, 64), torch.rand(1, 128, 4)
        >>> o, state = delta_rule(q, k, v, beta=beta, qk_l2norm=True, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 128, 4, 64]), torch.Size([1, 4, 32, 64]))
    """
    tensors = (q, k, v, beta, g, erase, write, A_log, dt_bias, initial_state)
    _common.refuse_forward_ad("delta_rule", *tensors)
    beta_range = _beta_range("delta_rule", beta_sigmoid, allow_neg_eigval)
    if _common.needs_reference(q, k, v):
        return reference.delta_rule(
            q,
            k,
            v,
            beta=beta,
            g=g,
            erase=erase,
            write=write,
            scale=scale,
            qk_l2norm=qk_l2norm,
            A_log=A_log,
            dt_bias=dt_bias,
            lower_bound=lower_bound,
            beta_sigmoid=beta_sigmoid,
            allow_neg_eigval=allow_neg_eigval,
            initial_state=initial_state,
            output_final_state=output_final_state,
            state_v_first=state_v_first,
            cu_seqlens=cu_seqlens,
        )
    differentiated = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in tensors
    )
    o, state, *_ = torch.ops.fastweights.delta_rule(
        *tensors,
        cu_seqlens,
        scale=_common.default_scale(q, scale),
        qk_l2norm=qk_l2norm,
        lower_bound=lower_bound,
        beta_range=beta_range,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        keep_states=differentiated,
        form=_form,
    )
    return o, state if output_final_state else None


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    state: Tensor,
    scale: float | None = None,
    qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
) -> Tensor:
    """One token of `delta_rule` for every head; ``state`` is updated in place.

    Args:
        q: queries [B, H, K].
        k: keys [B, H, K], q's dtype.
        v: values [B, HV, V], q's dtype.
        beta: step size [B, HV]; None is 1.
        g: natural-log decay: None, [HV], [B, HV] or [B, HV, K].
        erase: factor of the key that is read [B, HV, K]; None is 1.
        write: factor of the value [B, HV, V]; None is 1.
        state: [B, HV, K, V], float32 (float64 for float64 inputs), its last dimension contiguous.
        scale: factor of q; None means K ** -0.5.
        qk_l2norm: divide q and k by their norms, as `delta_rule` does.
        A_log: [HV]; as in `delta_rule`.
        dt_bias: [HV], or [HV, K] with a gate per channel.
        lower_bound: as in `delta_rule`.
        beta_sigmoid: as in `delta_rule`.
        allow_neg_eigval: as in `delta_rule`.

    Returns:
        o [B, HV, V] in q's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; the message says which.
        ValueError: ``allow_neg_eigval`` without ``beta_sigmoid``.
        NotImplementedError: an input that requires a gradient; use `delta_rule`.

    Example:
        >>> state = torch.zeros(1, 4, 32, 64)
        >>> q, k, v = torch.randn(1, 4, 32), torch.randn(1, 4, 32), torch.randn(1, 4, 64)
        >>> delta_rule_step(q, k, v, state=state, qk_l2norm=True).shape
        torch.Size([1, 4, 64])
    """
    tensors = (q, k, v, beta, g, erase, write, A_log, dt_bias, state)
    _common.refuse_forward_ad("delta_rule_step", *tensors)
    beta_range = _beta_range("delta_rule_step", beta_sigmoid, allow_neg_eigval)
    if _common.needs_reference(q, k, v):
        return reference.delta_rule_step(
            q,
            k,
            v,
            beta=beta,
            g=g,
            erase=erase,
            write=write,
            state=state,
            scale=scale,
            qk_l2norm=qk_l2norm,
            A_log=A_log,
            dt_bias=dt_bias,
            lower_bound=lower_bound,
            beta_sigmoid=beta_sigmoid,
            allow_neg_eigval=allow_neg_eigval,
        )
    o: Tensor = torch.ops.fastweights.delta_rule_step(
        *tensors,
        scale=_common.default_scale(q, scale),
        qk_l2norm=qk_l2norm,
        lower_bound=lower_bound,
        beta_range=beta_range,
    )
    return o


def _beta_range(op: str, beta_sigmoid: bool, allow_neg_eigval: bool) -> float:
    """Beta is this times a sigmoid; 0: as given."""
    if allow_neg_eigval and not beta_sigmoid:
        raise ValueError(f"{op}: expected beta_sigmoid with allow_neg_eigval, got False")
    return float(beta_sigmoid) * (2.0 if allow_neg_eigval else 1.0)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    output_final_state: bool,
    state_v_first: bool,
    keep_states: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, _, K = q.shape
    HV, V = v.shape[2], v.shape[3]
    N = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = _common.state_dtype(q.dtype)
    state_shape = (N, HV, V, K) if state_v_first else (N, HV, K, V)
    slots = (batch * length) // _SEGMENT + N
    return (
        q.new_empty(v.shape),
        q.new_empty(state_shape if output_final_state else (0,), dtype=dtype),
        q.new_empty((slots, HV, K, V) if keep_states else (0,), dtype=dtype),
        q.new_empty(v.shape if keep_states else (0,), dtype=dtype),
    )


def _backward_fake(
    grad_o: Tensor, grad_state: Tensor | None, q: Tensor, *inputs: Tensor | None, **options: Any
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        dtype = _common.state_dtype(q.dtype)
        return q.new_empty((0,), dtype=dtype) if x is None else x.new_empty(x.shape)

    return tuple(like(x) for x in (q, *inputs[:9]))


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor | None, **options: Any) -> Tensor:
    return q.new_empty(v.shape)


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    names = ("scale", "qk_l2norm", "lower_bound", "beta_range", "state_v_first")
    ctx.options = {name: keyword_only_inputs[name] for name in names}
    ctx.returns_state = keyword_only_inputs["output_final_state"]
    ctx.save_for_backward(*inputs, *output[2:])


def _backward(
    ctx: Any, grad_o: Tensor | None, grad_state: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    *inputs, states, corrections = ctx.saved_tensors
    v = inputs[2]
    grads = torch.ops.fastweights.delta_rule_backward(
        v.new_zeros(v.shape) if grad_o is None else grad_o,
        grad_state if ctx.returns_state else None,
        *inputs,
        states,
        corrections,
        **ctx.options,
    )
    return (
        *(None if x is None else grad for x, grad in zip(inputs[:-1], grads, strict=True)),
        None,
    )


torch.library.register_fake("fastweights::delta_rule", _fake)
torch.library.register_fake("fastweights::delta_rule_backward", _backward_fake)
torch.library.register_fake("fastweights::delta_rule_step", _step_fake)
torch.library.register_autograd("fastweights::delta_rule", _backward, setup_context=_setup_context)
_common.refuse_double_backward("delta_rule")
_common.refuse_gradients("delta_rule_step")
_common.autocast_qkv("delta_rule")
_common.autocast_qkv("delta_rule_step")
