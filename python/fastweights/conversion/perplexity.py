"""Perplexity of long texts at constant memory, overall or by position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastweights.training.causal_lm import decoder, plain_output

# Positions whose logits exist at one time.
_LOGITS = 512


@overload
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    length: int | None = ...,
    by_position: None = ...,
    chunk: int = ...,
) -> float: ...


@overload
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    length: int | None = ...,
    by_position: Sequence[int],
    chunk: int = ...,
) -> dict[str, float]: ...


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    length: int | None = None,
    by_position: Sequence[int] | None = None,
    chunk: int = 512,
) -> float | dict[str, float]:
    """Exp of the mean negative log-likelihood of a text's tokens.

    The text streams through the model's cache in chunks and the logits of 512 tokens exist at a
    time (of a chunk, where a model scales or bends them): with a converted model, memory does not
    depend on the length. Works for softmax models, whose cache grows, too.

    Args:
        model: a Hugging Face causal language model.
        tokens: `[N]` or `[B, N]` int64.
        length: cuts each row into sequences of this many tokens that do not see each other (a
            remainder is left out); None keeps a row whole.
        by_position: ascending boundaries. The answer has the perplexity of the tokens predicted
            from positions [0, b₀), [b₀, b₁) and so on, under the names "0-512", "512-2048", …;
            ranges that the text does not reach are absent.
        chunk: tokens of one forward pass.

    Returns:
        One number, or one for each range of positions.

    Raises:
        ValueError: an argument is out of range or the text is shorter than one sequence.
    """
    rows = _sequences(tokens, length)
    edges = _edges(by_position)
    if chunk < 1:
        raise ValueError(f"perplexity: expected chunk >= 1, got {chunk}")
    total = torch.zeros(rows.shape[1] - 1, dtype=torch.float64)
    training = model.training
    model.eval()
    plain = plain_output(model)
    for row in rows:
        total += _token_losses(model, row[None], chunk, plain)
    model.train(training)
    mean = total / len(rows)
    if edges is None:
        return math.exp(mean.mean().item())
    spans = zip([0, *edges[:-1]], edges, strict=True)
    return {f"{a}-{b}": math.exp(mean[a:b].mean().item()) for a, b in spans if a < len(mean)}


def _token_losses(model: Any, row: Tensor, chunk: int, plain: bool) -> Tensor:
    """`[N − 1]` float64: −log p of the tokens after the first of `row` `[1, N]`."""
    from transformers import DynamicCache

    from fastweights.integrations.transformers.converted import cache_argument

    row = row.to(model.device)
    body, head = decoder(model), model.get_output_embeddings()
    cache, losses = cache_argument(body, DynamicCache(config=model.config)), []
    for start in range(0, row.shape[1] - 1, chunk):
        inputs = row[:, start : min(start + chunk, row.shape[1] - 1)]
        targets = row[0, start + 1 : start + 1 + inputs.shape[1]].split(_LOGITS)
        if plain:
            hidden = body(input_ids=inputs, use_cache=True, **cache).last_hidden_state[0]
            pieces: Iterator[Tensor] = (head(x) for x in hidden.split(_LOGITS))
        else:
            pieces = iter(model(input_ids=inputs, use_cache=True, **cache).logits[0].split(_LOGITS))
        losses += [
            F.cross_entropy(logits.float(), y, reduction="none").double()
            for logits, y in zip(pieces, targets, strict=True)
        ]
    return torch.cat(losses).cpu()


def _sequences(tokens: Tensor, length: int | None) -> Tensor:
    if tokens.dim() not in (1, 2) or tokens.dtype != torch.int64:
        raise ValueError(
            "perplexity: expected int64 tokens of shape [N] or [B, N], "
            f"got {tokens.dtype} {list(tokens.shape)}"
        )
    rows = tokens if tokens.dim() == 2 else tokens[None]
    length = rows.shape[1] if length is None else length
    if length < 2 or rows.shape[1] < length:
        raise ValueError(
            f"perplexity: expected at least {max(length, 2)} tokens, got {rows.shape[1]}"
        )
    whole = rows.shape[1] // length * length
    return rows[:, :whole].reshape(-1, length)


def _edges(by_position: Sequence[int] | None) -> list[int] | None:
    if by_position is None:
        return None
    edges = list(by_position)
    if not edges or edges[0] < 1 or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"perplexity: expected ascending positive by_position, got {edges}")
    return edges
