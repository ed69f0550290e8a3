"""Writing converted models and opening them again: plain data only, checked before it is used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastweights.adapters.lora import LoRALinear
from fastweights.conversion.linearize import convert
from fastweights.conversion.recipes import Recipe

_MANIFEST = "fastweights.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def save(model: Any, tokenizer: Any, path: str | Path) -> None:
    """Writes `model` and `tokenizer` as a Hugging Face folder, with a checksum of every file.

    The folder holds what `save_pretrained` writes (config.json, safetensors, tokenizer with its
    chat template) and the SHA-256 sums by which `load` notices a changed bit. A model quantized by
    `quantize_` is stored in its packed form.

    Args:
        model: a Hugging Face model, converted and quantized or not.
        tokenizer: its tokenizer.
        path: the folder; created if it does not exist.

    Raises:
        ValueError: LoRA is not merged.
    """
    from fastweights.conversion.quantized import describe_quantized

    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError(
            "save: expected merged adapters (fastweights.adapters.merge_lora), got LoRALinear"
        )
    folder = Path(path)
    if quantized := describe_quantized(model):
        described = getattr(model.config, "fastweights", {})
        model.config.fastweights = {**described, "quantized": quantized}
    model.save_pretrained(folder, state_dict=_without_aliases(model.state_dict()))
    tokenizer.save_pretrained(folder)
    files = sorted(f.name for f in folder.iterdir() if f.is_file() and f.name != _MANIFEST)
    sums = {name: _sha256(folder / name) for name in files}
    (folder / _MANIFEST).write_text(json.dumps({"sha256": sums}, indent=2) + "\n", encoding="utf-8")


def _without_aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every stored tensor once, under its first name."""
    first: dict[tuple[int, int], str] = {}
    for name, tensor in tensors.items():
        first.setdefault((tensor.data_ptr(), tensor.numel()), name)
    return {name: tensors[name] for name in first.values()}


def load(path: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Opens a model folder of `save`, `save_pretrained` or Hugging Face, or a GGUF file.

    Nothing in it is executed: no remote code, no pickle. Sums written by `save` are verified.

    Args:
        path: the folder or file.
        dtype: of the floating-point weights.

    Returns:
        (model, tokenizer), the model in evaluation mode.

    Raises:
        ValueError: the path does not exist, or what it holds is damaged or no supported model.
    """
    source = Path(path)
    if source.is_file():
        from fastweights.integrations.gguf import load_gguf

        return load_gguf(source, dtype=dtype)
    if not (source / "config.json").is_file():
        raise ValueError(
            f"load: expected a model folder with config.json or a GGUF file, got {source}"
        )
    _verify(source)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    raw = _read_json(source / "config.json")
    try:
        if "fastweights" in raw:
            model = _load_converted(source, raw["fastweights"], dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except ValueError:
        raise
    except Exception as error:  # what a damaged file makes transformers raise has no common type
        raise ValueError(
            f"load: {source} is damaged or not supported: {_first_line(error)}"
        ) from error
    return model.eval(), tokenizer


def _load_converted(source: Path, description: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from fastweights.conversion.quantized import prepare_quantized

    recipe, kept = _parse(source, description)
    config = AutoConfig.from_pretrained(source)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in model.modules():
        if module._non_persistent_buffers_set:  # such as rotary frequencies, which no file holds
            model._init_weights(module)
    model.tie_weights()
    if recipe is not None:
        convert(model, recipe, set(kept))
    tied = set(model.all_tied_weights_keys)
    if "quantized" in description:
        tied |= prepare_quantized(model, description["quantized"])
        model.config.fastweights = description
    tensors = _read_tensors(source)
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
    result = model.load_state_dict(tensors, strict=False)
    missing = [name for name in result.missing_keys if name not in tied]
    if missing:
        raise ValueError(f"load: {source} lacks {len(missing)} tensors, the first is {missing[0]}")
    return model


def _parse(source: Path, description: Any) -> tuple[Recipe | None, list[int]]:
    """The conversion that config.json describes, every value's type checked; None without one."""
    try:
        if "recipe" not in description and "quantized" in description:
            return None, []
        recipe, kept = description["recipe"], description["keep_softmax"]
        expected = {field.name: type(getattr(Recipe(), field.name)) for field in fields(Recipe)}
        if {name: type(value) for name, value in recipe.items()} != expected or any(
            type(i) is not int for i in kept
        ):
            raise ValueError("unknown or missing entries")
        return Recipe(**recipe), kept
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"load: the entry fastweights of {source / 'config.json'} is damaged: {error}"
        ) from error


def _read_tensors(source: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = [_WEIGHTS]
    if (source / _INDEX).is_file():
        names = sorted(set(_read_json(source / _INDEX).get("weight_map", {}).values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"load: {source / _INDEX} points outside its folder: {name}")
        try:
            tensors.update(load_file(source / name))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"load: {source / name} is missing, truncated or damaged: {_first_line(error)}"
            ) from error
    return tensors


def _verify(source: Path) -> None:
    manifest = source / _MANIFEST
    if not manifest.is_file():
        return
    sums = _read_json(manifest).get("sha256")
    if not isinstance(sums, dict):
        raise ValueError(f"load: {manifest} is damaged: expected an object sha256")
    for name, expected in sums.items():
        file = source / name
        if Path(name).name != name or not file.is_file():
            raise ValueError(f"load: {manifest} lists {name}, which {source} does not hold")
        if _sha256(file) != expected:
            raise ValueError(
                f"load: {file} was changed or is damaged: its checksum differs from {_MANIFEST}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"load: {path} is damaged: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"load: {path} is damaged: expected an object")
    return value


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
