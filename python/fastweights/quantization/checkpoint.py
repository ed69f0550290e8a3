"""What a solver has done so far, in a folder: one safetensors file per block."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastweights.ops.quantization.tensor import QuantizedTensor, packed_shape
from fastweights.quantization.samples import Sample, bytes_of, fingerprint
from fastweights.quantization.walk import Block

__all__ = ["Checkpoint"]

_KEY = "fastweights.quantization"
_PREPARED = "prepared"


class Checkpoint:
    """Blocks that were solved with the same settings, calibration and weights.

    Args:
        folder: made when the first file is written.
        solver: its `repr` belongs to the settings.
        samples: of the calibration.
        target: format, group size and activation.
    """

    def __init__(
        self, folder: Path, solver: Any, samples: list[Sample], target: dict[str, Any]
    ) -> None:
        self.folder = folder
        name = re.sub(r" at 0x[0-9a-f]+", "", repr(solver))  # a function lies elsewhere next time
        self._settings = {"solver": name, **target, "calibration": fingerprint(samples)}
        self._before: dict[str, Any] = {}

    def prepared(self) -> dict[str, Tensor] | None:
        """What the solver's `prepare` gave, if it is there."""
        return self._read(_PREPARED, self._settings)

    def keep_prepared(self, tensors: dict[str, Tensor]) -> None:
        """Writes what the solver's `prepare` gave."""
        self._write(_PREPARED, tensors, self._settings)

    def restore(self, block: Block) -> bool:
        """Puts the solution of a block in place, if there is one.

        Raises:
            ValueError: a file that is damaged or belongs to another run.
        """
        self._before = {**self._settings, "weights": _weights(block.module)}
        tensors = self._read(block.name, self._before)
        if tensors is None:
            return False
        for name, linear in block.linears.items():
            prefix = f"{name}." if name else ""
            block.replace(
                name,
                _empty(linear, block.target),
                torch.arange(linear.in_features) if f"{prefix}order" in tensors else None,
            )
        try:
            block.module.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"quantize_: {self._path(block.name)} is damaged ({error})") from error
        return True

    def keep(self, block: Block) -> None:
        """Writes the solution of a block that `restore` did not find."""
        state = {k: v.detach().clone().contiguous() for k, v in block.module.state_dict().items()}
        self._write(block.name, state, self._before)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write(self, name: str, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        """Beside its place first, so that an interruption leaves no half of a file."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        temporary = path.with_name(path.name + ".part")
        save_file(tensors, temporary, {_KEY: json.dumps(settings)})
        os.replace(temporary, path)

    def _read(self, name: str, settings: dict[str, Any]) -> dict[str, Tensor] | None:
        from safetensors import SafetensorError, safe_open

        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                found = json.loads((file.metadata() or {})[_KEY])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            differing = [key for key in settings if found.get(key) != settings[key]]
        except (SafetensorError, KeyError, ValueError, AttributeError, OSError) as error:
            raise ValueError(
                f"quantize_: {path} is not a checkpoint of a solver, or is damaged ({error})"
            ) from error
        if differing:
            raise ValueError(
                f"quantize_: expected a checkpoint of the same {', '.join(differing)}; "
                f"{path} is of another run"
            )
        return tensors


def _weights(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in module.state_dict().items():
        digest.update(f"{key}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _empty(linear: nn.Linear, target: dict[str, Any]) -> QuantizedTensor:
    """A quantized weight of the layer's size, to load one into."""
    group_size = target["group_size"]
    shape = (linear.out_features, linear.in_features)
    packed = torch.zeros(packed_shape(target["format"], *shape, group_size), dtype=torch.uint8)
    return QuantizedTensor(packed, target["format"], shape, group_size, target["activation"])
