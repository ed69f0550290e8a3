"""What the commands say to the terminal, and where they read files from."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def fail(command: str, error: BaseException) -> int:
    """Say in one line on stderr why `command` cannot be done; its exit code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0].removeprefix(f"{command}: ")
    print(f"fastweights {command}: {text}", file=sys.stderr)
    return 2


def say(text: str) -> None:
    """A line of progress on stderr: stdout carries results only."""
    print(text, file=sys.stderr, flush=True)


def existing(path: str, what: str) -> Path:
    """`path` if it exists.

    Raises:
        ValueError: it does not.
    """
    found = Path(path)
    if not found.exists():
        raise ValueError(f"expected {what}, found nothing at {path}")
    return found


def output_folder(path: str) -> Path:
    """`path` as a folder to write into, made if needed.

    Raises:
        ValueError: something else is there, or it cannot be written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write into {path}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write into {path}: no permission")
    return folder


def read_texts(paths: Sequence[str]) -> list[str]:
    """The text files at `paths`.

    Raises:
        ValueError: one is missing, unreadable, empty or not UTF-8.
    """
    texts = []
    for path in paths:
        try:
            texts.append(existing(path, "a text file").read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"expected text in UTF-8 in {path}, got byte {error.object[error.start]:#x}"
            ) from error
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        if not texts[-1].strip():
            raise ValueError(f"expected text in {path}, got an empty file")
    return texts


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write `data` as JSON, whole or not at all."""
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    partial.replace(target)
