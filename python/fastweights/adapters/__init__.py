"""Adapters: small trainable parts on frozen layers, one file per method."""

from fastweights.adapters.activate import activate, disabled, per_sample
from fastweights.adapters.combine import combine
from fastweights.adapters.corda import CorDA
from fastweights.adapters.inject import adapt, remove
from fastweights.adapters.lora import LoRA
from fastweights.adapters.lora_conv import LoRAConv
from fastweights.adapters.lora_embedding import LoRAEmbedding
from fastweights.adapters.lora_linear import LoRALinear
from fastweights.adapters.lora_plus import lora_plus_groups
from fastweights.adapters.merge import merge, unmerge
from fastweights.adapters.merge_report import merge_report
from fastweights.adapters.norms import lora_norm_report
from fastweights.adapters.olora import OLoRA
from fastweights.adapters.peft_load import load_peft
from fastweights.adapters.peft_save import save_peft
from fastweights.adapters.pissa import PiSSA
from fastweights.adapters.protocol import (
    Adapter,
    AdapterLayer,
    adapter_configs,
    adapter_layers,
    adapter_names,
)
from fastweights.adapters.saved import SavedModule
from fastweights.adapters.shared_input import together
from fastweights.adapters.ssf import SSF, SSFLayer, push_shift
from fastweights.adapters.to_lora import to_lora

__all__ = [  # noqa: RUF022, acronyms are no constants
    "Adapter",
    "AdapterLayer",
    "CorDA",
    "LoRA",
    "LoRAConv",
    "LoRAEmbedding",
    "LoRALinear",
    "OLoRA",
    "PiSSA",
    "SSF",
    "SSFLayer",
    "SavedModule",
    "activate",
    "adapt",
    "adapter_configs",
    "adapter_layers",
    "adapter_names",
    "combine",
    "disabled",
    "load_peft",
    "lora_norm_report",
    "lora_plus_groups",
    "merge",
    "merge_report",
    "per_sample",
    "push_shift",
    "remove",
    "save_peft",
    "to_lora",
    "together",
    "unmerge",
]
