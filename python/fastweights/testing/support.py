"""Which op runs on which device, in which dtypes, with which gradients: read from the specs."""

from __future__ import annotations

import torch

from fastweights._tables import print_table
from fastweights.testing.opspec import OpSpec, all_specs

__all__ = ["HEADER", "print_support", "support_rows"]

HEADER = ("op", "family", "cpu", "cuda", "dtypes", "gradients", "compile, export")
_SHORT = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}


def _device(spec: OpSpec, key: str) -> str:
    if not hasattr(torch.ops.fastweights, spec.name):
        return "composite"
    has = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastweights::{spec.name}", key)
    return "kernel" if has else "reference"


def support_rows() -> list[tuple[str, ...]]:
    """One row per op under `HEADER`.

    "kernel": an op of that name is registered for the device; "reference": plain torch runs there;
    "composite": made of other ops.
    """
    return [
        (
            spec.name,
            spec.family,
            _device(spec, "CPU"),
            _device(spec, "CUDA"),
            " ".join(_SHORT[dtype] for dtype in _SHORT if dtype in spec.tolerances),
            ", ".join(spec.differentiable) or ("in place" if spec.mutates else "none"),
            "yes" if spec.exports else "compile",
        )
        for spec in all_specs()
    ]


def print_support() -> None:
    """Print the support matrix."""
    print_table(HEADER, support_rows())
