"""Token mixers whose normalised heads are gated by the input: RetNet and GLA.

The entry points are those of `layers.py`: forward, step, init_state.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fastweights.ops._mixers import check_mode
from fastweights.ops.linear_attention.decays import retention_log_decay
from fastweights.ops.linear_attention.functional import linear_attention, linear_attention_step
from fastweights.ops.linear_attention.heads import (
    MODES,
    PositionedState,
    ProjectedHeads,
    activation,
    single_tensor,
)
from fastweights.ops.linear_attention.positions import (
    final_positions,
    rotary,
    token_positions,
)
from fastweights.ops.norms.layers import RMSNorm, RMSNormGated

__all__ = ["GatedLinearAttention", "MultiScaleRetention"]


class _GatedOutput(ProjectedHeads):
    """The output of RetNet and GLA: a norm per head, a gate from the input, a projection."""

    def _build_output(
        self,
        use_output_gate: bool,
        gate_fn: str,
        elementwise_affine: bool,
        norm_eps: float,
        fuse_norm: bool,
    ) -> None:
        self.use_output_gate = use_output_gate
        # fla names the norm after the kernel that it fuses: the key of its weight depends on it.
        self.fuse_norm_and_gate = gate_fn == "swish" and fuse_norm and use_output_gate
        if use_output_gate:
            self.g_proj = nn.Linear(self.hidden_size, self.value_dim, bias=False)
        if self.fuse_norm_and_gate:
            self.g_norm_swish_gate = RMSNormGated(self.head_v_dim, norm_eps, elementwise_affine)
        else:
            self.g_norm = RMSNorm(self.head_v_dim, norm_eps, elementwise_affine)
            self.gate_fn = activation(gate_fn)
        self.o_proj = nn.Linear(self.value_dim, self.hidden_size, bias=False)

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        if self.fuse_norm_and_gate:
            o = self.g_norm_swish_gate(o, self.g_proj(x).view_as(o)).flatten(-2)
        else:
            o = self.g_norm(o).flatten(-2)
            if self.use_output_gate:
                o = o * self.gate_fn(self.g_proj(x))
        y: Tensor = self.o_proj(o)
        return y


class MultiScaleRetention(_GatedOutput):
    """Linear attention with a fixed decay per head and rotated q, k (RetNet, arXiv:2307.08621).

    S_t = γ_h·S_{t-1} + k_t⊗v_t, o_t = K^-½·S_tᵀq_t with γ_h = 1 - 2^(-5-h) (eq. 8); then a norm
    per head, gated by swish(W_g x), and a projection. As in fla there is no rescaling by sums of
    decays, so the parallel, the chunked and the recurrent form are equal. Arguments, defaults and
    state-dict keys are fla's, without its short convolutions.

    Args:
        mode: Checked for compatibility only: the op chooses its algorithm by shape.
        hidden_size: Width D of the input and the output.
        expand_k: Width of all keys over D.
        expand_v: Width of all values over D.
        num_heads: H.
        num_kv_heads: Heads of k and v, a divisor of H; default H.
        feature_map: Name of an activation of q and k before the rotation; default none.
        use_output_gate: Whether the gate exists.
        gate_fn: Its activation.
        elementwise_affine: Whether the norm has a weight.
        norm_eps: Its eps.
        fuse_norm: Names the norm's weight `g_norm_swish_gate.weight` (else `g_norm.weight`).

    Example:
        >>> layer = MultiScaleRetention(hidden_size=32, num_heads=4)
        >>> y, state = layer(torch.randn(2, 10, 32), output_final_state=True)
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        fuse_norm: bool = True,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, expand_k, expand_v)
        check_mode("MultiScaleRetention", mode, MODES)
        self.feature_map_fn = None if feature_map is None else activation(feature_map)
        self._build_output(use_output_gate, gate_fn, elementwise_affine, norm_eps, fuse_norm)
        if self.head_k_dim % 2:
            raise ValueError(
                "MultiScaleRetention: expected an even width of keys per head, "
                f"got {self.head_k_dim}"
            )

    def _inputs(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._project(x)
        if self.feature_map_fn is not None:
            q, k = self.feature_map_fn(q), self.feature_map_fn(k)
        q, k = rotary(q, positions), rotary(k, positions)
        return q, self._repeat(k), self._repeat(v)

    def forward(
        self,
        x: Tensor,
        initial_state: PositionedState | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, PositionedState | None]:
        """Mix x `[B, T, D]`; the state is the memory `[B, H, K, V]` and the next position."""
        memory, start = (None, None) if initial_state is None else initial_state
        batch, length = x.shape[:2]
        q, k, v = self._inputs(x, token_positions(batch, length, cu_seqlens, start))
        o, final = linear_attention(
            q,
            k,
            v,
            retention_log_decay(self.num_heads, x.device),
            initial_state=memory,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
        y = self._output(o, x)
        memory = single_tensor(final)
        if memory is None:
            return y, None
        position = final_positions(batch, length, cu_seqlens, start).to(x.device)
        return y, PositionedState(memory, position)

    def step(self, x: Tensor, state: PositionedState) -> Tensor:
        """Mix one token per sequence, x `[B, D]`, and update the state in place."""
        q, k, v = self._inputs(x, state.position)
        g = retention_log_decay(self.num_heads, x.device)
        o = linear_attention_step(q, k, v, g, state=state.memory)
        state.position.add_(1)
        return self._output(o, x)

    def init_state(self, batch: int) -> PositionedState:
        """The state of `batch` sequences before their first token."""
        memory = self._zeros(batch, self.num_heads, self.head_k_dim, self.head_v_dim)
        return PositionedState(memory, self._start(batch))


class GatedLinearAttention(_GatedOutput):
    """Linear attention whose decay per key channel depends on the token (GLA, arXiv:2312.06635).

    S_t = diag(α_t)·S_{t-1} + k_t⊗v_t, o_t = K^-½·S_tᵀq_t with α_t = σ(W₂W₁x_t + b)^{1/16} (§4.4);
    then a norm per head, gated by swish(W_g x), and a projection. Arguments, defaults and
    state-dict keys are fla's, without its short convolutions, so that published weights load.

    Args:
        mode: Checked for compatibility only: the op chooses its algorithm by shape.
        hidden_size: Width D of the input and the output.
        expand_k: Width of all keys over D.
        expand_v: Width of all values over D.
        num_heads: H.
        num_kv_heads: Heads of k, v and the decay, a divisor of H; default H.
        feature_map: Name of an activation of q and k; default none.
        use_output_gate: Whether the output gate exists.
        gate_fn: Its activation.
        elementwise_affine: Whether the norm has a weight.
        norm_eps: Its eps.
        gate_logit_normalizer: The root τ = 16 that keeps α near 1.
        gate_low_rank_dim: Width of W₁x.
        clamp_min: Lower bound of ln α; default none.
        fuse_norm: Names the norm's weight `g_norm_swish_gate.weight` (else `g_norm.weight`).

    Example:
        >>> layer = GatedLinearAttention(hidden_size=32, num_heads=4)
        >>> y, state = layer(torch.randn(2, 10, 32), output_final_state=True)
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: float = 16,
        gate_low_rank_dim: int = 16,
        clamp_min: float | None = None,
        fuse_norm: bool = True,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, expand_k, expand_v)
        check_mode("GatedLinearAttention", mode, MODES)
        self.feature_map_fn = None if feature_map is None else activation(feature_map)
        self.gate_logit_normalizer = gate_logit_normalizer
        self.clamp_min = clamp_min
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_low_rank_dim, bias=False),
            nn.Linear(gate_low_rank_dim, self.key_dim // self.num_kv_groups, bias=True),
        )
        self._build_output(use_output_gate, gate_fn, elementwise_affine, norm_eps, fuse_norm)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = self._project(x)
        g = F.logsigmoid(self.gk_proj(x)).unflatten(-1, (-1, self.head_k_dim))
        g = g / self.gate_logit_normalizer
        if self.clamp_min is not None:
            g = g.clamp(min=self.clamp_min)
        if self.feature_map_fn is not None:
            q, k = self.feature_map_fn(q), self.feature_map_fn(k)
        return q, self._repeat(k), self._repeat(v), self._repeat(g)

    def forward(
        self,
        x: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix x `[B, T, D]`; the state is S `[B, H, K, V]`."""
        q, k, v, g = self._inputs(x)
        o, state = linear_attention(
            q,
            k,
            v,
            g,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
        return self._output(o, x), single_tensor(state)

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """Mix one token per sequence, x `[B, D]`, and update the state in place."""
        q, k, v, g = self._inputs(x)
        return self._output(linear_attention_step(q, k, v, g, state=state), x)

    def init_state(self, batch: int) -> Tensor:
        """The state of `batch` sequences before their first token."""
        return self._zeros(batch, self.num_heads, self.head_k_dim, self.head_v_dim)
