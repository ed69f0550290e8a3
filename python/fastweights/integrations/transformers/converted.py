"""What makes a converted model a Hugging Face citizen: cache, padding mask, attention name."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

ATTENTION = "fastweights"


class StateLayer(CacheLayerMixin):
    """One layer's part of a cache: a state whose size does not depend on the tokens seen.

    Attributes:
        state: None before the first token; a `HybridState`, or the pair (S, z) of pure linear
            attention. Its tensors have the batch as their first dimension.
        tokens: how many tokens the layer has seen, padding included.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.tokens = 0

    def advance(self, state: Any, tokens: int) -> None:
        """Takes the state after `tokens` further tokens."""
        self.state, self.tokens = state, self.tokens + tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The state makes itself."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values are not kept: refuses."""
        raise ValueError(
            "StateLayer: expected a converted attention, got keys and values of a softmax attention"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that a mask covers, from position 0."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.tokens

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """A state cannot forget single tokens: only 0 is possible."""
        if tokens_to_remove:
            raise ValueError(
                "StateLayer: a state cannot be cropped; keep a copy of the cache to return to"
            )

    def reset(self) -> None:
        """Back to the time before the first token."""
        self.state, self.tokens = None, 0

    def _select(self, rows: Tensor) -> None:
        if self.state is not None:
            self.state = pytree.tree_map(lambda x: x.index_select(0, rows.to(x.device)), self.state)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices`."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        if self.state is not None:
            self.state = pytree.tree_map(lambda x: x.repeat_interleave(repeats, 0), self.state)


class StateCache(Cache):
    """The cache of a converted model: states, and keys and values where a layer stayed softmax.

    `model.generate` and `model(..., use_cache=True)` need none: they make a DynamicCache whose
    layers the converted attentions exchange. This one is for programs that hold on to the state.

    Args:
        model: a converted model.
    """

    def __init__(self, model: Any) -> None:
        from fastweights.conversion.attention import linearized_layers

        converted = {layer.layer_idx for layer in linearized_layers(model)}
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(
            layers=[StateLayer() if i in converted else DynamicLayer() for i in range(count)]
        )


def state_layer(cache: Cache, layer_idx: int) -> StateLayer:
    """Layer `layer_idx` of `cache`; an empty one of another kind becomes a `StateLayer`."""
    while len(cache.layers) <= layer_idx:
        cache.layers.append(StateLayer())
    layer = cache.layers[layer_idx]
    if not isinstance(layer, StateLayer):
        if layer.get_seq_length():
            raise ValueError(
                f"LinearizedAttention: layer {layer_idx} of the cache holds keys of a softmax "
                "attention"
            )
        layer = cache.layers[layer_idx] = StateLayer()
    return layer


def cache_argument(model: Any, cache: Cache) -> dict[str, Cache]:
    """`cache` under the name by which this version of transformers takes it."""
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def softmax_mask(
    queries: int, keys: int, valid: Tensor | None, window: int | None, device: torch.device
) -> Tensor | None:
    """`[B or 1, 1, queries, keys]`: which keys a query sees; None means plain causal attention.

    Args:
        queries: number of queries, the latest of the keys' positions.
        keys: number of keys.
        valid: padding mask `[B, keys]`, False for padding.
        window: of a sliding softmax attention.
        device: of the mask.
    """
    if valid is None and queries == keys and (window is None or keys <= window):
        return None
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)
    visible = (j <= i) if window is None else (j <= i) & (j > i - window)
    if valid is None:
        return visible[None, None]
    # A padding query that sees nothing would give NaN, which its own (discarded) output passes on
    # to gradients.
    return (visible & valid[:, None, :] | (i == j))[:, None]


def _padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Any = None,
    attention_mask: Any = None,
    **_: Any,
) -> Tensor | None:
    """The 2-D mask as it came, None without padding: a state has no use for a T × T one."""
    if _is_packed(mask_function):
        raise ValueError(
            "linearize: expected one sequence per row, got position_ids that restart within a row"
        )
    if attention_mask is None or bool(attention_mask[:, -kv_length:].all()):
        return None
    mask: Tensor = attention_mask[:, -kv_length:].bool()
    return mask


def _is_packed(mask_function: Any) -> bool:
    """Whether transformers composed its mask from one that separates packed sequences."""
    if "packed_sequence_mask_function" in getattr(mask_function, "__qualname__", ""):
        return True
    parts = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    return any(_is_packed(f) for part in parts if isinstance(part, tuple) for f in part)


def _softmax_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention of the layers that were kept, under the mask of `_padding_mask`."""
    queries, keys = query.shape[2], key.shape[2]
    mask = softmax_mask(queries, keys, attention_mask, kwargs.get("sliding_window"), query.device)
    o = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=kwargs.get("scaling"),
        dropout_p=kwargs.get("dropout", 0.0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return o.transpose(1, 2), None


def use_padding_masks(model: Any) -> None:
    """Lets `model` hand 2-D padding masks to its attentions instead of building T × T ones."""
    AttentionInterface.register(ATTENTION, _softmax_attention)
    AttentionMaskInterface.register(ATTENTION, _padding_mask)
    model.set_attn_implementation(ATTENTION)
