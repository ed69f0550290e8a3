"""Words over a group: what a recurrence can track only if its transitions can.

Parity is the group of two elements; words over S_5 are as hard as any regular language (NC^1).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, permutations

import torch
from torch import Tensor

__all__ = ["parity", "permutation_words", "symmetric_group"]


def parity(
    num_examples: int, seq_len: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random bits, and whether an odd number of ones has come so far.

    Args:
        num_examples: N sequences.
        seq_len: their length T.
        generator: source of the bits, whose device the result is on; torch's own by default.

    Returns:
        Bits and labels, both [N, T] int64; label t counts bit t too.

    Raises:
        ValueError: a negative size.

    Example:
        >>> bits, labels = parity(32, 64)
        >>> torch.equal(labels[:, -1], bits.sum(dim=1) % 2)
        True
    """
    _check_sizes("parity", num_examples, seq_len)
    bits = _random(2, (num_examples, seq_len), generator)
    return bits, bits.cumsum(dim=1) % 2


def permutation_words(
    num_examples: int,
    seq_len: int,
    *,
    n: int = 3,
    elements: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The word problem of S_n: random permutations, and their product so far.

    A token is an element of `symmetric_group(n)`, by its row; the label at t is the row of
    x_t ∘ ... ∘ x_1, the first token acting first. "The Illusion of State in State-Space Models"
    (arXiv:2404.08819) and DeltaProduct (arXiv:2502.10297) measure state tracking by it.

    Args:
        num_examples: N sequences.
        seq_len: their length T.
        n: permutations of n things: n! tokens.
        elements: rows that tokens are drawn from, all by default: the swaps only, for example.
            Labels are still any product of them.
        generator: source of the tokens, whose device the result is on; torch's own by default.

    Returns:
        Tokens and labels, both [N, T] int64.

    Raises:
        ValueError: a negative size, n out of 1 to 8, or rows that do not exist.

    Example:
        >>> tokens, labels = permutation_words(32, 64, n=3)
        >>> torch.equal(labels[:, 0], tokens[:, 0]), labels.max().item() < 6
        (True, True)
    """
    _check_sizes("permutation_words", num_examples, seq_len)
    group = symmetric_group(n)
    rows = torch.arange(len(group)) if elements is None else torch.tensor(list(elements))
    if not len(rows) or rows.min() < 0 or rows.max() >= len(group):
        raise ValueError(
            f"permutation_words: expected elements from 0 to {len(group) - 1}, got {elements}"
        )
    picked = _random(len(rows), (num_examples, seq_len), generator)
    group, rows = group.to(picked.device), rows.to(picked.device)
    tokens = rows[picked]
    moves = group[tokens].unbind(dim=1)
    products = list(accumulate(moves, lambda product, move: move.gather(1, product)))
    if not products:
        return tokens, tokens.clone()
    # In lexicographic order the entries, read as the digits of a number, increase.
    place = n ** torch.arange(n - 1, -1, -1, device=picked.device)
    codes = (torch.stack(products, dim=1) * place).sum(dim=-1)
    return tokens, torch.searchsorted((group * place).sum(dim=-1), codes)


def symmetric_group(n: int) -> Tensor:
    """The permutations of 0 to n - 1 in lexicographic order, [n!, n] int64; row 0 changes nothing.

    The element p carries what is at i to p[i]: p after q is `p[q]`.

    Args:
        n: 1 to 8.

    Raises:
        ValueError: another n.

    Example:
        >>> symmetric_group(3).tolist()
        [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    """
    if not 1 <= n <= 8:
        raise ValueError(f"symmetric_group: expected n from 1 to 8, got {n}")
    return torch.tensor(list(permutations(range(n))))


def _check_sizes(name: str, num_examples: int, seq_len: int) -> None:
    if num_examples < 0 or seq_len < 0:
        raise ValueError(
            f"{name}: expected num_examples >= 0 and seq_len >= 0, got {num_examples} and {seq_len}"
        )


def _random(size: int, shape: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else None
    return torch.randint(size, shape, generator=generator, device=device)
