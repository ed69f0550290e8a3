import math

import pytest
import torch

from fastweights.data import parity, permutation_words, symmetric_group


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_parity_counts_ones():
    bits, labels = parity(50, 33, generator=seeded())
    assert bits.shape == labels.shape == (50, 33) and bits.dtype == labels.dtype == torch.int64
    for row, answers in zip(bits.tolist(), labels.tolist(), strict=True):
        assert answers == [sum(row[: t + 1]) % 2 for t in range(33)]
    assert set(bits.unique().tolist()) == {0, 1} and 0.4 < bits.double().mean() < 0.6


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_symmetric_group_is_the_group(n):
    group = symmetric_group(n)
    rows = [tuple(p) for p in group.tolist()]
    assert len(set(rows)) == len(rows) == math.factorial(n)
    assert rows == sorted(rows) and rows[0] == tuple(range(n))
    assert all(sorted(p) == list(range(n)) for p in rows)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_labels_are_products_the_first_token_acting_first(n):
    group = symmetric_group(n).tolist()
    tokens, labels = permutation_words(20, 17, n=n, generator=seeded(n))
    assert tokens.shape == labels.shape == (20, 17) and labels.dtype == torch.int64
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        places = list(range(n))  # of the things that started at 0, 1, ...
        for token, answer in zip(row, answers, strict=True):
            places = [group[token][i] for i in places]
            assert group[answer] == places


def test_labels_are_products_of_matrices():
    """What a recurrence multiplies: P_x e_i = e_{x[i]}, and the later token on the left."""
    group = symmetric_group(4)
    matrices = torch.nn.functional.one_hot(group).mT
    tokens, labels = permutation_words(10, 9, n=4, generator=seeded())
    state = torch.eye(4, dtype=torch.int64).expand(10, 4, 4)
    for t in range(9):
        state = matrices[tokens[:, t]] @ state
        assert torch.equal(state, matrices[labels[:, t]])


def test_every_element_comes_as_token_and_as_label():
    tokens, labels = permutation_words(500, 40, n=3, generator=seeded())
    for x in (tokens, labels):
        assert torch.allclose(
            torch.bincount(x.flatten()) / x.numel(), torch.tensor(1 / 6), atol=0.01
        )


def test_tokens_come_from_the_elements_that_are_asked_for():
    swaps = [row for row, p in enumerate(symmetric_group(3)) if (p != torch.arange(3)).sum() == 2]
    tokens, labels = permutation_words(50, 20, elements=swaps, generator=seeded())
    assert tokens.unique().tolist() == swaps and labels.unique().tolist() == list(range(6))
    # A product of t swaps is odd where t is, so that half of the labels are out of reach.
    assert all((row in swaps) == (t % 2 == 0) for t in range(20) for row in labels[:, t].tolist())


def test_parity_is_the_word_problem_of_two_things():
    bits, labels = parity(30, 20, generator=seeded(4))
    assert all(
        map(torch.equal, (bits, labels), permutation_words(30, 20, n=2, generator=seeded(4)))
    )


@pytest.mark.parametrize("task", [parity, permutation_words])
def test_the_generator_decides(task):
    first, again, other = (task(8, 16, generator=seeded(s)) for s in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


@pytest.mark.parametrize("task", [parity, permutation_words])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing(task, shape):
    assert all(x.shape == shape and x.dtype == torch.int64 for x in task(*shape))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: parity(-1, 4),
            "parity: expected num_examples >= 0 and seq_len >= 0, got -1 and 4",
        ),
        (lambda: permutation_words(2, -3), "permutation_words: .* got 2 and -3"),
        (lambda: permutation_words(2, 3, n=9), "symmetric_group: expected n from 1 to 8, got 9"),
        (lambda: symmetric_group(0), "symmetric_group: expected n from 1 to 8, got 0"),
        (lambda: permutation_words(2, 3, elements=[6]), r"elements from 0 to 5, got \[6\]"),
        (lambda: permutation_words(2, 3, elements=[]), r"elements from 0 to 5, got \[\]"),
    ],
)
def test_bad_sizes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
