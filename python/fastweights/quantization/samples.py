"""What calibration runs through a model: texts or batches, one sample at a time."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastweights.data import pack

__all__ = ["Sample", "read_samples"]

# Texts become at most so many sequences of so many tokens.
_SEQUENCES, _LENGTH = 128, 512


@dataclass(frozen=True)
class Sample:
    """The arguments of one forward pass."""

    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self, model: nn.Module, *, all_logits: bool = False) -> Any:
        """The output of a model; what only generation needs is left out where that is known."""
        options = dict(self.options)
        parameters = inspect.signature(model.forward).parameters
        if "use_cache" in parameters:
            options.setdefault("use_cache", False)
        if "logits_to_keep" in parameters and not all_logits and "labels" not in options:
            options.setdefault("logits_to_keep", 1)
        return model(*self.args, **options)


def read_samples(
    calibration: Any, tokenizer: Any = None, function: str = "quantize_"
) -> list[Sample]:
    """Samples from all that a user may hold.

    Args:
        calibration: a tensor, whose rows are samples (tokens int64 ``[B, T]`` for a language
            model); or texts, with a tokenizer, which are joined and cut into up to 128 sequences of
            512 tokens; or batches, such as a DataLoader: a tensor, a tuple of positional or a
            mapping of keyword arguments each.
        tokenizer: of Hugging Face, for texts.
        function: that errors name.

    Raises:
        ValueError: nothing, or texts without a tokenizer.
        TypeError: something else.
    """
    if isinstance(calibration, str):
        calibration = [calibration]
    if isinstance(calibration, Tensor):
        if calibration.dim() < 2:
            raise ValueError(
                f"{function}: expected calibration of shape [samples, ...], "
                f"got {list(calibration.shape)}"
            )
        batches: list[Any] = list(calibration.split(1))
    elif isinstance(calibration, Iterable):
        batches = list(calibration)
    else:
        raise TypeError(
            f"{function}: expected calibration to be a tensor, texts or batches, "
            f"got {type(calibration).__name__}"
        )
    if batches and all(isinstance(batch, str) for batch in batches):
        batches = list(_sequences(batches, tokenizer, function).split(1))
    samples = [_sample(batch, function) for batch in batches]
    if not any(t.numel() for sample in samples for t in _tensors(sample)):
        raise ValueError(f"{function}: expected calibration with at least one sample, got none")
    return samples


def fingerprint(samples: list[Sample]) -> str:
    """Tells one calibration from another."""
    digest = hashlib.sha256()
    for sample in samples:
        for tensor in _tensors(sample):
            digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
            digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """The elements of a tensor as they lie in memory."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _tensors(sample: Sample) -> list[Tensor]:
    leaves = pytree.tree_leaves((sample.args, sample.options))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _sequences(texts: list[str], tokenizer: Any, function: str) -> Tensor:
    if tokenizer is None:
        raise ValueError(f"{function}: expected a tokenizer with texts as calibration, got None")
    tokens = pack(tokenizer, texts)
    if not len(tokens):
        raise ValueError(f"{function}: expected calibration with text, got none")
    length = min(_LENGTH, len(tokens))
    count = min(_SEQUENCES, len(tokens) // length)
    return tokens[: count * length].reshape(count, length)


def _sample(batch: Any, function: str) -> Sample:
    if isinstance(batch, Tensor):
        return Sample((batch,), {})
    if isinstance(batch, Mapping):
        return Sample((), dict(batch))
    if isinstance(batch, (tuple, list)):
        return Sample(tuple(batch), {})
    raise TypeError(
        f"{function}: expected every batch of calibration to be a tensor, a tuple or a mapping, "
        f"got {type(batch).__name__}"
    )
