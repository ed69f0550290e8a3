"""The notebooks of this family run from top to bottom."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def run(name: str) -> dict[str, Any]:
    """Execute the code cells in one namespace and return it."""
    matplotlib.use("Agg")
    namespace: dict[str, Any] = {}
    for cell in json.loads((NOTEBOOKS / name).read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
    plt.close("all")
    return namespace


def test_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("linear_attention_gradients.ipynb")
    assert names["normed"].isfinite().all()
    assert names["divided"].log().var() > 10 * names["normed"].log().var()
    assert "NormAttention" in capsys.readouterr().out


def test_length() -> None:
    names = run("linear_attention_length.ipynb")
    assert len(names["linear"]) == len(names["lengths"])
    assert torch.tensor(names["decode"]).isfinite().all()
