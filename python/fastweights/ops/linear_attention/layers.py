"""Token mixers without an output gate per head: linear attention and Lightning Attention.

Every mixer of this family has the same three entry points:
  forward(x, initial_state=None, output_final_state=False, cu_seqlens=None) -> (y, state | None)
  step(x, state) -> y          one token per sequence; the state is updated in place
  init_state(batch) -> state   of a size that no context length changes
The state of `step` and of `forward` is the same thing, so a prompt can be read by either.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastweights.ops._mixers import check_mode
from fastweights.ops.linear_attention.decays import DecayRule, lightning_log_decay
from fastweights.ops.linear_attention.feature_maps import feature_map as build_feature_map
from fastweights.ops.linear_attention.functional import linear_attention, linear_attention_step
from fastweights.ops.linear_attention.heads import MODES, ProjectedHeads, single_tensor
from fastweights.ops.norms.layers import RMSNorm

__all__ = ["LightningAttention", "LinearAttention"]

State = Tensor | tuple[Tensor, Tensor]

# What fla adds to the denominator of its normalised form.
_NORMALIZER_EPS = 1e-10


class LinearAttention(ProjectedHeads):
    """Causal linear attention with a feature map (Transformers are RNNs, arXiv:2006.16236).

    S_t = S_{t-1} + φ(k_t)⊗v_t, o_t = scale·S_tᵀφ(q_t), scale = (width of φ)^-½, over
    scale·φ(q_t)·Σ_{s≤t} φ(k_s) + 1e-10 with `do_feature_map_norm`; then a norm per head and a
    projection. Arguments, defaults and state-dict keys are fla's; `feature_map` may also be
    "taylor" or a factory. Linear in T forward and backward; O(H·K·V) per decoded token.

    Based's linear attention is `feature_map="taylor", do_feature_map_norm=True,
    output_norm="identity"` with `expand_k = 16 * num_heads / hidden_size`.

    Args:
        mode: Checked for compatibility only: the op chooses its algorithm by shape.
        hidden_size: Width D of the input and the output.
        expand_k: Width of all keys over D.
        expand_v: Width of all values over D.
        num_heads: H.
        num_kv_heads: Heads of k and v, a divisor of H; default H.
        feature_map: A name in `FEATURE_MAPS` or a factory from the head width to a module.
        tie_feature_map_qk: One map for both q and k.
        output_norm: "rmsnorm" (per head) or "identity".
        norm_q: Divide φ(q) by its sum + 1e-4.
        norm_k: Divide φ(k) by its sum + 1e-4.
        do_feature_map_norm: Divide by the running sum. It wants φ ≥ 0: a denominator of signed
            features crosses zero.
        elementwise_affine: Whether the output norm has a weight.
        norm_eps: Its eps.

    Example:
        >>> layer = LinearAttention(hidden_size=32, num_heads=4, feature_map="elu")
        >>> y, state = layer(torch.randn(2, 10, 32), output_final_state=True)
        >>> with torch.no_grad():
        ...     y11 = layer.step(torch.randn(2, 32), state)
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str | Callable[[int], nn.Module] = "elementwise_product",
        tie_feature_map_qk: bool = False,
        output_norm: str = "rmsnorm",
        norm_q: bool = False,
        norm_k: bool = False,
        do_feature_map_norm: bool = False,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, expand_k, expand_v)
        check_mode("LinearAttention", mode, MODES)
        if output_norm not in ("rmsnorm", "identity"):
            raise ValueError(
                'LinearAttention: expected output_norm "rmsnorm" or "identity", '
                f"got {output_norm!r}"
            )
        self.feature_map_q = build_feature_map(feature_map, self.head_k_dim)
        self.feature_map_k = (
            self.feature_map_q
            if tie_feature_map_qk
            else build_feature_map(feature_map, self.head_k_dim)
        )
        self.norm_q, self.norm_k = norm_q, norm_k
        self.do_feature_map_norm = do_feature_map_norm
        self.norm: nn.Module = (
            RMSNorm(self.head_v_dim, norm_eps, elementwise_affine)
            if output_norm == "rmsnorm"
            else nn.Identity()
        )
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._project(x)
        q, k = self.feature_map_q(q), self.feature_map_k(self._repeat(k))
        if self.norm_q:
            q = q / (q.sum(dim=-1, keepdim=True) + 1e-4)
        if self.norm_k:
            k = k / (k.sum(dim=-1, keepdim=True) + 1e-4)
        return q, k, self._repeat(v)

    def _output(self, o: Tensor) -> Tensor:
        y: Tensor = self.o_proj(self.norm(o).flatten(-2))
        return y

    def forward(
        self,
        x: Tensor,
        initial_state: State | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """Mix x `[B, T, D]`; the state is S `[B, H, K', V]`, or (S, z) when normalising."""
        q, k, v = self._inputs(x)
        o, state = linear_attention(
            q,
            k,
            v,
            normalize=self.do_feature_map_norm,
            eps=_NORMALIZER_EPS,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
        return self._output(o), state

    def step(self, x: Tensor, state: State) -> Tensor:
        """Mix one token per sequence, x `[B, D]`, and update the state in place."""
        q, k, v = self._inputs(x)
        normalize = self.do_feature_map_norm
        o = linear_attention_step(q, k, v, state=state, normalize=normalize, eps=_NORMALIZER_EPS)
        return self._output(o)

    def init_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first token."""
        probe = self.q_proj.weight.new_zeros(self.num_heads, self.head_k_dim)
        features = self.feature_map_k(probe).shape[-1]
        memory = self._zeros(batch, self.num_heads, features, self.head_v_dim)
        if self.do_feature_map_norm:
            return memory, self._zeros(batch, self.num_heads, features)
        return memory


class LightningAttention(ProjectedHeads):
    """The mixer of TransNormerLLM: decayed linear attention of silu(q), silu(k), silu(v).

    S_t = λ_h·S_{t-1} + k_t⊗v_t, o_t = scale·S_tᵀq_t; then a LayerNorm over all heads, a sigmoid
    gate from a two-layer linear map of rank D/H, and a projection (Lightning Attention-2,
    arXiv:2401.04658; TransNormerLLM, arXiv:2307.14995). State-dict keys are the authors'.

    Args:
        hidden_size: Width D of the input and the output.
        num_heads: H.
        layer_idx: Number of this layer, from 0: deeper layers forget less.
        num_layers: Number of layers of the model.
        decay: "alibi", the authors' λ and scale 1; "linear", those of fla's `lightning_attn`,
            with scale (D/H)^-½ (see `lightning_log_decay`).
        bias: Whether the projections have one.

    Example:
        >>> layer = LightningAttention(hidden_size=32, num_heads=4, layer_idx=1, num_layers=3)
        >>> y, state = layer(torch.randn(2, 10, 32), output_final_state=True)
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        layer_idx: int = 0,
        num_layers: int = 12,
        decay: DecayRule = "alibi",
        bias: bool = False,
    ) -> None:
        super().__init__(hidden_size, num_heads, bias=bias)
        self.scale = 1.0 if decay == "alibi" else self.head_k_dim**-0.5
        lightning_log_decay(num_heads, layer_idx, num_layers, decay)  # raises what does not fit
        self.layer_idx, self.num_layers, self.decay = layer_idx, num_layers, decay
        self.norm = nn.LayerNorm(hidden_size)
        self.output_gate = nn.Sequential(
            nn.Linear(hidden_size, self.head_k_dim, bias=bias),
            nn.Linear(self.head_k_dim, hidden_size, bias=bias),
        )
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=bias)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._project(x)
        return F.silu(q), F.silu(k), F.silu(v)

    def _log_decay(self, device: torch.device) -> Tensor:
        return lightning_log_decay(
            self.num_heads, self.layer_idx, self.num_layers, self.decay, device
        )

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.o_proj(self.norm(o.flatten(-2)) * self.output_gate(x).sigmoid())
        return y

    def forward(
        self,
        x: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix x `[B, T, D]`; the state is S `[B, H, D/H, D/H]`."""
        q, k, v = self._inputs(x)
        o, state = linear_attention(
            q,
            k,
            v,
            self._log_decay(x.device),
            scale=self.scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
        return self._output(o, x), single_tensor(state)

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """Mix one token per sequence, x `[B, D]`, and update the state in place."""
        q, k, v = self._inputs(x)
        o = linear_attention_step(q, k, v, self._log_decay(x.device), state=state, scale=self.scale)
        return self._output(o, x)

    def init_state(self, batch: int) -> Tensor:
        """The state of `batch` sequences before their first token."""
        return self._zeros(batch, self.num_heads, self.head_k_dim, self.head_v_dim)
