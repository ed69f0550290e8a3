"""Running a causal language model a chunk or a token at a time, whatever holds its past."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastweights.generation.memory import release_free_memory
from fastweights.generation.state import GenerationState, fingerprint

# Chunks of a prompt between two releases of free memory: often enough that it does not pile up,
# rarely enough that the time does not show.
_CHUNKS_PER_RELEASE = 8


class Engine(Protocol):
    """What the generation loop asks of a model; rows are prompts, in the order they came."""

    def read(self, prompts: Sequence[Tensor]) -> Tensor:
        """Read prompts (int64 `[T_r]`), once; the logits `[B, V]` of the tokens after them."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token per row (int64 `[B]`); the logits `[B, V]` of the tokens after them."""

    def state(self) -> GenerationState:
        """What has been read so far; valid until the next call."""


class ModuleEngine:
    """Calls the model as Hugging Face does, with a cache: any causal language model runs.

    Rows of equal length share a cache and a forward call, since a cache has one length for all of
    its rows. Prompts are read `chunk` tokens at a time: the memory for activations does not grow
    with the prompt.

    Args:
        model: a Hugging Face causal language model.
        chunk: tokens per forward call of a prompt.
        start: a state of one row that every prompt continues; None starts from nothing.
    """

    def __init__(
        self, model: nn.Module, *, chunk: int, start: GenerationState | None = None
    ) -> None:
        self._model, self._chunk, self._start = model, chunk, start
        self._groups: list[tuple[list[int], Any]] = []
        self._logits = torch.empty(0)

    def read(self, prompts: Sequence[Tensor]) -> Tensor:
        """See `Engine`."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            by_length[len(prompt)].append(row)
        parts = []
        for rows in by_length.values():
            start = None if self._start is None else self._start.select([0] * len(rows))
            cache = _new_cache(self._model, start)
            tokens = torch.stack([prompts[r] for r in rows])
            logits = None if start is None else start.logits
            parts.append(_feed(self._model, tokens, cache, self._chunk, logits))
            self._groups.append((rows, cache))
        return self._in_order(parts)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Engine`."""
        return self._in_order(
            [_feed(self._model, tokens[rows, None], cache, 1) for rows, cache in self._groups]
        )

    def state(self) -> GenerationState:
        """See `Engine`.

        Raises:
            ValueError: a layer of the model keeps its keys and values, whose size is not constant.
        """
        layers, tokens = self._collect()
        return GenerationState(layers, tokens, self._logits, fingerprint(self._model))

    def _collect(self) -> tuple[list[Any], Tensor]:
        """A copy of the layers' states with all rows in order, and the tokens `[B]` they saw."""
        order = torch.tensor(self._order())
        groups = []
        for rows, cache in self._groups:
            if not all(hasattr(layer, "state") for layer in cache.layers):
                raise ValueError(
                    "generate: expected a model whose layers are all linear, "
                    "got one with a softmax layer"
                )
            tokens = torch.full((len(rows),), cache.get_seq_length(), dtype=torch.int64)
            groups.append([[layer.state for layer in cache.layers], tokens])
        joined = pytree.tree_map(lambda *rows: torch.cat(rows)[order], *groups)
        return joined[0], joined[1]

    def _order(self) -> list[int]:
        rows = [row for group, _ in self._groups for row in group]
        return sorted(range(len(rows)), key=rows.__getitem__)

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        self._logits = parts[0] if len(parts) == 1 else torch.cat(parts)[self._order()]
        return self._logits


def _new_cache(model: nn.Module, start: GenerationState | None) -> Any:
    """A cache for `model` that continues `start`."""
    from transformers import DynamicCache

    from fastweights.conversion.attention import LinearizedAttention
    from fastweights.integrations.transformers import StateCache

    if not any(isinstance(module, LinearizedAttention) for module in model.modules()):
        return DynamicCache(config=model.config)
    cache = StateCache(model)
    if start is not None:
        for layer, state in zip(cache.layers, start.layers, strict=True):
            layer.advance(state, int(start.tokens[0]))
    return cache


def _feed(
    model: nn.Module, tokens: Tensor, cache: Any, chunk: int, logits: Tensor | None = None
) -> Tensor:
    """Feed tokens `[B, T]` into model and cache; logits `[B, V]` after them, `logits` if T = 0."""
    from fastweights.integrations.transformers.converted import cache_argument

    options = {**cache_argument(model, cache), "use_cache": True, "logits_to_keep": 1}
    parts = tokens.split(chunk, 1) if tokens.numel() else ()
    for index, part in enumerate(parts, 1):
        logits = model(part, **options).logits[:, -1].float()
        if index % _CHUNKS_PER_RELEASE == 0 or 1 < index == len(parts):
            release_free_memory()
    assert logits is not None
    return logits
