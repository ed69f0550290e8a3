"""The demo's measurement of speed: in a process of its own, on real models of any attention."""

import pytest
import torch

import fastweights as fw
from fastweights.demo.model import Text
from fastweights.demo.speed import measure
from tiny_models import VOCAB, quantized_model, softmax_model, tokenizer


@pytest.mark.parametrize(
    ("make", "dtype"), [(quantized_model, "float32"), (softmax_model, "bfloat16")]
)
def test_every_context_has_its_row(make, dtype, tmp_path):
    fw.save(make(), tokenizer(), tmp_path / "model")
    Text(*torch.randint(0, VOCAB, (2, 80))).save(tmp_path / "text.safetensors")
    rows = measure(tmp_path / "model", tmp_path / "text.safetensors", (8, 40), dtype=dtype)
    assert list(rows) == ["8", "40"]
    for row in rows.values():
        assert set(row) == {"tokens/s", "prefill tokens/s", "MB"}
        assert all(value > 0 for value in row.values())
