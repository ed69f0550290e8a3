"""The attention module that takes the place of a softmax attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastweights.adapters.shared_input import together
from fastweights.conversion.features import HedgehogFeatures
from fastweights.conversion.recipes import Recipe
from fastweights.ops.attention.functional import hybrid_attention, hybrid_attention_step
from fastweights.ops.attention.state import HybridState
from fastweights.ops.linear_attention.functional import linear_attention

if TYPE_CHECKING:
    from fastweights.integrations.transformers import StateLayer

# Published mix: the window's share starts at sigmoid(−2.1972) = 0.1.
_MIX_LOGIT = -2.1972
# Half-lives, in tokens, that the decays of a head start from: one feature forgets within a window,
# the slowest never within the training length.
_HALF_LIVES = (16.0, 4096.0)


class Projections(NamedTuple):
    """What a layer computes from its input, before any token meets another.

    Attributes:
        q: `[B, T, HQ, K]`, rotated.
        k: `[B, T, HKV, K]`, rotated.
        v: `[B, T, HKV, V]`.
        q_plain: q before the rotation.
        k_plain: k before the rotation.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_plain: Tensor
    k_plain: Tensor


class MixerInputs(NamedTuple):
    """What mixes the tokens: q, k, v as in `Projections`, their features and the sink's score.

    Attributes:
        qf: `[B, T, HQ, F]`.
        kf: `[B, T, HS, F]`.
        sink: `[B, T, HQ]` or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    qf: Tensor
    kf: Tensor
    sink: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> MixerInputs:
        """`function` of every tensor."""
        q, k, v, qf, kf = (function(x) for x in self[:5])
        return MixerInputs(q, k, v, qf, kf, None if self.sink is None else function(self.sink))


class LinearizedAttention(nn.Module):
    """Window softmax and linear attention in one normaliser, in place of a softmax attention.

    Takes over the projections (and q/k norms) of `attention` under their own names, so that
    state-dict keys of pretrained weights stay as they are, and adds a few parameters of its own.
    Called as Hugging Face calls attention.

    Args:
        attention: a Llama-type attention: `q_proj`, `k_proj`, `v_proj`, `o_proj`, optionally
            `q_norm` and `k_norm`.
        recipe: what to build.

    Attributes:
        feature_q: `HedgehogFeatures` of HQ heads.
        feature_k: `HedgehogFeatures` of HS heads: HKV with `recipe.shared`, else HQ.
        mix: `[HQ]`, logits of the window's weight γ.
        log_decay: `[HS, F]`, g = −exp(log_decay) per token; absent without `recipe.decay`.
        sink_weight, sink_bias: `[HQ, K]` and `[HQ]`, score of the sink = q_plain · weight + bias;
            absent without `recipe.sink`.
        original: True computes the softmax attention that was replaced.
        on_transfer: called with (this module's heads, the softmax heads), both `[B, T, HQ, V]`,
            while `original`; only the module's own parameters are part of the graph.
    """

    def __init__(self, attention: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        source: Any = attention
        self.recipe = recipe
        self.config, self.layer_idx = source.config, source.layer_idx
        self.head_dim: int = source.head_dim
        self.scaling: float = source.scaling
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            getattr(source, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.q_norm: nn.Module | None = getattr(source, "q_norm", None)
        self.k_norm: nn.Module | None = getattr(source, "k_norm", None)
        self.num_heads: int = self.q_proj.out_features // self.head_dim
        self.num_key_value_heads: int = self.k_proj.out_features // self.head_dim
        self.sliding_window: int | None = (
            getattr(source, "sliding_window", None)
            or getattr(source.config, "sliding_window", None)
            if _slides(source)
            else None
        )
        self.original = False
        self.on_transfer: Callable[[Tensor, Tensor], None] | None = None

        heads, key_dim = self.num_heads, self.head_dim
        weight = next(iter(self.q_proj.state_dict().values()))  # packed or not
        state_heads = self.num_key_value_heads if recipe.shared else heads
        self.feature_q = HedgehogFeatures(heads, key_dim, recipe.feature_dim, gain=recipe.gain)
        self.feature_k = HedgehogFeatures(
            state_heads, key_dim, recipe.feature_dim, gain=recipe.gain
        )
        self.mix = nn.Parameter(torch.full((heads,), _MIX_LOGIT)) if recipe.window else None
        self.log_decay = (
            nn.Parameter(torch.empty(state_heads, 2 * recipe.feature_dim)) if recipe.decay else None
        )
        self.sink_weight = nn.Parameter(torch.zeros(heads, key_dim)) if recipe.sink else None
        self.sink_bias = nn.Parameter(torch.zeros(heads)) if recipe.sink else None
        self._reset_decay()
        for parameter in self.own_parameters():
            parameter.data = parameter.data.to(weight.device)
        self.train(attention.training)

    @torch.no_grad()
    def _reset_decay(self) -> None:
        if self.log_decay is not None:
            fast, slow = (math.log(life) for life in _HALF_LIVES)
            half_lives = torch.linspace(fast, slow, self.recipe.feature_dim).exp().repeat(2)
            self.log_decay.copy_((math.log(2) / half_lives).log())

    def own_parameters(self) -> list[nn.Parameter]:
        """The parameters that the conversion added, in a fixed order."""
        own = (self.mix, self.log_decay, self.sink_weight, self.sink_bias)
        maps = (*self.feature_q.parameters(), *self.feature_k.parameters())
        return [*maps, *(parameter for parameter in own if parameter is not None)]

    def decay(self) -> Tensor | None:
        """`[HS, F]`: the log decay of a feature per token, or None."""
        return None if self.log_decay is None else -self.log_decay.exp()

    def sink(self, q_plain: Tensor) -> Tensor | None:
        """`[..., HQ]`: the sink's score for every query, or None."""
        if self.sink_weight is None or self.sink_bias is None:
            return None
        return (q_plain.float() * self.sink_weight).sum(-1) + self.sink_bias

    def project(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Projections:
        """Queries, keys and values of `hidden` `[B, T, D]`; cos and sin are `[B or 1, T, K]`."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        projections = together((self.q_proj, self.k_proj, self.v_proj), hidden)
        q, k, v = (x.view(shape) for x in projections)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = (x[:, :, None] for x in position_embeddings)
        return Projections(_rotate(q, cos, sin), _rotate(k, cos, sin), v, q, k)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Hugging Face's calling convention.

        Args:
            hidden_states: `[B, T, D]`.
            position_embeddings: cos and sin of the rotary embedding, each `[B or 1, T, K]`.
            attention_mask: None or a padding mask `[B, tokens so far]` with True for tokens; the
                models of `linearize` build no other one. Padding may be anywhere.
            cache: a Cache; its layer becomes a `StateLayer`.
            past_key_values: the name of `cache` in older versions.
            **kwargs: what other attentions need.

        Returns:
            `[B, T, D]` and None.
        """
        cache = past_key_values if cache is None else cache
        p = self.project(hidden_states, position_embeddings)
        valid = None if attention_mask is None else attention_mask[:, -hidden_states.shape[1] :]
        if self.original:
            heads = self._softmax(p, attention_mask, cache)
            if self.on_transfer is not None:
                with torch.enable_grad():
                    self.on_transfer(
                        self._student(Projections(*(x.detach() for x in p)), valid, None), heads
                    )
        else:
            layer = None
            if cache is not None:
                from fastweights.integrations.transformers.converted import state_layer

                layer = state_layer(cache, self.layer_idx)
            heads = self._student(p, valid, layer)
        return self.o_proj(heads.flatten(2).to(hidden_states.dtype)), None

    def _softmax(self, p: Projections, valid: Tensor | None, cache: Any) -> Tensor:
        from fastweights.integrations.transformers.converted import softmax_mask

        q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        mask = softmax_mask(q.shape[2], k.shape[2], valid, self.sliding_window, q.device)
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return o.transpose(1, 2)

    def _student(self, p: Projections, valid: Tensor | None, layer: StateLayer | None) -> Tensor:
        batch, length = p.q.shape[:2]
        inputs = self.mixer_inputs(p)
        if valid is None or bool(valid.all()):
            o, state = self._attend(inputs, layer, None)
        else:
            tokens = valid.flatten().nonzero().squeeze(1)
            cu_seqlens = F.pad(valid.sum(1).cumsum(0), (1, 0))
            packed = inputs.map(lambda x: x.flatten(0, 1)[tokens][None])
            dense, state = self._attend(packed, layer, cu_seqlens)
            o = dense.new_zeros(batch * length, *dense.shape[2:]).index_copy(0, tokens, dense[0])
            o = o.unflatten(0, (batch, length))
        if layer is not None:
            layer.advance(state, length)
        return o

    def mixer_inputs(self, p: Projections) -> MixerInputs:
        """What the op takes of every token."""
        q, k = (p.q, p.k) if self.recipe.rotated else (p.q_plain, p.k_plain)
        k = k.repeat_interleave(self.feature_k.heads // k.shape[2], 2)
        qf, kf = self.feature_q(q).to(p.v.dtype), self.feature_k(k).to(p.v.dtype)
        return MixerInputs(p.q, p.k, p.v, qf, kf, self.sink(p.q_plain))

    def _attend(
        self, x: MixerInputs, layer: StateLayer | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Any]:
        state = None if layer is None else layer.state
        keep = layer is not None
        if self.mix is None:
            # Value heads of the linear family are the query heads here: each has its own features.
            v = x.v.repeat_interleave(self.num_heads // self.num_key_value_heads, 2)
            return linear_attention(
                x.qf, x.kf, v, scale=1.0, normalize=True, initial_state=state,
                output_final_state=keep, cu_seqlens=cu_seqlens,
            )  # fmt: skip
        mix, g, recipe = self.mix.sigmoid(), self.decay(), self.recipe
        if (
            isinstance(state, HybridState)
            and x.q.shape[1] == 1
            and cu_seqlens is None
            and not torch.is_grad_enabled()
        ):
            token = x.map(lambda y: y[:, 0])
            o = hybrid_attention_step(
                token.q, token.k, token.v, token.qf, token.kf, mix, g, state=state,
                window=recipe.window, scale=self.scaling, sink=token.sink,
            )  # fmt: skip
            return o[:, None], state
        return hybrid_attention(
            *x[:5], mix, g, window=recipe.window, layout=recipe.layout, scale=self.scaling,
            sink=x.sink, initial_state=state, output_final_state=keep, cu_seqlens=cu_seqlens,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The recipe."""
        return f"layer_idx={self.layer_idx}, {self.recipe}"


def linearized_layers(model: nn.Module) -> list[LinearizedAttention]:
    """The converted attentions of `model` in order.

    Raises:
        ValueError: there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, LinearizedAttention)]
    if not layers:
        raise ValueError(
            "fastweights: expected a model converted by linearize, found no converted layer"
        )
    return layers


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _slides(attention: Any) -> bool:
    return getattr(attention, "layer_type", "sliding_attention") == "sliding_attention"
