"""Which modules an adapter is put on: functions over their paths."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from torch import nn

from fastweights.adapters.protocol import Adapter, AdapterLayer
from fastweights.adapters.saved import SavedModule

__all__ = ["is_selected", "paths", "pattern_value", "saved_paths", "selected_paths"]

Value = TypeVar("Value")

# By the model_type of a Hugging Face configuration; what LoRA's users adapt, not all that could be.
_CUSTOMARY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "llama", "llama4", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2",
            "gemma3_text", "stablelm", "opt", "bart", "gptj", "gpt_neo",
        ),
        ("q_proj", "v_proj"),
    ),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon"), ("query_key_value",)),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "vit"), ("query", "value")),
    "deberta-v2": ("query_proj", "value_proj"),
}  # fmt: skip
_HEADS = ("score", "classifier")


def paths(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules under all their paths, layers with adapters as one and without what is in them."""
    for name, child in model._modules.items():  # named_children leaves out repetitions
        if child is None:
            continue
        path = f"{prefix}{name}"
        yield path, child
        if not isinstance(child, AdapterLayer):
            yield from paths(child, f"{path}.")


def selected_paths(model: nn.Module, adapter: Adapter) -> list[str]:
    """Paths of the modules that an adapter is put on, in module order.

    Raises:
        ValueError: there are none.
    """
    targets = _targets(model, adapter)
    added = [p for p, m in paths(model) if adapter.adds(_base(m))]
    found = [
        p
        for p, _ in paths(model)
        if is_selected(p, adapter, targets) or is_selected(p, adapter, added)
    ]
    if not found:
        raise ValueError(
            f"adapt: expected targets={adapter.targets!r} to name modules of "
            f"{type(model).__name__}, found none"
        )
    return found


def is_selected(path: str, adapter: Adapter, targets: str | Sequence[str] | None = None) -> bool:
    """Whether the rules of an adapter name a path.

    Args:
        path: of the module.
        adapter: its rules.
        targets: in place of the adapter's, which may be "all-linear" or None.
    """
    targets = adapter.targets if targets is None else targets
    if targets is None or _named(path, adapter.exclude):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in adapter.modules_to_save):
        return False
    if isinstance(targets, str) or path in targets or not _in_layers(adapter):
        return _named(path, targets)
    return _named(path, targets) and _layer_of(path, adapter.layers_pattern) in _numbers(adapter)


def saved_paths(model: nn.Module, adapter: Adapter) -> list[str]:
    """Paths of the modules that are trained whole.

    Raises:
        ValueError: none of the names fits.
    """
    names = adapter.modules_to_save
    found = [p for p, _ in paths(model) if _named(p, list(names))]
    if names and not found:
        raise ValueError(
            f"adapt: expected modules_to_save={list(names)} to name modules of "
            f"{type(model).__name__}, found none"
        )
    return found


def pattern_value(path: str, patterns: Mapping[str, Value], otherwise: Value) -> Value:
    """The value of the first pattern, in the order given, that the end of a path matches."""
    for pattern, value in patterns.items():
        if _ending(pattern).match(path):
            return value
    return otherwise


@functools.lru_cache(maxsize=8192)  # large models have a pattern for every layer
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _named(path: str, names: str | Sequence[str] | None) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names or ())


def _in_layers(adapter: Adapter) -> bool:
    return adapter.layers is not None and adapter.layers not in ((), [])


def _numbers(adapter: Adapter) -> Sequence[int]:
    layers = adapter.layers
    assert layers is not None
    return (layers,) if isinstance(layers, int) else layers


def _layer_of(path: str, patterns: str | Sequence[str] | None) -> int | None:
    """The first number in a path: a later one may be that of an expert."""
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        return int(match[1]) if match else None
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path):
            return int(match[1])
    return None


def _targets(model: nn.Module, adapter: Adapter) -> str | Sequence[str]:
    if adapter.targets is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in _CUSTOMARY:
            raise ValueError(
                f"adapt: expected targets for a model of type {kind!r}, got None (known types: "
                f"{', '.join(sorted(_CUSTOMARY))})"
            )
        return _CUSTOMARY[kind]
    if isinstance(adapter.targets, str) and adapter.targets.lower() == "all-linear":
        head = _output(model)
        return [p for p, m in paths(model) if _covered(adapter, m) and m is not head]
    return adapter.targets


def _covered(adapter: Adapter, module: nn.Module) -> bool:
    return not isinstance(module, SavedModule) and adapter.covers(_base(module))


def _base(module: nn.Module) -> nn.Module:
    return getattr(module, module.wrapped) if isinstance(module, AdapterLayer) else module


def _output(model: nn.Module) -> nn.Module | None:
    """The output embedding of a Hugging Face model, or its classification head."""
    get = getattr(model, "get_output_embeddings", None)
    if get is None:
        return None
    output: nn.Module | None = get()
    if output is None and "SequenceClassification" in type(model).__name__:
        heads = (getattr(model, name, None) for name in _HEADS)
        output = next((head for head in heads if head is not None), None)
    return output
