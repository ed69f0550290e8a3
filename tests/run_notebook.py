"""Notebooks as tests: their own asserts hold what they claim."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def run_notebook(name: str) -> dict[str, Any]:
    """Execute the code cells from top to bottom in one namespace and return it."""
    matplotlib.use("Agg")
    namespace: dict[str, Any] = {}
    for cell in json.loads((NOTEBOOKS / name).read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
    plt.close("all")
    return namespace
