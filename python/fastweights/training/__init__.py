"""The training loop of the conversion, usable with any loss: resumable, interruptible,
deterministic."""

from fastweights.training.loop import TrainingLog, train

__all__ = ["TrainingLog", "train"]
