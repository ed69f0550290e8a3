"""States in files: restored exactly, and never trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fastweights as fw
from tiny_models import linear_model, quantized_model


@pytest.fixture(scope="module")
def model() -> Any:
    return quantized_model()


@pytest.fixture()
def file(model: Any, tmp_path: Path) -> Path:
    fw.prefill(model, [5, 9, 3, 17, 40, 2, 66]).save(tmp_path / "a.state")
    return tmp_path / "a.state"


def rewritten(file: Path, change: Any) -> Path:
    with safe_open(file, framework="pt") as f:
        tensors, metadata = {key: f.get_tensor(key) for key in f.keys()}, f.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, file, metadata)
    return file


@pytest.mark.parametrize("recipe", ["stable", "hedgehog"])
def test_a_state_survives_its_file(recipe: str, tmp_path: Path) -> None:
    model = linear_model(recipe)
    state = fw.prefill(model, [5, 9, 3, 17, 40, 2, 66])
    state.save(tmp_path / "a.state")
    loaded = fw.load_state(model, tmp_path / "a.state")
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, loaded.tensors()[name])
    expected = fw.generate(model, [8], state=state, max_new_tokens=8, stop=())
    assert fw.generate(model, [8], state=loaded, max_new_tokens=8, stop=()).ids == expected.ids


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, m: m.update(format="other"), "expected a state file"),
        (lambda t, m: m.update(model="other"), "another model"),
        (lambda t, m: t.pop("layers.1.S"), "layers.1.S is missing"),
        (lambda t, m: t.update(logits=t["logits"][:, :-1]), "expected logits of shape"),
        (
            lambda t, m: t.update({"layers.0.k": t["layers.0.k"].half()}),
            "expected layers.0.k of torch.float32",
        ),
        (lambda t, m: t.update(tokens=t["tokens"] - 100), "token counts"),
        (
            lambda t, m: t.update({"layers.0.position": t["layers.0.position"] + 2**60}),
            "token counts",
        ),
    ],
)
def test_another_or_damaged_state_is_refused(
    model: Any, file: Path, change: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"state a.state: .*{message}"):
        fw.load_state(model, rewritten(file, change))


def test_truncated_and_foreign_files_are_refused(model: Any, file: Path) -> None:
    data = file.read_bytes()
    for damaged in (data[: len(data) // 2], data[:7], b"", b"\xff" * 64, data[:8] + b"{" * 100):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state a\.state: cannot be read"):
            fw.load_state(model, file)
    with pytest.raises(ValueError, match="cannot be read"):
        fw.load_state(model, file.with_name("nothing"))


def test_a_state_of_another_model_is_refused(model: Any) -> None:
    state = fw.prefill(linear_model(), [3])
    with pytest.raises(ValueError, match="another model"):
        fw.generate(model, [3], state=state)
