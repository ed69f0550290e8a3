"""What a test, a benchmark or a bug report needs: comparisons, CPU levels and the table of ops."""

from fastweights.testing.compare import assert_close, assert_equal, error
from fastweights.testing.levels import available_cpu_levels, cpu_level
from fastweights.testing.opspec import (
    BadInput,
    BenchCase,
    OpSpec,
    Peer,
    Sample,
    Tolerance,
    all_specs,
    sample,
)

__all__ = [
    "BadInput",
    "BenchCase",
    "OpSpec",
    "Peer",
    "Sample",
    "Tolerance",
    "all_specs",
    "assert_close",
    "assert_equal",
    "available_cpu_levels",
    "cpu_level",
    "error",
    "sample",
]
