"""A file is not trusted: what every reader asks of a tensor before it looks at its bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["FLOATS", "Bytes", "Tensors", "broken", "integer_setting", "map_file", "setting"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_MOST = 1 << 31  # outputs and inputs of a weight


class Tensors:
    """The tensors of one layer, each checked as it is taken.

    Args:
        format: name of the format, which begins every message.
        tensors: by their names within the layer, such as "qweight".
        layer: name of the layer, for messages.
    """

    def __init__(self, format: str, tensors: Mapping[str, Tensor], layer: str = "") -> None:
        self.format, self.layer = format, layer
        self._tensors = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(
        self, name: str, dtypes: Sequence[torch.dtype], shape: Sequence[int | None], rule: str
    ) -> Tensor:
        """A tensor of one of `dtypes` and of `shape`, None standing for any size below 2^31."""
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise self.error(name, rule, "none")
        fits = tensor.dim() == len(shape) and all(
            0 < have < _MOST if want is None else have == want
            for have, want in zip(tensor.shape, shape, strict=False)
        )
        if tensor.dtype not in dtypes or not fits:
            kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            came = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise self.error(name, f"{kinds} {rule} = [{sizes}]", came)
        return tensor.detach()

    def take_finite(
        self, name: str, dtypes: Sequence[torch.dtype], shape: Sequence[int | None], rule: str
    ) -> Tensor:
        """`take`, and no value is infinite or NaN."""
        tensor = self.take(name, dtypes, shape, rule)
        if not bool(tensor.isfinite().all()):
            raise self.error(name, "finite values", "an infinite or NaN one")
        return tensor

    def take_bias(self, outputs: int) -> Tensor | None:
        """The floats "bias" ``[outputs]``, which a layer need not have."""
        return self.take_finite("bias", FLOATS, [outputs], "[N]") if "bias" in self else None

    def end(self) -> None:
        """Raises if a tensor has not been taken."""
        if self._tensors:
            name = next(iter(self._tensors))
            raise self.error(name, "no tensor of this name in such a layer", "one")

    def error(self, name: str, rule: str, came: object) -> ValueError:
        """The exception for a tensor that breaks a rule."""
        return broken(self.format, f"{self.layer}.{name}" if self.layer else name, rule, came)


def broken(format: str, name: str, rule: str, came: object) -> ValueError:
    """The exception for a part of a file that breaks a rule: one line, whatever its name is."""
    return ValueError(f"{format}: {repr(name)[1:-1]:.200}: expected {rule}, got {came}")


def map_file(format: str, path: str | Path) -> Bytes:
    """The bytes of a file, mapped into memory."""
    try:
        # Copy on write: torch wants memory that can be written, which the file must not be.
        return np.asarray(np.memmap(path, mode="c"))
    except (OSError, ValueError) as error:  # numpy's own for an empty file
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"{format}: {path} cannot be read: {reason}") from error


def setting(format: str, config: Mapping[str, Any], key: str, allowed: Sequence[Any]) -> Any:
    """An entry of a quantization config that is one of `allowed`; a missing one counts as None."""
    value = config.get(key)
    if not any(value == a and type(value) is type(a) for a in allowed):
        raise ValueError(f"{format}: {key}: expected one of {list(allowed)}, got {value!r:.80}")
    return value


def integer_setting(format: str, config: Mapping[str, Any], *keys: str) -> int:
    """An integer of a quantization config under the first of `keys` that it has."""
    for key in keys:
        if key in config:
            if type(config[key]) is not int:
                raise ValueError(f"{format}: {key}: expected an integer, got {config[key]!r:.80}")
            return int(config[key])
    raise ValueError(f"{format}: {keys[0]}: expected an integer, got none")
