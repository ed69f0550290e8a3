import pytest
import torch

from fastweights.generation.sampling import Sampler

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def draws(sampler: Sampler, logits: torch.Tensor, n: int = 4000) -> torch.Tensor:
    return torch.stack([sampler(logits)[0] for _ in range(n)]).bincount(minlength=4) / n


def test_greedy_takes_the_largest() -> None:
    assert Sampler(2)(torch.tensor([[0.0, 3.0], [1.0, 0.0]])).tolist() == [1, 0]


def test_temperature_samples_the_softmax() -> None:
    got = draws(Sampler(1, temperature=0.7, seed=0), LOGITS)
    torch.testing.assert_close(got, (LOGITS[0] / 0.7).softmax(-1), atol=0.03, rtol=0)


def test_top_k_keeps_k_and_renormalises() -> None:
    got = draws(Sampler(1, temperature=1.0, top_k=2, seed=0), LOGITS)
    expected = torch.cat((LOGITS[0, :2].softmax(-1), torch.zeros(2)))
    torch.testing.assert_close(got, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("top_p, kept", [(0.5, 1), (0.65, 2), (0.9, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, kept: int) -> None:
    # probabilities .64 .24 .09 .03
    got = draws(Sampler(1, temperature=1.0, top_p=top_p, seed=0), LOGITS)
    assert (got > 0).tolist() == [i < kept for i in range(4)]


def test_top_p_of_a_flat_distribution_reaches_beyond_the_first_thousand() -> None:
    sampler = Sampler(1, temperature=1.0, top_p=0.9, seed=0)
    _, p = sampler._candidates(torch.zeros(3000))
    assert abs(len(p) - 2700) <= 1


def test_a_row_draws_the_same_whatever_its_neighbours() -> None:
    logits = torch.randn(3, 50)
    alone = Sampler(1, temperature=1.0, seed=5)
    together = Sampler(3, temperature=1.0, seed=5)
    for _ in range(20):
        assert together(logits)[0] == alone(logits[:1])[0]


def test_torchs_seed_decides_without_one() -> None:
    def run() -> list[int]:
        torch.manual_seed(3)
        sampler = Sampler(1, temperature=1.0)
        return [int(sampler(torch.zeros(1, 1000))) for _ in range(5)]

    assert run() == run()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_a_setting_out_of_range_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"generate: expected .*{next(iter(bad))}"):
        Sampler(1, **{"temperature": 1.0, **bad})
