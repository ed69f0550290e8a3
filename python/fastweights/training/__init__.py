"""Training of causal language models: resumable, interruptible, deterministic."""

from fastweights.training.finetune import finetune
from fastweights.training.loop import TrainingLog, train

__all__ = ["TrainingLog", "finetune", "train"]
