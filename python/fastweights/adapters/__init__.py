"""Adapters: small trainable parts on frozen layers, one file per method."""

from fastweights.adapters.activate import activate, disabled, per_sample
from fastweights.adapters.inject import adapt, remove
from fastweights.adapters.lora import LoRA
from fastweights.adapters.lora_linear import LoRALinear
from fastweights.adapters.merge import merge, unmerge
from fastweights.adapters.protocol import (
    Adapter,
    AdapterLayer,
    adapter_configs,
    adapter_layers,
    adapter_names,
)
from fastweights.adapters.saved import SavedModule

__all__ = [
    "Adapter",
    "AdapterLayer",
    "LoRA",
    "LoRALinear",
    "SavedModule",
    "activate",
    "adapt",
    "adapter_configs",
    "adapter_layers",
    "adapter_names",
    "disabled",
    "merge",
    "per_sample",
    "remove",
    "unmerge",
]
