"""Which tensors a PEFT file has for an adapter of a model, by name, and where each belongs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastweights.adapters.base import dtype_of
from fastweights.adapters.lora import LoRA, layer_for
from fastweights.adapters.lora_embedding import LoRAEmbedding
from fastweights.adapters.lora_layer import LoRALayer
from fastweights.adapters.protocol import AdapterLayer
from fastweights.adapters.rules import paths, pattern_value
from fastweights.adapters.saved import SavedModule

__all__ = ["Slot", "check_tensors", "slots", "suffix_paths"]

# With bias="all" PEFT writes every bias of its own wrappers, under names that it does not read.
_UNREAD = re.compile(r".*\.(modules_to_save|original_module)\.(.*\.)?bias")


@dataclass(frozen=True)
class Slot:
    """A place for a tensor.

    Attributes:
        shape: that it has.
        dtype: of the place; a file may have floating-point numbers in another dtype.
        find: gives the tensor of the model, once the adapter is there.
        required: whether a file without it is broken.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    find: Callable[[], Tensor]
    required: bool = True


def slots(
    model: nn.Module, config: LoRA, name: str, adapted: Sequence[str], saved: Sequence[str]
) -> dict[str, Slot]:
    """The places of all tensors of an adapter, which the model need not have yet.

    Args:
        model: bare, or with adapters.
        config: of the adapter.
        name: of the adapter.
        adapted: paths of the modules that it is put on.
        saved: paths of those that it trains whole.

    Raises:
        TypeError: a module that LoRA does not adapt.
    """
    found = dict(_embeddings(model, adapted))
    for path in adapted:
        module = model.get_submodule(path)
        layer = module if isinstance(module, LoRALayer) else layer_for(module, path)
        found |= _factors(model, layer, config, name, path)
        if config.bias == "lora_only":
            found |= _bias(model, layer.base_layer, path, True)
    if config.bias == "all":
        for path, module in paths(model):
            if not any(f"{path}.".startswith(f"{whole}.") for whole in saved):
                found |= _bias(model, module, path, path in adapted)
    for path in saved:
        module = model.get_submodule(path)
        original = module.original_module if isinstance(module, SavedModule) else module
        for key, value in original.state_dict().items():
            found[f"{path}.{key}"] = Slot(
                tuple(value.shape), value.dtype, _saved(model, path, name, key)
            )
    return found


def _factors(
    model: nn.Module, layer: LoRALayer, config: LoRA, name: str, path: str
) -> Iterator[tuple[str, Slot]]:
    """A, B, DoRA's m and the bias beside B."""
    if name in layer.configs:
        rank = len(layer.factors(name)[0])
    else:
        rank = pattern_value(path, config.rank_pattern, config.rank)
    wide = torch.float64 if dtype_of(layer.base_layer) == torch.float64 else torch.float32
    dtype = config.dtype or wide
    a, b = layer.shapes(rank)
    end = "" if isinstance(layer, LoRAEmbedding) else ".weight"
    yield f"{path}.{layer.down}{end}", Slot(a, dtype, _own(model, path, layer.down, name))
    yield f"{path}.{layer.up}{end}", Slot(b, dtype, _own(model, path, layer.up, name))
    if config.lora_bias:
        yield f"{path}.lora_B.bias", Slot(b[:1], dtype, _own(model, path, "lora_bias", name))
    if config.dora:
        kind = "lora_magnitude_vector"
        shape = tuple(layer.across(torch.empty(b[0], device="meta")).shape)
        yield f"{path}.{kind}", Slot(shape, dtype, _own(model, path, kind, name))


def _bias(
    model: nn.Module, module: nn.Module, path: str, adapted: bool
) -> Iterator[tuple[str, Slot]]:
    """The bias of the model's own layer."""
    base = module.base_layer if isinstance(module, LoRALayer) else module
    assert isinstance(base, nn.Module)
    bias = base._parameters.get("bias")
    if bias is not None and not isinstance(base, AdapterLayer):
        key = f"{path}.base_layer.bias" if adapted else f"{path}.bias"
        yield key, Slot(tuple(bias.shape), bias.dtype, _base(model, path, "bias"))


def _embeddings(model: nn.Module, adapted: Sequence[str]) -> Iterator[tuple[str, Slot]]:
    """The embeddings of a Hugging Face model, which a file may have or not."""
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found = getattr(model, get)()
        except (AttributeError, NotImplementedError):
            continue
        for path, module in paths(model):
            if module is not found or isinstance(module, SavedModule):
                continue
            base = module.base_layer if isinstance(module, LoRALayer) else module
            assert isinstance(base, nn.Module)
            weight = base._parameters.get("weight")
            if weight is not None:
                key = f"{path}.base_layer.weight" if path in adapted else f"{path}.weight"
                place = _base(model, path, "weight")
                yield key, Slot(tuple(weight.shape), weight.dtype, place, required=False)


def _own(model: nn.Module, path: str, kind: str, name: str) -> Callable[[], Tensor]:
    def find() -> Tensor:
        value: Tensor = getattr(model.get_submodule(path), kind)[name]
        return value

    return find


def _base(model: nn.Module, path: str, kind: str) -> Callable[[], Tensor]:
    def find() -> Tensor:
        module = model.get_submodule(path)
        value: Tensor = getattr(
            module.base_layer if isinstance(module, LoRALayer) else module, kind
        )
        return value

    return find


def _saved(model: nn.Module, path: str, name: str, key: str) -> Callable[[], Tensor]:
    def find() -> Tensor:
        module = model.get_submodule(path)
        assert isinstance(module, SavedModule)
        value: Tensor = module.modules_to_save[name].state_dict()[key]
        return value

    return find


def suffix_paths(model: nn.Module, names: Sequence[str]) -> list[str]:
    """What PEFT takes `modules_to_save` for: every path that ends in one of the texts."""
    return [path for path, _ in paths(model) if path.endswith(tuple(names))]


def check_tensors(
    tensors: Mapping[str, Tensor], found: Mapping[str, Slot], config: LoRA, source: str
) -> dict[str, Tensor]:
    """The tensors of a file that have a place.

    Raises:
        ValueError: others, missing ones, of another shape or kind, or not finite.
    """
    kept = {}
    for name, tensor in tensors.items():
        slot = found.get(name)
        if slot is None:
            if config.bias == "all" and _UNREAD.fullmatch(name):
                continue
            raise ValueError(f"load_peft: {source} has an unknown tensor {name:.200}")
        if tuple(tensor.shape) != slot.shape:
            raise ValueError(
                f"load_peft: {source}: expected {name} of shape {list(slot.shape)}, "
                f"got {list(tensor.shape)}"
            )
        floats = slot.dtype.is_floating_point
        if not (tensor.is_floating_point() if floats else tensor.dtype == slot.dtype):
            kind = "floating-point numbers" if floats else _plain(slot.dtype)
            raise ValueError(
                f"load_peft: {source}: expected {name} to be {kind}, got {_plain(tensor.dtype)}"
            )
        if floats and not bool(tensor.to(slot.dtype).isfinite().all()):
            raise ValueError(f"load_peft: {source}: {name} has values that are not finite")
        kept[name] = tensor
    missing = [name for name, slot in found.items() if slot.required and name not in kept]
    if missing:
        raise ValueError(
            f"load_peft: {source} lacks {len(missing)} tensors, the first is {missing[0]}"
        )
    return kept


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
