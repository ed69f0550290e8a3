"""Text to train and evaluate on that needs no download."""

from fastweights.data.text import pack, standard_library_docstrings, topic_documents, windows

__all__ = ["pack", "standard_library_docstrings", "topic_documents", "windows"]
