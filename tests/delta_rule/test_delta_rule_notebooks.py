"""The notebooks of this family, which assert what they show."""

from run_notebook import run_notebook


def test_recall() -> None:
    names = run_notebook("delta_rule_recall.ipynb")
    assert min(names["once"]["DeltaNet"]) > 0.95
    assert max(names["once"]["linear attention"]) < 0.9
    assert set(names["twice"]) == {"DeltaNet", "addition, unit keys"}


def test_state_tracking() -> None:
    names = run_notebook("delta_rule_state_tracking.ipynb")
    assert set(names["bit"]) < set(names["word"]) == set(names["kinds"])
    assert all(len(right) == 256 for right in names["word"].values())
    assert names["word"]["DeltaProduct, n = 2, β < 2"][:64].min() > 0.95
