"""Multi-query associative recall, the standard test of what a token mixer can look up."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mqar"]


def mqar(
    num_examples: int,
    *,
    vocab_size: int = 8192,
    input_seq_len: int = 64,
    num_kv_pairs: int = 8,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Multi-query associative recall (Zoology, arXiv:2312.04927): pairs, then their keys alone.

    A sequence starts with n pairs k_1 v_1 ... k_n v_n: n distinct keys from 1 to V/2 - 1, n
    distinct values from V/2 to V - 1, where V is the vocabulary. In the remaining L - 2n tokens
    key i comes once more, 2 gap_i tokens after their beginning. The gaps are drawn without
    replacement, one after another, with

    .. math::
        p(\mathrm{gap} = j - 1) \propto a j^{a - 1}, \qquad j = 1, \dots, (L - 2n) / 2

    which for a < 1 prefers short ones, as repetitions in text do. The other tokens are random, or
    0. The label of a query stands at the query's own position: a model reads the key and answers
    the value; nothing is shifted.

    Args:
        num_examples: N sequences.
        vocab_size: V, more than L.
        input_seq_len: L, even, at least 4n.
        num_kv_pairs: n, at least 1.
        power_a: a, positive; 1 draws the gaps uniformly.
        random_non_queries: whether the tokens between queries are uniform over the vocabulary, as
            in the later experiments of the authors, or 0, as in the paper's figure.
        generator: source of the random numbers, whose device the result is on; torch's own by
            default.

    Returns:
        Tokens and labels, both [N, L] int64; the label is the value where a key is asked for and
        -100 elsewhere, which `torch.nn.functional.cross_entropy` ignores.

    Raises:
        ValueError: sizes that do not fit; the message says which.

    Example:
        >>> tokens, labels = mqar(32, vocab_size=128, input_seq_len=64, num_kv_pairs=8)
        >>> tokens.shape, (labels != -100).sum(dim=1).unique()
        (torch.Size([32, 64]), tensor([8]))
    """
    if num_examples < 0:
        raise ValueError(f"mqar: expected num_examples >= 0, got {num_examples}")
    if num_kv_pairs < 1:
        raise ValueError(f"mqar: expected num_kv_pairs >= 1, got {num_kv_pairs}")
    if input_seq_len % 2 or input_seq_len < 4 * num_kv_pairs:
        raise ValueError(
            f"mqar: expected an even input_seq_len of at least 4 * num_kv_pairs = "
            f"{4 * num_kv_pairs}, got {input_seq_len}"
        )
    if vocab_size <= input_seq_len:
        raise ValueError(
            f"mqar: expected vocab_size > input_seq_len = {input_seq_len}, got {vocab_size}"
        )
    if not 0 < power_a < float("inf"):
        raise ValueError(f"mqar: expected a positive power_a, got {power_a}")

    device = generator.device if generator is not None else None
    half, context = vocab_size // 2, 2 * num_kv_pairs
    keys = 1 + _distinct(num_examples, num_kv_pairs, half - 1, generator)
    values = half + _distinct(num_examples, num_kv_pairs, vocab_size - half, generator)

    steps = torch.arange(1, (input_seq_len - context) // 2 + 1, device=device)
    weights = (power_a - 1) * steps.double().log()
    odds = weights.softmax(dim=0).expand(num_examples, -1)
    gaps = torch.multinomial(odds, num_kv_pairs, generator=generator)
    queries = context + 2 * gaps

    shape = (num_examples, input_seq_len)
    if random_non_queries:
        tokens = torch.randint(vocab_size, shape, generator=generator, device=device)
    else:
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
    tokens.scatter_(1, queries, keys)
    labels = torch.full(shape, -100, device=device).scatter_(1, queries, values)
    return tokens, labels


def _distinct(rows: int, count: int, size: int, generator: torch.Generator | None) -> Tensor:
    """`count` different numbers below `size` per row, in random order, by Floyd's algorithm.

    It takes memory for what is drawn; a shuffle of every row's `size` numbers takes gigabytes at
    the published sizes.
    """
    device = generator.device if generator is not None else None
    drawn = torch.empty(rows, count, dtype=torch.int64, device=device)
    for i in range(count):
        last = size - count + i
        new = torch.randint(last + 1, (rows, 1), generator=generator, device=device)
        taken = (drawn[:, :i] == new).any(dim=1)
        drawn[:, i] = torch.where(taken, last, new[:, 0])
    order = torch.rand(rows, count, generator=generator, device=device).argsort(dim=1)
    return drawn.gather(1, order)
