"""Model folders of Hugging Face, read without trust: plain data, checked before it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastweights._json import first_line, read_json

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_tensors(source: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, mapped into memory: pages are read when used.

    They are for reading only, and are no tensors any more once a file is overwritten: whatever is
    kept must be a copy.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = sorted(file.name for file in source.glob("*.safetensors"))
    names = found if len(found) == 1 else [_WEIGHTS]
    if (source / _INDEX).is_file():
        shards = read_json(source / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(type(v) is str for v in shards.values()):
            raise ValueError(f"load: {source / _INDEX} is damaged: expected names in weight_map")
        names = sorted(set(shards.values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"load: {source / _INDEX} points outside its folder: {name}")
        try:
            tensors.update(load_file(source / name))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"load: {source / name} is missing, truncated or damaged: {first_line(error)}"
            ) from error
    return tensors


def check_tensors(
    source: Path,
    model: torch.nn.Module,
    tensors: Mapping[str, Tensor],
    optional: Iterable[str] = (),
) -> None:
    """Raises unless `tensors` are what `model` has, finite, and complete but for `optional`."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        if name not in own:
            raise ValueError(f"load: {source} has an unknown tensor {name}")
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"load: expected {name} of shape {list(own[name].shape)} in {source}, "
                f"got {list(tensor.shape)}"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"load: {name} in {source} has values that are not finite")
    known = set(tensors) | set(optional)
    missing = [name for name in model.state_dict() if name not in known]
    if missing:
        raise ValueError(f"load: {source} lacks {len(missing)} tensors, the first is {missing[0]}")
