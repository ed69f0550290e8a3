"""Layers whose gates are one number per head and token: DeltaNet, Gated DeltaNet, DeltaProduct.

Every layer of this family has the same three entry points:
  forward(x, initial_state=None, output_final_state=False, cu_seqlens=None, attention_mask=None)
      -> (y, state | None)
  step(x, state) -> y          one token per sequence; the state is updated in place
  init_state(batch) -> state   of a size that no context length changes
The state of `step` and of `forward` is the same thing, so a prompt can be read by either.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastweights.ops.delta_rule.functional import delta_rule, delta_rule_step
from fastweights.ops.delta_rule.mixer import DeltaMixer, decay_rate, integer, time_step

__all__ = ["DeltaNet", "GatedDeltaNet", "GatedDeltaProduct"]


class DeltaNet(DeltaMixer):
    """Linear attention that replaces what a key has stored (DeltaNet, arXiv:2406.06484).

    S_t = (I - β_t·k_t·k_tᵀ)·S_{t-1} + β_t·k_t⊗v_t, o_t = K^-½·S_tᵀq_t (eq. 1-3) with q, k, v from
    projections and short convolutions, q and k of length one, β = σ(W_b x); then a norm per head
    and a projection. Arguments, defaults, initialisation and state-dict keys are fla's, so that
    published weights load; unknown arguments are refused.

    Args:
        mode: "chunk" or "fused_recurrent". Checked only: the op chooses its algorithm by shape.
        d_model: Another name of hidden_size, which it overrides.
        hidden_size: Width D of the input and the output.
        expand_k: Width of all keys over D.
        expand_v: Width of all values over D.
        num_heads: H.
        use_beta: Whether β is learned; else it is 1.
        use_gate: Whether the norm is gated by silu(W_g x).
        use_short_conv: Whether q, k and v pass a short convolution. DeltaNet is much weaker
            without.
        conv_size: Its width.
        conv_bias: Whether it has a bias.
        allow_neg_eigval: Twice β, so that a key's component can change its sign
            (arXiv:2411.12537).
        layer_idx: Kept for compatibility; a state is passed, not looked up.
        qk_activation: "silu", "relu", "elu" (elu + 1) or "identity" of q and k.
        qk_norm: "l2" divides q and k by their length, "sum" by their sum of magnitudes.
        norm_eps: eps of the norm.

    Example:
        >>> layer = DeltaNet(hidden_size=32, num_heads=4)
        >>> y, state = layer(torch.randn(2, 10, 32), output_final_state=True)
        >>> with torch.no_grad():
        ...     y11 = layer.step(torch.randn(2, 32), state)
    """

    def __init__(
        self,
        mode: str = "chunk",
        d_model: int | None = None,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_beta: bool = True,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        layer_idx: int | None = None,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        norm_eps: float = 1e-5,
    ) -> None:
        hidden_size = hidden_size if d_model is None else d_model

        def head_dim(name: str, expand: float) -> int:
            width = hidden_size * expand / num_heads if num_heads else 0.0
            return integer("DeltaNet", f"hidden_size * {name} / num_heads", width)

        super().__init__(
            mode,
            hidden_size,
            num_heads,
            None,
            head_dim("expand_k", expand_k),
            head_dim("expand_v", expand_v),
            layer_idx,
        )
        if qk_activation not in ("silu", "relu", "elu", "identity"):
            raise ValueError(
                'DeltaNet: expected qk_activation "silu", "relu", "elu" or "identity", '
                f"got {qk_activation!r}"
            )
        if qk_norm not in ("l2", "sum"):
            raise ValueError(f'DeltaNet: expected qk_norm "l2" or "sum", got {qk_norm!r}')
        self.qk_activation, self.qk_norm = qk_activation, qk_norm
        self.use_beta, self.use_gate = use_beta, use_gate
        self.allow_neg_eigval = allow_neg_eigval
        self._build_projections()
        if use_beta:
            self.b_proj = self._linear(num_heads)
        self._build_convolutions(use_short_conv, conv_size, conv_bias)
        gate = self._linear(self.value_dim) if use_gate else None
        self._build_output(gate, "silu", norm_eps)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._heads(q, k, v)
        if self.qk_activation == "relu":
            q, k = F.relu(q), F.relu(k)
        elif self.qk_activation == "elu":
            q, k = F.elu(q) + 1, F.elu(k) + 1
        if self.qk_norm == "sum":
            q, k = (F.normalize(x, p=1.0, dim=-1, eps=1e-6) for x in (q, k))
        return q, k, v

    def _gates(self, x: Tensor) -> dict[str, Any]:
        gates: dict[str, Any] = {"qk_l2norm": self.qk_norm == "l2"}
        if self.use_beta:
            gates |= {
                "beta": self.b_proj(x),
                "beta_sigmoid": True,
                "allow_neg_eigval": self.allow_neg_eigval,
            }
        elif self.allow_neg_eigval:
            gates["beta"] = x.new_full((*x.shape[:-1], self.num_heads), 2.0)
        return gates


class GatedDeltaNet(DeltaMixer):
    """The delta rule with a decay per head and token (Gated DeltaNet, arXiv:2412.06464).

    S_t = α_t·(I - β_t·k_t·k_tᵀ)·S_{t-1} + β_t·k_t⊗v_t, o_t = K^-½·S_tᵀq_t (eq. 10) with q, k, v
    from projections and short convolutions, q and k of length one, β = σ(W_b x) and
    ln α = -exp(A_log)·softplus(W_a x + dt_bias); then a norm per head, gated by act(W_g x), and a
    projection. Arguments, defaults, initialisation and state-dict keys are fla's, so that published
    weights load; unknown arguments are refused.

    Args:
        hidden_size: Width D of the input and the output.
        expand_v: V over K.
        head_dim: K. num_heads * head_dim = 0.75 D is the paper's size.
        num_heads: Heads H of q and k.
        num_v_heads: Heads HV of v, a multiple of H; None is H. Value head h reads query and key
            head h // (HV / H).
        mode: "chunk" or "fused_recurrent". Checked only: the op chooses its algorithm by shape.
        use_gate: Whether the norm is gated.
        use_short_conv: Whether q, k and v pass a short convolution. The layer is much weaker
            without.
        allow_neg_eigval: Twice β, so that a key's component can change its sign
            (arXiv:2411.12537).
        conv_size: Width of the convolutions.
        conv_bias: Whether they have a bias.
        layer_idx: Kept for compatibility; a state is passed, not looked up.
        norm_eps: eps of the norm.
        output_gate_activation: "swish", which is "silu", or "sigmoid".

    Example:
        >>> layer = GatedDeltaNet(hidden_size=32, head_dim=8, num_heads=2, num_v_heads=4)
        >>> y, state = layer(torch.randn(2, 10, 32), output_final_state=True)
        >>> with torch.no_grad():
        ...     y11 = layer.step(torch.randn(2, 32), state)
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        output_gate_activation: str = "swish",
    ) -> None:
        head_v_dim = integer("GatedDeltaNet", "head_dim * expand_v", head_dim * expand_v)
        super().__init__(mode, hidden_size, num_heads, num_v_heads, head_dim, head_v_dim, layer_idx)
        if output_gate_activation not in ("swish", "silu", "sigmoid"):
            raise ValueError(
                'GatedDeltaNet: expected output_gate_activation "swish", "silu" or "sigmoid", '
                f"got {output_gate_activation!r}"
            )
        self.use_gate, self.allow_neg_eigval = use_gate, allow_neg_eigval
        self._build_projections()
        self.a_proj = self._linear(self.num_v_heads)
        self.b_proj = self._linear(self.num_v_heads)
        self.A_log = decay_rate(self.num_v_heads, low=0)
        self.dt_bias = time_step(self.num_v_heads)
        self._build_convolutions(use_short_conv, conv_size, conv_bias)
        gate = self._linear(self.value_dim) if use_gate else None
        self._build_output(gate, output_gate_activation, norm_eps)

    def _gates(self, x: Tensor) -> dict[str, Any]:
        return {
            "g": self.a_proj(x),
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "beta": self.b_proj(x),
            "beta_sigmoid": True,
            "allow_neg_eigval": self.allow_neg_eigval,
            "qk_l2norm": True,
        }


