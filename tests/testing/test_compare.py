import pytest
import torch

from fastweights.testing import assert_close, assert_equal, error


def test_error_is_relative_to_size_and_rms():
    expected = torch.tensor([3.0, 4.0])
    rms = 12.5**0.5
    assert error(torch.tensor([3.0, 4.1]), expected) == pytest.approx(0.1 / (4 + rms), rel=1e-6)
    assert error(torch.zeros(0), torch.zeros(0)) == 0
    assert error(torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_must_be_the_same(value):
    special = torch.tensor([1.0, value])
    assert error(special, special) == 0
    assert error(torch.tensor([1.0, 2.0]), special) == float("inf")
    assert error(special, torch.tensor([1.0, 2.0])) == float("inf")


def test_message_says_where_and_how_far():
    with pytest.raises(
        AssertionError, match=r"o\[1\]: error .* at index \(0, 1\): expected 2, got 3"
    ):
        ok = torch.ones(2)
        assert_close(
            (ok, torch.tensor([[1.0, 3.0]])),
            (ok, torch.tensor([[1.0, 2.0]])),
            tolerance=0.1,
            what="o",
        )


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (torch.ones(2), torch.ones(3)),
        ((torch.ones(2),), (torch.ones(2), None)),
        (None, torch.ones(2)),
        (1, 2),
    ],
)
def test_structure_and_shape_must_agree(got, expected):
    with pytest.raises(AssertionError):
        assert_close(got, expected, tolerance=1.0)


def test_equal_means_dtype_too():
    assert_equal(torch.ones(2), torch.ones(2))
    with pytest.raises(AssertionError, match="dtype"):
        assert_equal(torch.ones(2), torch.ones(2, dtype=torch.float64))
    with pytest.raises(AssertionError):
        assert_equal(torch.ones(2), torch.tensor([1.0, 1.0000001]))
