"""Our ops with the names, arguments and results of the kernels that transformers' models call.

A model calls them with whatever keywords it was itself called with, so that each takes any. Lengths
of packed sequences come as `cu_seqlens`, as `cu_seq_lens_q`, or as `seq_idx` [B, T].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from fastweights.ops import _common
from fastweights.ops.causal_conv1d import functional as conv
from fastweights.ops.delta_rule.functional import delta_rule, delta_rule_step
from fastweights.ops.norms.functional import gated_rms_norm


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **unknown: Any,
) -> Tensor:
    """The convolution of x [B, D, T]; where T leads in memory it does in the result, else D."""
    length = hidden_states.shape[-1]
    offsets = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
    # With a cache x begins with columns from there, which belong to the first sequence.
    if offsets is not None:
        offsets = torch.cat([offsets[:1], offsets[1:] + (length - offsets[-1:])])
        seq_idx = None
    elif seq_idx is not None and seq_idx.shape[-1] < length:
        first = seq_idx[:, :1].expand(-1, length - seq_idx.shape[-1])
        seq_idx = torch.cat([first, seq_idx], -1)
    fused, after = _activations(activation)
    y, _ = conv.causal_conv1d(
        hidden_states.transpose(1, 2),
        weight,
        bias,
        activation=fused,
        seq_idx=seq_idx,
        cu_seqlens=offsets,
    )
    return after(y.transpose(1, 2))


def causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **unknown: Any,
) -> Tensor:
    """The next tokens of x [B, D, L]; `conv_state` [B, D, S >= W - 1] moves on in place."""
    fused, after = _activations(activation)
    x = hidden_states.transpose(1, 2).to(conv_state.dtype)
    if torch.is_grad_enabled():
        y, state = conv.causal_conv1d(
            x,
            weight,
            bias,
            activation=fused,
            initial_state=conv_state.clone(),  # the backward needs it as it was
            output_final_state=True,
        )
        assert state is not None
        conv_state.copy_(state)
    else:
        y = conv.causal_conv1d_update(x, weight, bias, state=conv_state, activation=fused)
    return after(y.transpose(1, 2)).to(hidden_states.dtype)


def _activations(name: str | None) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """What the op applies, and what is applied to its result."""
    if name in (None, "silu", "swish"):
        return name, lambda y: y
    return None, ACT2FN[name]


def chunk_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **unknown: Any,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule with a gate per token, or per channel. `chunk_size` is our own affair."""
    offsets = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
    if offsets is None and seq_idx is not None:
        # A decay to nothing is what separates sequences, in any number of rows.
        begins = torch.zeros_like(seq_idx, dtype=torch.bool)
        begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        g = g.masked_fill(begins.reshape(begins.shape + (1,) * (g.dim() - 2)), -torch.inf)
    if initial_state is not None:
        # A cache writes the final state into the tensor that the backward still needs.
        initial_state = initial_state.to(
            _common.state_dtype(query.dtype), copy=torch.is_grad_enabled()
        )
    return delta_rule(
        query,
        key,
        value,
        g=g,
        beta=beta,
        qk_l2norm=use_qk_l2norm_in_kernel,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=offsets,
    )


def recurrent_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **sequences: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same; of one token `initial_state` is updated in place and returned.

    It is the tensor in the cache, into which the model copies what it gets.
    """
    state = initial_state
    if (
        state is None
        or not output_final_state
        or query.shape[1] != 1
        or torch.is_grad_enabled()
        or state.dtype != _common.state_dtype(query.dtype)
        or state.stride(-1) != 1
        or state.shape[0] != query.shape[0]
    ):
        return chunk_delta_rule(
            query,
            key,
            value,
            g,
            beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            **sequences,
        )
    o = delta_rule_step(
        query[:, 0],
        key[:, 0],
        value[:, 0],
        g=g[:, 0],
        beta=beta[:, 0],
        state=state,
        qk_l2norm=use_qk_l2norm_in_kernel,
    )
    return o.unsqueeze(1), state


def gated_norm(module: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """`forward` of the norms that come before a gate."""
    return gated_rms_norm(
        hidden_states,
        gate.to(hidden_states.dtype),
        module.weight,
        activation=module.activation,
        eps=module.variance_epsilon,
    )


# Under the names by which transformers asks for a kernel.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "chunk_gated_delta_rule": chunk_delta_rule,
    "chunk_kda": chunk_delta_rule,
    "fused_recurrent_gated_delta_rule": recurrent_delta_rule,
    "fused_recurrent_kda": recurrent_delta_rule,
}
