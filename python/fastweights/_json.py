"""JSON of files that are not trusted, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["first_line", "read_json"]


def read_json(path: Path, *, limit: int | None = None) -> dict[str, Any]:
    """An object from a JSON file; ValueError for anything else, or for more bytes than `limit`."""
    try:
        if limit is not None and path.stat().st_size > limit:
            raise ValueError(f"expected at most {limit} bytes")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"load: {path} is damaged: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"load: {path} is damaged: expected an object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name stands in an object twice")
    return value


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
