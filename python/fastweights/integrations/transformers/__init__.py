"""Hugging Face transformers: `patch` makes its models fast, caches serve converted ones."""

from fastweights.integrations.transformers.converted import StateCache, StateLayer
from fastweights.integrations.transformers.patching import patch, patched, stats, unpatch

__all__ = ["StateCache", "StateLayer", "patch", "patched", "stats", "unpatch"]
