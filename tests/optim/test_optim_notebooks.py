"""The notebook of this family, which asserts what it shows."""

from run_notebook import run_notebook


def test_four_curves() -> None:
    names = run_notebook("optim_block_wise.ipynb")
    assert len(names["curves"]) == len(names["final"]) == 4
    exact, coded = (names["final"][name] for name in ("32 bits", "8 bits, block-wise dynamic"))
    assert abs(coded - exact) < 0.01 * exact
    assert exact < 0.7 * names["curves"]["32 bits"][0]
