"""Adapters: small trainable parts on frozen layers, one file per method."""

from fastweights.adapters.lora import LoRALinear, add_lora, lora_disabled, merge_lora

__all__ = ["LoRALinear", "add_lora", "lora_disabled", "merge_lora"]
