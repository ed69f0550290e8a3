"""benchmarks/transformers_patch.py on tiny models: it checks, times and writes what it says."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "transformers_patch.py"
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("transformers_patch", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, (config, sizes) in script.MODELS.items():
        monkeypatch.setitem(script.MODELS, name, (config, sizes | SMALL))
    monkeypatch.setattr(script, "STEPS", 2)
    monkeypatch.setattr(script, "ROUNDS", 1)
    return script


def test_every_case_has_its_figures(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "PROMPT", 9)
    benchmark.main([], tmp_path)
    results = json.loads((tmp_path / "transformers_patch.json").read_text())
    page = (tmp_path / "transformers_patch.md").read_text()
    assert set(results) == set(benchmark.CASES)
    for case, result in results.items():
        assert f"## {case}" in page
        for speeds in result["tokens/s"].values():
            assert all(speed > 0 for speed in speeds.values())
        for ways in result["milliseconds"].values():
            assert all(ways["patched"][part] > 0 for part in ("delta rule", "matrix products"))


def test_nothing_is_timed_that_disagrees(benchmark, monkeypatch):
    from fastweights.integrations.transformers import kernels

    def wrong(*args, **kwargs):
        o, state = kernels.chunk_delta_rule(*args, **kwargs)
        return o.flip(-1), state

    monkeypatch.setitem(kernels.FUNCTIONS, "chunk_gated_delta_rule", wrong)
    model = benchmark.build("qwen3_next")
    with pytest.raises(AssertionError, match="not close"):
        benchmark.check(model, 9)
