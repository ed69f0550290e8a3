"""Layers whose gates are a number per channel: Kimi Delta Attention and Gated DeltaNet-2.

The entry points are those of `layers.py`: forward, step, init_state.
"""

from typing import Any

import torch
from torch import Tensor

from fastweights.ops.delta_rule.mixer import (
    DeltaMixer,
    decay_rate,
    integer,
    time_step,
    without_weight_decay,
)

__all__ = ["GatedDeltaNet2", "KimiDeltaAttention"]


class KimiDeltaAttention(DeltaMixer):
    """The delta rule with a decay per key channel and token (Kimi Linear, arXiv:2510.26692).

    S_t = (I - β_t·k_t·k_tᵀ)·diag(α_t)·S_{t-1} + β_t·k_t⊗v_t, o_t = K^-½·S_tᵀq_t with q, k, v from
    projections and short convolutions, q and k of length one, β = σ(W_b x) and
    ln α = -exp(A_log)·softplus(W_f x + dt_bias), W_f of rank V; then a norm per head, gated by
    σ(W_g x), W_g of rank V with a bias, and a projection. Arguments, defaults, initialisation and
    state-dict keys are fla's, so that published weights load; unknown arguments are refused.

    Args:
        hidden_size: Width D of the input and the output.
        expand_v: V over K.
        head_dim: K.
        num_heads: Heads H of q and k.
        num_v_heads: Heads HV of v and of the decay, a multiple of H; None is H. Value head h reads
            query and key head h // (HV / H).
        mode: "chunk" or "fused_recurrent". Checked only: the op chooses its algorithm by shape.
        use_short_conv: Whether q, k and v pass a short convolution. The layer is much weaker
            without.
        allow_neg_eigval: Twice β, so that a key's component can change its sign
            (arXiv:2411.12537).
        safe_gate: A_log starts at 0 instead of ln U(1, 16); wants a lower_bound.
        lower_bound: With it ln α = lower_bound·σ(exp(A_log)·(W_f x + dt_bias)), which is bounded;
            negative.
        conv_size: Width of the convolutions.
        conv_bias: Whether they have a bias.
        layer_idx: Kept for compatibility; a state is passed, not looked up.
        norm_eps: eps of the norm.

    Example:
        >>> layer = KimiDeltaAttention(hidden_size=32, head_dim=8, num_heads=4)
        >>> y, state = layer(torch.randn(2, 10, 32), output_final_state=True)
        >>> with torch.no_grad():
        ...     y11 = layer.step(torch.randn(2, 32), state)
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        head_v_dim = integer("KimiDeltaAttention", "head_dim * expand_v", head_dim * expand_v)
        super().__init__(mode, hidden_size, num_heads, num_v_heads, head_dim, head_v_dim, layer_idx)
        if safe_gate and lower_bound is None:
            raise ValueError("KimiDeltaAttention: expected lower_bound with safe_gate, got None")
        if lower_bound is not None and not lower_bound < 0:
            raise ValueError(f"KimiDeltaAttention: expected lower_bound < 0, got {lower_bound}")
        self.allow_neg_eigval = allow_neg_eigval
        self.safe_gate, self.lower_bound = safe_gate, lower_bound
        self._build_projections()
        self._build_convolutions(use_short_conv, conv_size, conv_bias)
        gate_dim = self.num_v_heads * head_dim
        self.f_proj = self._low_rank(gate_dim, bias=False)
        self.b_proj = self._linear(self.num_v_heads)
        self.A_log = (
            without_weight_decay(torch.zeros(self.num_v_heads))
            if safe_gate
            else decay_rate(self.num_v_heads, low=1)
        )
        self.dt_bias = time_step(gate_dim)
        self._build_output(self._low_rank(self.value_dim, bias=True), "sigmoid", norm_eps)

    def _gates(self, x: Tensor) -> dict[str, Any]:
        return {
            "g": self.f_proj(x).unflatten(-1, (-1, self.head_k_dim)),
            "A_log": self.A_log,
            "dt_bias": self.dt_bias.view(-1, self.head_k_dim),
            "lower_bound": self.lower_bound,
            "beta": self.b_proj(x),
            "beta_sigmoid": True,
            "allow_neg_eigval": self.allow_neg_eigval,
            "qk_l2norm": True,
        }


class GatedDeltaNet2(DeltaMixer):
    """The delta rule with erase and write gates per channel (Gated DeltaNet-2, arXiv:2605.22791).

    S_t = (I - k_t·(b_t⊙k_t)ᵀ)·diag(α_t)·S_{t-1} + k_t⊗(w_t⊙v_t), o_t = K^-½·S_tᵀq_t with q, k, v
    from projections and short convolutions, q and k of length one, b = σ(W_b x) per key channel,
    w = σ(W_w x) per value channel and ln α = -exp(A_log)·softplus(W_f x + dt_bias), W_f of rank V;
    then a norm per head, gated by σ(W_g x), W_g of rank V with a bias, and a projection. With
    b = w = β it is Kimi Delta Attention. Arguments, defaults, initialisation and state-dict keys
    are fla's, so that published weights load; unknown arguments are refused.

    Args:
        hidden_size: Width D of the input and the output.
        expand_v: V over K.
        head_dim: K.
        num_heads: Heads H of q, k, the decay and the erase gate.
        num_v_heads: Heads HV of v and the write gate, a multiple of H; None is H. Value head h
            reads head h // (HV / H) of the others.
        mode: "chunk" or "fused_recurrent". Checked only: the op chooses its algorithm by shape.
        use_short_conv: Whether q, k and v pass a short convolution. The layer is much weaker
            without.
        allow_neg_eigval: Twice b, so that a key's component can change its sign
            (arXiv:2411.12537).
        conv_size: Width of the convolutions.
        conv_bias: Whether they have a bias.
        layer_idx: Kept for compatibility; a state is passed, not looked up.
        norm_eps: eps of the norm.

    Example:
        >>> layer = GatedDeltaNet2(hidden_size=32, head_dim=8, num_heads=4)
        >>> y, state = layer(torch.randn(2, 10, 32), output_final_state=True)
        >>> with torch.no_grad():
        ...     y11 = layer.step(torch.randn(2, 32), state)
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1.0,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        head_v_dim = integer("GatedDeltaNet2", "head_dim * expand_v", head_dim * expand_v)
        super().__init__(mode, hidden_size, num_heads, num_v_heads, head_dim, head_v_dim, layer_idx)
        self.allow_neg_eigval = allow_neg_eigval
        self._build_projections()
        self._build_convolutions(use_short_conv, conv_size, conv_bias)
        self.f_proj = self._low_rank(self.key_dim, bias=False)
        self.b_proj = self._linear(self.key_dim)
        self.w_proj = self._linear(self.value_dim)
        self.A_log = decay_rate(num_heads, low=1)
        self.dt_bias = time_step(self.key_dim)
        self._build_output(self._low_rank(self.value_dim, bias=True), "sigmoid", norm_eps)

    def _gates(self, x: Tensor) -> dict[str, Any]:
        def per_value_head(gate: Tensor, dim: int = -2) -> Tensor:
            groups = self.num_v_heads // self.num_heads
            return gate if groups == 1 else gate.repeat_interleave(groups, dim)

        K, V = self.head_k_dim, self.head_v_dim
        erase = torch.sigmoid(self.b_proj(x).unflatten(-1, (-1, K)))
        return {
            "g": per_value_head(self.f_proj(x).unflatten(-1, (-1, K))),
            "A_log": per_value_head(self.A_log, 0),
            "dt_bias": per_value_head(self.dt_bias.view(-1, K), 0),
            "erase": per_value_head(2 * erase if self.allow_neg_eigval else erase),
            "write": torch.sigmoid(self.w_proj(x).unflatten(-1, (-1, V))),
            "qk_l2norm": True,
        }
