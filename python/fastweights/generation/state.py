"""What a linearised model remembers of the tokens that it has read: kept, saved and restored."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_FORMAT = "fastweights-state-1"


@dataclass
class GenerationState:
    """Prompts that a linearised model has read, ready to be continued any number of times.

    Attributes:
        layers: the state of every layer, a `HybridState` or the pair (S, z) of pure linear
            attention. The first dimension of its tensors is the prompts.
        tokens: tokens read so far, int64 `[B]`.
        logits: float32 `[B, V]`, of the token that follows each prompt.
        model: the fingerprint of the model that read them.
    """

    layers: list[Any]
    tokens: Tensor
    logits: Tensor
    model: str

    def select(self, rows: Sequence[int]) -> GenerationState:
        """A copy with the given rows; a row may come several times."""
        index = torch.tensor(rows, dtype=torch.int64)
        layers = [
            pytree.tree_map(lambda t: t.index_select(0, index), layer) for layer in self.layers
        ]
        return GenerationState(layers, self.tokens[index], self.logits[index], self.model)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name: `tokens`, `logits`, `layers.0.k`, ..."""
        named = {"tokens": self.tokens, "logits": self.logits}
        for i, layer in enumerate(self.layers):
            for path, tensor in pytree.tree_flatten_with_path(layer)[0]:
                named[f"layers.{i}.{pytree.keystr(path).strip('.[]')}"] = tensor
        return named

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as a safetensors file."""
        from safetensors.torch import save_file

        tensors = {name: tensor.clone().contiguous() for name, tensor in self.tensors().items()}
        save_file(tensors, os.fspath(path), {"format": _FORMAT, "model": self.model})

    def restore(self, path: str | os.PathLike[str]) -> GenerationState:
        """Read the file of a state of the same model and number of rows.

        `self` says what a valid one looks like.

        Raises:
            ValueError: no state file, a damaged one, or the state of another model.
        """
        from safetensors import SafetensorError, safe_open

        name = Path(path).name
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(
                        f"state {name}: expected a state file of fastweights, got another one"
                    )
                if metadata.get("model") != self.model:
                    raise ValueError(
                        f"state {name}: expected a state of this model, got one of another model"
                    )
                tensors = {
                    key: _checked(file, key, like, name) for key, like in self.tensors().items()
                }
        except (OSError, SafetensorError) as error:
            raise ValueError(f"state {name}: cannot be read: {error}") from error
        counts = [t for key, t in tensors.items() if key == "tokens" or key.endswith(".position")]
        if (
            any((t < 0).any() or (t != counts[0]).any() for t in counts)
            or (counts[0] >= 2**48).any()
        ):
            raise ValueError(f"state {name}: damaged: its token counts do not agree")
        _, spec = pytree.tree_flatten(self.layers)
        layers = pytree.tree_unflatten(
            [t for key, t in tensors.items() if key.startswith("layers.")], spec
        )
        return GenerationState(layers, tensors["tokens"], tensors["logits"], self.model)


def _checked(file: Any, key: str, like: Tensor, name: str) -> Tensor:
    """The tensor `key` of an open file, if it has the shape and dtype of `like`."""
    if key not in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
        raise ValueError(f"state {name}: damaged: {key} is missing")
    shape, expected = list(file.get_slice(key).get_shape()), list(like.shape)
    if shape != expected:
        raise ValueError(f"state {name}: damaged: expected {key} of shape {expected}, got {shape}")
    tensor: Tensor = file.get_tensor(key)
    if tensor.dtype != like.dtype:
        raise ValueError(
            f"state {name}: damaged: expected {key} of {like.dtype}, got {tensor.dtype}"
        )
    return tensor


def fingerprint(model: nn.Module) -> str:
    """A hash that two models share only if their sizes and a sample of their weights agree."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sample = (
            tensor.detach().reshape(-1)[:: max(1, tensor.numel() // 64)][:64].contiguous().cpu()
        )
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
