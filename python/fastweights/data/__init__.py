"""Data that needs no download: text, and synthetic tasks of recall and of state tracking."""

from fastweights.data.mqar import mqar
from fastweights.data.state_tracking import parity, permutation_words, symmetric_group
from fastweights.data.text import pack, standard_library_docstrings, topic_documents, windows

__all__ = [
    "mqar",
    "pack",
    "parity",
    "permutation_words",
    "standard_library_docstrings",
    "symmetric_group",
    "topic_documents",
    "windows",
]
