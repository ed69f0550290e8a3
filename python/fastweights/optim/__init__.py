"""Optimizers with states of 8 or 32 bits over one fused, block-wise step of many tensors."""

from fastweights.optim.adam import Adam, Adam8bit, AdamW, AdamW8bit
from fastweights.optim.embedding import StableEmbedding
from fastweights.optim.lion import Lion, Lion8bit
from fastweights.optim.overrides import GlobalOptimManager
from fastweights.optim.sgd import SGD, SGD8bit

__all__ = [  # noqa: RUF022  (SGD is no constant)
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW8bit",
    "GlobalOptimManager",
    "Lion",
    "Lion8bit",
    "SGD",
    "SGD8bit",
    "StableEmbedding",
]
