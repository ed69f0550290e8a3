"""The files of a PEFT folder: found within it, read as plain tensors, written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastweights._json import first_line, read_json

__all__ = ["adapter_folder", "read_peft_config", "read_peft_tensors", "write_peft"]

_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_BYTES = 1 << 20  # of a config; those of the largest models have some 100 KB


def adapter_folder(folder: str | os.PathLike[str], subfolder: str | None, name: str) -> Path:
    """Where an adapter lies: the folder, or one within it.

    Args:
        folder: that people name.
        subfolder: within it, or None: its folder of the adapter's name if it has one, else itself.
        name: of the adapter.

    Raises:
        ValueError: there is none, or it lies elsewhere.
    """
    root = Path(folder)
    if subfolder is None:
        below = root / name
        found = below if name != "default" and (below / _CONFIG).exists() else root
    else:
        found = root / subfolder
    if not found.is_dir():
        raise ValueError(f"load_peft: expected a folder, got {found}")
    if not found.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"load_peft: expected a subfolder of {root}, got {subfolder!r:.200}")
    return found


def read_peft_config(folder: Path) -> tuple[dict[str, Any], str]:
    """What adapter_config.json says, and its name for messages."""
    path = _file(folder, _CONFIG)
    if path is None:
        raise ValueError(f"load_peft: {folder} has no {_CONFIG}")
    return read_json(path, limit=_BYTES), str(folder / _CONFIG)


def read_peft_tensors(folder: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors of an adapter, under the names of the model's modules, and the file's name.

    They are for reading only and may be mapped into memory.

    Raises:
        ValueError: no file, or one that is damaged or has anything but plain tensors.
    """
    if path := _file(folder, _TENSORS):
        tensors = _read_safetensors(path)
    elif path := _file(folder, _PICKLE):
        tensors = _read_pickle(path)
    else:
        raise ValueError(f"load_peft: {folder} has neither {_TENSORS} nor {_PICKLE}")
    source = folder / path.name if path.parent == folder else path
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if name in found:
            raise ValueError(f"load_peft: {source} has {name} twice, with {_PREFIX} and without")
        found[name] = tensor
    return found, str(source)


def write_peft(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes an adapter; a file that was there is replaced when the new one is whole."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    kept = {_PREFIX + name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    new = folder / f"{_TENSORS}.new"
    save_file(kept, new, metadata={"format": "pt"})
    os.replace(new, folder / _TENSORS)
    new = folder / f"{_CONFIG}.new"
    new.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    os.replace(new, folder / _CONFIG)


def _file(folder: Path, name: str) -> Path | None:
    """A file of a folder, which may be a link into the cache of Hugging Face but nowhere else."""
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        real, root = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"load_peft: {path} cannot be read: {first_line(error)}") from error
    allowed = [root]
    for parent in root.parents:
        if parent.name == "snapshots":
            allowed.append(parent.parent / "blobs")
    if not real.is_file() or not any(real.is_relative_to(place) for place in allowed):
        raise ValueError(f"load_peft: expected {path} to be a file within its folder, got {real}")
    return path


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"load_peft: {path} is truncated or damaged: {first_line(error)}"
        ) from error
    return tensors


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Plain tensors by name; torch's unpickler for weights makes nothing else run."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of whatever kind a damaged pickle raises
        raise ValueError(
            f"load_peft: {path} is damaged or no file of plain tensors: {first_line(error)}"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"load_peft: {path}: expected tensors by name, got {type(value).__name__}")
    for name, tensor in value.items():
        if type(name) is not str or not _is_plain(tensor):
            raise ValueError(
                f"load_peft: {path}: expected plain tensors by name, got {name!r:.80}: "
                f"{type(tensor).__name__}"
            )
    return value


def _is_plain(tensor: Any) -> bool:
    """Whether it has the memory that its shape tells."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    )
