"""The facts about a machine and a build that a figure or a bug report means nothing without."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from fastweights._load import _C

__all__ = ["facts"]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def facts() -> dict[str, str]:
    """Name -> value, in the order to print."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("fastweights")
    except PackageNotFoundError:
        own = "not installed (imported from a source tree)"
    build = _C.build_facts()
    return {
        "fastweights": own,
        "torch": f"{torch.__version__} (built against {build['torch']})",
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(torch.get_num_threads()),
        "cpu level": f"{_C.cpu_level()} (best here: {_C.best_cpu_level()}; "
        f"built: {', '.join(build['cpu_levels'])})",
        "compiler": f"{build['compiler']}, {build['build_type']}",
        "backend": os.environ.get("FASTWEIGHTS_BACKEND", "native"),
    }
