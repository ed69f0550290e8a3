"""The training loop of the conversion: any loss, resumable, interruptible, deterministic."""

from fastweights.training.loop import TrainingLog, train

__all__ = ["TrainingLog", "train"]
