"""Low-rank updates of linear layers (LoRA)."""

from fastweights.ops.lora.functional import lora_linear

__all__ = ["lora_linear"]
