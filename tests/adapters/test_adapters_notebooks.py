"""The notebooks of this family, which assert what they show."""

from run_notebook import run_notebook


def test_the_error_of_low_rank_follows_the_bound_of_the_logits() -> None:
    names = run_notebook("adapters_logit_bound.ipynb")
    assert names["errors"][2][-1] > 0.3
    assert names["errors"][16][0] < 1e-12


def test_what_adapters_learn_and_forget() -> None:
    names = run_notebook("adapters_forgetting.ipynb")
    assert len(names["curves"]) == len(names["forgotten"]) == 5
    assert names["forgotten"]["CorDA, knowledge-preserved"] < names["forgotten"]["LoRA"]
