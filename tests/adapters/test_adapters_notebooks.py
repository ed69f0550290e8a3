"""The notebooks of this family, which assert what they show."""

from run_notebook import run_notebook


def test_the_error_of_low_rank_follows_the_bound_of_the_logits() -> None:
    names = run_notebook("adapters_logit_bound.ipynb")
    assert names["errors"][2][-1] > 0.3
    assert names["errors"][16][0] < 1e-12


def test_lora_recovers_most_of_full_tuning() -> None:
    names = run_notebook("adapters_lora.ipynb")
    lora, full = (names["curves"][name][-1] for name in ("LoRA, r = 8", "all parameters"))
    assert lora < 1.06 * full
    assert names["counts"]["LoRA, r = 8"] < names["counts"]["all parameters"] / 6


def test_knowledge_preserved_forgets_less() -> None:
    names = run_notebook("adapters_corda.ipynb")
    forgotten = {name: sum(seeds) for name, seeds in names["forgotten"].items()}
    assert len(forgotten) == 4
    assert forgotten["CorDA, KPM"] < forgotten["LoRA"]
