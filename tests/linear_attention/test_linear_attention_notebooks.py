"""The notebooks of this family run from top to bottom."""

import pytest
import torch

from run_notebook import run_notebook


def test_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_notebook("linear_attention_gradients.ipynb")
    assert names["normed"].isfinite().all()
    assert names["divided"].log().var() > 10 * names["normed"].log().var()
    assert "NormAttention" in capsys.readouterr().out


def test_length() -> None:
    names = run_notebook("linear_attention_length.ipynb")
    assert len(names["linear"]) == len(names["lengths"])
    assert torch.tensor(names["decode"]).isfinite().all()
