"""The ops of this family, for tests and benchmarks."""

from __future__ import annotations

from fastweights.testing import OpSpec

SPECS: list[OpSpec] = []
