"""Opening quantized checkpoints of other programs: their layers are packed, not quantized anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastweights.conversion.files import check_tensors, read_tensors
from fastweights.ops.quantization.layers import QuantizedEmbedding, QuantizedLinear
from fastweights.ops.quantization.tensor import QuantizedTensor
from fastweights.quantization.formats.layer import Layer
from fastweights.quantization.formats.registry import Format, format_of

__all__ = ["empty_model", "fill_model", "load_checkpoint", "put_embedding", "put_layer"]


def load_checkpoint(
    source: Path, quantization: Any, *, dtype: torch.dtype, activation: str, dequantize: bool
) -> Any:
    """A model from a Hugging Face folder whose config.json has a quantization_config.

    Args:
        source: the folder.
        quantization: its quantization_config.
        dtype: of everything that is not packed.
        activation: see `fastweights.quantize`.
        dequantize: make float layers instead of packed ones.

    Raises:
        ValueError: a format that is not read here, or damaged files.
    """
    from transformers import AutoConfig

    form = format_of(quantization)
    config = AutoConfig.from_pretrained(source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    tensors = read_tensors(source)
    model = empty_model(config, dtype, len(tensors))
    done = _read_layers(model, form, tensors, dtype, activation, dequantize)
    fill_model(source, model, tensors, dtype, done)
    return model


def empty_model(config: Any, dtype: torch.dtype, tensors: int) -> Any:
    """A causal language model whose parameters take no memory yet.

    Args:
        config: of transformers.
        dtype: of its parameters.
        tensors: how many the checkpoint has, so that no config asks for a model without end.

    Raises:
        ValueError: more layers than tensors.
    """
    from transformers import AutoModelForCausalLM

    if (layers := getattr(config, "num_hidden_layers", 0)) > tensors:
        raise ValueError(
            f"load: expected num_hidden_layers of at most {tensors}, as many as there are tensors, "
            f"got {layers}"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in model.modules():
        if module._non_persistent_buffers_set:  # such as rotary frequencies, which no file holds
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)
    return model


def put_layer(
    model: nn.Module, name: str, layer: Layer, dtype: torch.dtype, dequantize: bool
) -> set[str]:
    """Exchanges the linear layer `name` of an empty model.

    Returns:
        State-dict names that are there now.

    Raises:
        ValueError: another shape than the model's, no bias where it has one, or one that is not
            zero where it has none.
    """
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    shape = (linear.out_features, linear.in_features)
    if layer.weight.shape != shape:
        raise ValueError(
            f"load: expected {name} of shape {list(shape)}, got {list(layer.weight.shape)}"
        )
    bias = _bias(linear, name, layer.bias)
    bias = None if bias is None else bias.to(dtype, copy=True)
    put: nn.Module = QuantizedLinear(layer.weight, bias, layer.order)
    if dequantize:
        put = nn.Linear(shape[1], shape[0], bias=bias is not None, device="meta")
        put.weight = nn.Parameter(layer.dequantize(dtype))
        if bias is not None:
            put.bias = nn.Parameter(bias)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, put)
    return {f"{name}.{part}" for part in put.state_dict()}


def _bias(linear: nn.Linear, name: str, bias: Tensor | None) -> Tensor | None:
    """The bias of the checkpoint that the model has a place for."""
    if bias is None:
        if linear.bias is not None:
            raise ValueError(f"load: {name} has no bias where the model has one")
        return None
    if bias.shape != (linear.out_features,):
        raise ValueError(
            f"load: expected {name}.bias of shape {[linear.out_features]}, got {list(bias.shape)}"
        )
    if linear.bias is None:
        if bool(bias.any()):
            raise ValueError(f"load: {name} has a bias that is not zero where the model has none")
        return None  # AutoGPTQ gives every layer one
    return bias


def put_embedding(model: Any, name: str, weight: QuantizedTensor, dtype: torch.dtype) -> set[str]:
    """Exchanges the embedding `name` of an empty model, and the linear layers tied to it.

    Returns:
        State-dict names that are there now.

    Raises:
        ValueError: another shape than the model's.
    """
    shape = tuple(model.get_submodule(name).weight.shape)
    if shape != weight.shape:
        raise ValueError(f"load: expected {name} of shape {list(shape)}, got {list(weight.shape)}")
    ties = model.all_tied_weights_keys.items()
    linears = [a.removesuffix(".weight") for a, b in ties if b == f"{name}.weight"]
    for each in (name, *linears):
        put = QuantizedLinear(weight) if each in linears else QuantizedEmbedding(weight, dtype)
        parent, _, child = each.rpartition(".")
        setattr(model.get_submodule(parent), child, put)
    return {f"{each}.packed" for each in (name, *linears)}


def fill_model(
    source: Path, model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, done: set[str]
) -> None:
    """Copies the other tensors of a checkpoint into an empty model.

    Args:
        source: for messages.
        model: from `empty_model`, its quantized layers put.
        tensors: by state-dict names; they may lie in a mapped file.
        dtype: of the copies of floating-point tensors.
        done: state-dict names that are there already.

    Raises:
        ValueError: tensors that the model does not have, or that are missing.
    """
    check_tensors(source, model, tensors, done | set(model.all_tied_weights_keys))
    copies = {
        name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in tensors.items()
    }
    model.load_state_dict(copies, strict=False, assign=True)
    floats = set(dict(model.named_parameters(remove_duplicate=False)))
    ties = model.all_tied_weights_keys
    if not done.isdisjoint(ties):  # an output layer that was quantized apart from its embedding
        model.config.tie_word_embeddings = False
    elif floats.issuperset([*ties.keys(), *ties.values()]):
        model.tie_weights()


def _read_layers(
    model: nn.Module,
    form: Format,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    activation: str,
    dequantize: bool,
) -> set[str]:
    """Puts the quantized layers, whose tensors are taken out of `tensors`."""
    parts: dict[str, dict[str, Tensor]] = {
        name: {} for name, module in model.named_modules() if type(module) is nn.Linear
    }
    for name, tensor in tensors.items():
        owner = name
        while owner and owner not in parts:
            owner = owner.rpartition(".")[0]
        if owner:
            parts[owner][name[len(owner) + 1 :]] = tensor
    done: set[str] = set()
    for name, own in parts.items():
        if form.key in own:
            layer = form.read(own, name, activation=activation)
            done |= put_layer(model, name, layer, dtype, dequantize)
            for part in own:
                del tensors[f"{name}.{part}"]
    if not done:
        raise ValueError(f"load: expected layers with {form.key} in the model, found none")
    return done
