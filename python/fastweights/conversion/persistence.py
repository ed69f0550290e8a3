"""Writing converted models and opening them again: plain data only, checked before it is used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastweights._json import first_line, read_json
from fastweights.adapters.protocol import adapter_layers
from fastweights.conversion.checkpoints import load_checkpoint
from fastweights.conversion.files import check_tensors, read_tensors
from fastweights.conversion.linearize import convert
from fastweights.conversion.recipes import Recipe
from fastweights.ops.quantization.tensor import ACTIVATIONS

_MANIFEST = "fastweights.json"
_OLD_GPTQ = "quantize_config.json"  # of AutoGPTQ, before config.json had a place for it


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
        ValueError: the model has adapters.
    """
    from fastweights.conversion.quantized import describe_quantized

    if layer := next(adapter_layers(model), None):
        raise ValueError(
            "save: expected merged adapters (fastweights.adapters.merge), got "
            f"{type(layer).__name__}"
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


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    activation: str = "float",
    dequantize: bool = False,
) -> tuple[Any, Any]:
    """Opens a model folder of `save`, `save_pretrained` or Hugging Face, a GGUF or an ONNX file.

    Quantized checkpoints keep their codes: folders of GPTQ, AWQ, compressed-tensors and
    bitsandbytes, GGUF files and ONNX exports have `fastweights.nn.QuantizedLinear` where
    they have a quantized layer (docs/checkpoints.md lists what is read). Nothing in a folder is
    executed: no remote code, no pickle. Sums written by `save` are verified.

    Args:
        path: the folder or file; a folder may hold one GGUF or ONNX file in place of safetensors.
        dtype: of the floating-point weights.
        activation: what quantized layers of such checkpoints do with their input, see
            `fastweights.quantize`.
        dequantize: give such checkpoints float layers instead, to be trained or converted.

    Returns:
        (model, tokenizer), the model in evaluation mode.

    Raises:
        ValueError: the path does not exist, or what it holds is damaged or no supported model.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"load: expected activation in {ACTIVATIONS}, got {activation!r}")
    source = Path(path)
    if not ((source / "config.json").is_file() and any(source.glob("*.safetensors"))):
        source = _only(source, "*.gguf") or source
    if source.is_file() and source.suffix != ".onnx":
        from fastweights.integrations.gguf import load_gguf, load_packed_gguf

        if dequantize:
            return load_gguf(source, dtype=dtype)
        return load_packed_gguf(source, dtype=dtype, activation=activation)
    graph, folder = _graph(source)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"load: expected a model folder with config.json or a GGUF file, got {source}"
        )
    _verify(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"dtype": dtype, "activation": activation, "dequantize": dequantize}
    raw = read_json(folder / "config.json")
    quantization = raw.get("quantization_config")
    if quantization is None and (folder / _OLD_GPTQ).is_file():
        quantization = {"quant_method": "gptq", **read_json(folder / _OLD_GPTQ)}
    try:
        if "fastweights" in raw:
            model = _load_converted(folder, raw["fastweights"], dtype)
        elif graph is not None:
            from fastweights.integrations.onnx import load_onnx

            model = load_onnx(graph, folder, **options)
        elif quantization is not None:
            model = load_checkpoint(folder, quantization, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except ValueError:
        raise
    except Exception as error:  # what a damaged file makes transformers raise has no common type
        raise ValueError(
            f"load: {folder} is damaged or not supported: {first_line(error)}"
        ) from error
    return model.eval(), tokenizer


def _only(folder: Path, pattern: str) -> Path | None:
    """The file in a folder that matches, if there is just one."""
    files = sorted(folder.glob(pattern))
    return files[0] if len(files) == 1 else None


def _graph(source: Path) -> tuple[Path | None, Path]:
    """The ONNX file, if that is what has the weights, and the folder with the config."""
    if source.is_file():
        folders = (source.parent, source.parent.parent)  # some lie in a folder of their own
        return source, next((f for f in folders if (f / "config.json").is_file()), source.parent)
    graph = None if any(source.glob("*.safetensors")) else _only(source, "*.onnx")
    return graph, source


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
    tensors = read_tensors(source)
    check_tensors(source, model, tensors, tied)
    model.load_state_dict(tensors, strict=False)
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


def _verify(source: Path) -> None:
    manifest = source / _MANIFEST
    if not manifest.is_file():
        return
    sums = read_json(manifest).get("sha256")
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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
