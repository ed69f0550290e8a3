import pytest
import torch

from fastweights.data import mqar

V, L, N = 128, 64, 8


def draw(num_examples=200, seed=0, **kwargs):
    sizes = {"vocab_size": V, "input_seq_len": L, "num_kv_pairs": N} | kwargs
    return mqar(num_examples, generator=torch.Generator().manual_seed(seed), **sizes)


def queries(labels):
    """Where each row is asked, [N, n]."""
    return (labels != -100).nonzero()[:, 1].view(len(labels), -1)


@pytest.mark.parametrize("random_non_queries", [True, False])
@pytest.mark.parametrize("vocab_size, length, pairs", [(128, 64, 8), (65, 64, 16), (5, 4, 1)])
def test_it_is_the_definition(vocab_size, length, pairs, random_non_queries):
    tokens, labels = draw(
        vocab_size=vocab_size,
        input_seq_len=length,
        num_kv_pairs=pairs,
        random_non_queries=random_non_queries,
    )
    assert tokens.shape == labels.shape == (200, length)
    assert tokens.dtype == labels.dtype == torch.int64
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert min(keys) >= 1 and max(keys) < vocab_size // 2 <= min(values)
        assert max(values) < vocab_size
        value_of = dict(zip(keys, values, strict=True))
        asked = [t for t, answer in enumerate(answers) if answer != -100]
        assert sorted(row[t] for t in asked) == sorted(keys)  # each key once
        for t in asked:
            assert t >= 2 * pairs and t % 2 == 0
            assert answers[t] == value_of[row[t]]
        rest = [row[t] for t in range(2 * pairs, length) if t not in asked]
        assert random_non_queries or not any(rest)


def test_keys_values_and_fillers_are_uniform():
    tokens, labels = draw(4000)
    for picked, low, size in (
        (tokens[:, 0 : 2 * N : 2], 1, V // 2 - 1),
        (tokens[:, 1 : 2 * N : 2], V // 2, V // 2),
        (tokens[:, 2 * N :][labels[:, 2 * N :] == -100], 0, V),
    ):
        counts = torch.bincount(picked.flatten() - low, minlength=size)
        assert len(counts) == size
        assert_follows(counts, torch.full((size,), 1 / size))


def assert_follows(counts, p):
    """Pearson's statistic, within five standard deviations of its mean."""
    expected = p * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(p) - 1
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def gaps_of_keys(tokens, labels):
    """The gap of the i-th key, [N, n], in the order of the keys."""
    where = queries(labels)
    asked, keys = tokens.gather(1, where), tokens[:, 0 : 2 * N : 2]
    order = (keys[:, :, None] == asked[:, None, :]).int().argmax(dim=-1)
    return (where.gather(1, order) - 2 * N) // 2


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0, 2.0])
def test_gaps_follow_the_power_law_without_replacement(power_a):
    gaps = gaps_of_keys(*draw(20_000, power_a=power_a))
    space = (L - 2 * N) // 2
    j = torch.arange(1, space + 1, dtype=torch.float64)
    p = power_a * j ** (power_a - 1)
    p = p / p.sum()
    assert_follows(torch.bincount(gaps[:, 0], minlength=space), p)
    # The second: p of what the first has left.
    second = p * ((p / (1 - p)).sum() - p / (1 - p))
    assert_follows(torch.bincount(gaps[:, 1], minlength=space), second)


def test_the_generator_decides():
    first, again, other = draw(seed=1), draw(seed=1), draw(seed=2)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    torch.manual_seed(3)
    a = mqar(4)
    torch.manual_seed(3)
    assert all(map(torch.equal, a, mqar(4)))


def test_no_examples():
    tokens, labels = draw(0)
    assert tokens.shape == labels.shape == (0, L)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"num_examples": -1}, "num_examples >= 0, got -1"),
        ({"num_kv_pairs": 0}, "num_kv_pairs >= 1, got 0"),
        ({"input_seq_len": 63}, r"even input_seq_len of at least 4 \* num_kv_pairs = 32, got 63"),
        ({"input_seq_len": 30}, r"at least 4 \* num_kv_pairs = 32, got 30"),
        ({"vocab_size": 64}, "vocab_size > input_seq_len = 64, got 64"),
        ({"power_a": 0.0}, "a positive power_a, got 0.0"),
        ({"power_a": float("nan")}, "a positive power_a, got nan"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=f"^mqar: expected .*{message}"):
        draw(**sizes)
