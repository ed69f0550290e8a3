"""Text that ships with CPython, and its packing into one stream of tokens."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

# pdb.py: a chapter of the language reference is its docstring.
_LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "pdb.py",
}  # fmt: skip


def standard_library_docstrings(*, seed: int | None = 0) -> list[str]:
    """The docstrings of CPython's standard library, one document per module.

    A module's own docstring comes first, then those of its classes and functions behind their
    names. About 1.7 MB.

    Args:
        seed: shuffles the documents; None keeps them sorted by path.
    """
    documents = list(_module_docstrings())
    if seed is not None:
        Random(seed).shuffle(documents)
    return documents


@cache
def _module_docstrings() -> tuple[str, ...]:
    """One document per module, sorted by path; parsing them all takes seconds."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts) and (text := _docstrings(path)):
            documents.append(text)
    return tuple(documents)


def topic_documents() -> list[str]:
    """The chapters of the language reference in `pydoc_data.topics`, sorted by title. About 0.5 MB.

    They share no text with the docstrings of the library, so they serve as held-out text of the
    same field.
    """
    from pydoc_data import topics

    return [text for _, text in sorted(topics.topics.items())]


def pack(tokenizer: Any, documents: Iterable[str], *, separator: str = "\n\n\n") -> Tensor:
    """All documents as one stream of token ids `[N]`, int64, without special tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        documents: the texts, in order.
        separator: ends every document.
    """
    batch = tokenizer([d + separator for d in documents], add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in batch for token in ids], dtype=torch.int64)


def windows(tokens: Tensor, length: int, count: int, *, seed: int = 0) -> Tensor:
    """`[count, length]` int64: runs of consecutive tokens from random places.

    Args:
        tokens: `[N]`, N >= length.
        length: tokens of a window.
        count: windows; they may overlap.
        seed: of the places, which depend on nothing else.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length + 1, (count,), generator=generator)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (
        SyntaxError,
        UnicodeDecodeError,
        ValueError,
    ):  # files made to fail, such as lib2to3's data
        return ""
    parts = []
    for node in ast.walk(tree):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and (text := ast.get_docstring(node)):
            parts.append(text if isinstance(node, ast.Module) else f"{node.name}: {text}")
    return "\n\n".join(parts)