class GatedDeltaProduct(DeltaMixer):
    """Gated DeltaNet that corrects its state n times a token (DeltaProduct, arXiv:2502.10297).

    A token decays the state once, writes n keys one after another, each with its value and β, and
    is read once: its transition is α_t times a product of n generalised Householder matrices
    I - β·k·kᵀ. With β in (0, 2) two of them can rotate, so that the layer tracks states that
    Gated DeltaNet does not; with n = 1 it is Gated DeltaNet. Arguments, defaults, initialisation
    and state-dict keys are fla's, so that published weights load; unknown arguments are refused.

    Time is that of Gated DeltaNet on n·T tokens.

    Args:
        hidden_size: Width D of the input and the output.
        expand_v: V over K.
        head_dim: K.
        num_heads: Heads H of q and k.
        num_v_heads: Heads HV of v, a multiple of H; None is H. Value head h reads query and key
            head h // (HV / H).
        mode: "chunk" or "fused_recurrent". Checked only: the op chooses its algorithm by shape.
        use_output_gate: Whether the norm is gated by silu(W_g x).
        use_short_conv: Whether q, k and v pass a short convolution. The layer is much weaker
            without.
        conv_size: Its width.
        conv_bias: Whether it has a bias.
        layer_idx: Kept for compatibility; a state is passed, not looked up.
        norm_eps: eps of the norm.
        use_forget_gate: Whether there is a decay.
        allow_neg_eigval: Twice β, so that a key's component can change its sign
            (arXiv:2411.12537).
        num_householder: n.

    Example:
        >>> layer = GatedDeltaProduct(hidden_size=32, head_dim=8, num_heads=4, num_householder=3)
        >>> y, state = layer(torch.randn(2, 10, 32), output_final_state=True)
        >>> with torch.no_grad():
        ...     y11 = layer.step(torch.randn(2, 32), state)
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_output_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        use_forget_gate: bool = True,
        allow_neg_eigval: bool = True,
        num_householder: int = 2,
    ) -> None:
        head_v_dim = integer("GatedDeltaProduct", "head_dim * expand_v", head_dim * expand_v)
        super().__init__(mode, hidden_size, num_heads, num_v_heads, head_dim, head_v_dim, layer_idx)
        if num_householder < 1:
            raise ValueError(
                f"GatedDeltaProduct: expected num_householder >= 1, got {num_householder}"
            )
        self.use_output_gate, self.use_forget_gate = use_output_gate, use_forget_gate
        self.allow_neg_eigval, self.num_householder = allow_neg_eigval, num_householder
        self._build_projections(num_householder)
        self.b_proj = self._linear(self.num_v_heads * num_householder)
        if use_forget_gate:
            self.a_proj = self._linear(self.num_v_heads)
            self.A_log = decay_rate(self.num_v_heads, low=0)
            self.dt_bias = time_step(self.num_v_heads)
        self._build_convolutions(use_short_conv, conv_size, conv_bias, num_householder)
        gate = self._linear(self.value_dim) if use_output_gate else None
        self._build_output(gate, "silu", norm_eps)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q `[..., H, K]`; k and v with their n writes, `[..., n, H, K]` and `[..., n, HV, V]`."""
        n = self.num_householder
        return (
            q.unflatten(-1, (-1, self.head_k_dim)),
            k.unflatten(-1, (n, -1, self.head_k_dim)),
            v.unflatten(-1, (n, -1, self.head_v_dim)),
        )

    def _strengths(self, x: Tensor) -> dict[str, Any]:
        """What all n writes of a token have in common, and their β `[..., n, HV]`."""
        return {
            "beta": self.b_proj(x).unflatten(-1, (self.num_householder, -1)),
            "beta_sigmoid": True,
            "allow_neg_eigval": self.allow_neg_eigval,
            "qk_l2norm": True,
        }

    def _decay(self, x: Tensor) -> dict[str, Any]:
        if not self.use_forget_gate:
            return {}
        return {"g": self.a_proj(x), "A_log": self.A_log, "dt_bias": self.dt_bias}

    def _rule(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, **states: Any
    ) -> tuple[Tensor, Tensor | None]:
        n = self.num_householder
        gates = self._strengths(x) | self._decay(x)
        if self.use_forget_gate:
            # Only the first write decays: softplus(-inf) = 0.
            gates["g"] = F.pad(gates["g"].unsqueeze(2), (0, 0, 0, n - 1), value=-math.inf).flatten(
                1, 2
            )
        gates["beta"] = gates["beta"].flatten(1, 2)
        if states["cu_seqlens"] is not None:
            states["cu_seqlens"] = n * states["cu_seqlens"]
        # Only after the last write the state is read.
        q = F.pad(q.unsqueeze(2), (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
        o, memory = delta_rule(q, k.flatten(1, 2), v.flatten(1, 2), **gates, **states)
        return o[:, n - 1 :: n], memory

    def _rule_step(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor) -> Tensor:
        common, decay = self._strengths(x), self._decay(x)
        keys, values, betas = k.unbind(1), v.unbind(1), common.pop("beta").unbind(1)
        for key, value, beta in zip(keys, values, betas, strict=True):
            o = delta_rule_step(q, key, value, beta=beta, **common, **decay, state=memory)
            decay = {}
        return o
