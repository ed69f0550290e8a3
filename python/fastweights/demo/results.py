"""Results that outlive an interruption: one JSON file, one entry per finished stage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastweights._cli.terminal import say, write_json


class Results:
    """What has been measured so far; every stage runs once and is kept.

    Args:
        path: the JSON file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def stage(self, name: str, run: Callable[[], Any]) -> Any:
        """The result of `run`, from the file if the stage was finished before."""
        stages = self.data.setdefault("stages", {})
        if name not in stages:
            say(f"-- {name}")
            started = time.perf_counter()
            result = run()
            stages[name] = {"seconds": time.perf_counter() - started, "result": result}
            write_json(self._path, self.data)
        return stages[name]["result"]

    def seconds(self, name: str) -> float:
        """How long a finished stage took."""
        return float(self.data["stages"][name]["seconds"])

    def minutes(self, names: Iterable[str]) -> float:
        """How long several stages took together, those that have not run left out."""
        return sum(self.seconds(name) for name in names if self.get(name) is not None) / 60

    def get(self, name: str) -> Any:
        """The result of a finished stage, None if it has not run."""
        stage = self.data.get("stages", {}).get(name)
        return None if stage is None else stage["result"]
