"""ONNX exports of language models as Hugging Face models: their weights, not their graph."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastweights.conversion.checkpoints import empty_model, fill_model, put_layer
from fastweights.quantization.formats.matmul_nbits import MatMulNBits
from fastweights.quantization.formats.onnx import ONNX, quantized_layers, read_onnx

__all__ = ["load_onnx"]

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_SUFFIX = re.compile(r"\.MatMul\w*$")
# Names of onnxruntime-genai's builder; torch's exporters keep those of the state dict.
_RENAMED = (
    (re.compile(r"\.attn\."), ".self_attn."),
    (re.compile(r"\.Add\.bias$"), ".bias"),
    (re.compile(r"_norm\.layernorm\.weight$"), "_norm.weight"),
    (re.compile(r"\.layers\.\d+\.final_norm_layernorm\."), ".norm."),
)


def load_onnx(
    path: Path, config: Path, *, dtype: torch.dtype, activation: str, dequantize: bool
) -> Any:
    """Opens an ONNX export whose linear layers are MatMulNBits nodes as a Hugging Face model.

    The weights are found by the names that torch's exporters and onnxruntime-genai's builder give
    them. The graph is not run: a change that somebody made to it is not seen.

    Args:
        path: the file.
        config: the folder of the config.json that says which model it is.
        dtype: of everything that is not packed.
        activation: see `fastweights.quantize`.
        dequantize: make float layers instead of packed ones.

    Raises:
        ValueError: damaged files, or a graph without the weights of the model.
    """
    from transformers import AutoConfig

    file = read_onnx(path)
    model = empty_model(AutoConfig.from_pretrained(config), dtype, len(file.tensors))
    plain = _plain(file, model)
    linears = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    done: set[str] = set()
    for name, form, tensors in _single_layers(file, model, plain):
        if name not in linears:
            raise ValueError(f"load: {path} has a layer {name}, which the model does not have")
        layer = form.read(tensors, name, activation=activation)
        done |= put_layer(model, name, layer, dtype, dequantize)
    if not done:
        raise ValueError(f"load: expected MatMulNBits nodes in {path}, found none")
    fill_model(path, model, {k: v for k, v in plain.items() if k not in done}, dtype, done)
    return model


def _plain(file: ONNX, model: nn.Module) -> dict[str, Tensor]:
    """The float weights of the model, by their names in its state dict."""
    own = model.state_dict().keys()
    names = {name: _renamed(name) for name in file.tensors}
    plain = {new: file.tensors[old].read() for old, new in names.items() if _wanted(new, own)}
    for node in file.nodes:
        target = f"{_module(node.name)}.weight"
        if node.op_type == "MatMul" and target in own:
            weight = next((file.tensors[i] for i in node.inputs if i in file.tensors), None)
            if weight is not None and len(weight.shape) == 2:
                plain[target] = weight.read().T
    return plain


def _wanted(name: str, own: Any) -> bool:
    module, _, part = name.rpartition(".")
    fused = module.rpartition(".")[2] in _FUSED and part == "bias"
    return name in own or fused or (part == "bias" and f"{module}.weight" in own)


def _single_layers(
    file: ONNX, model: nn.Module, plain: dict[str, Tensor]
) -> Iterator[tuple[str, MatMulNBits, dict[str, Tensor]]]:
    """Every quantized layer of the model, fused ones taken apart; biases leave `plain`."""
    for node, form, tensors in quantized_layers(file):
        name = _module(node)
        bias = plain.pop(f"{name}.bias", None)
        if bias is not None:
            tensors["bias"] = bias
        parent, _, child = name.rpartition(".")
        if child not in _FUSED:
            yield name, form, tensors
            continue
        names = [f"{parent}.{part}" for part in _FUSED[child]]
        modules = dict(model.named_modules())
        linears = [m for part in names if isinstance(m := modules.get(part), nn.Linear)]
        if len(linears) != len(names):
            raise ValueError(f"load: expected {', '.join(names)} in the model for {name}")
        sizes = [linear.out_features for linear in linears]
        if sum(sizes) != form.out_features:
            raise ValueError(
                f"load: expected {name} to have {sum(sizes)} outputs, got {form.out_features}"
            )
        whole = form.by_rows(tensors)
        for i, part in enumerate(names):
            rows = {k: v.split(sizes)[i] if k != "g_idx" else v for k, v in whole.items()}
            yield part, replace(form, out_features=sizes[i], flat=False), rows


def _module(node: str) -> str:
    """The module that a node computes, by the node's name."""
    return _renamed(_SUFFIX.sub("", node.strip("/").replace("/", ".")))


def _renamed(name: str) -> str:
    for pattern, new in _RENAMED:
        name = pattern.sub(new, name)
    return name
