"""LoRA on embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastweights.adapters.lora_added import AddedLoRALayer

__all__ = ["LoRAEmbedding", "is_embedding"]


def is_embedding(module: nn.Module) -> bool:
    """Whether a module is an embedding whose computation is known.

    Subclasses of transformers multiply what is looked up by their `embed_scale`. One with
    `max_norm` changes its weight in its forward.
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")


class LoRAEmbedding(AddedLoRALayer):
    """y = W[x] + Σ_i s_i A_i[:, x]ᵀ B_iᵀ: A starts at zero here, and B normal.

    There is no dropout, as in PEFT. DoRA's norms are those of the embedding's columns.

    Args:
        base_layer: `nn.Embedding` without `max_norm`.

    Attributes:
        lora_embedding_A: A by adapter, ``[rank, num_embeddings]``.
        lora_embedding_B: B by adapter, ``[embedding_dim, rank]``.
        lora_magnitude_vector: m of DoRA by adapter, ``[embedding_dim]``, where it has one.
    """

    base_layer: nn.Embedding
    down, up = "lora_embedding_A", "lora_embedding_B"

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B."""
        return (rank, self.base_layer.num_embeddings), (self.base_layer.embedding_dim, rank)

    def reset(self, name: str, init: str) -> None:
        """B normal; A zero, or for "random" normal too."""
        a, b = self.factors(name)
        nn.init.normal_(b)
        if init == "random":
            nn.init.normal_(a)

    def update(self, name: str, x: Tensor) -> Tensor:
        """S A[:, x]ᵀ Bᵀ."""
        a, b = self.factors(name)
        base = self.base_layer
        rows = F.embedding(x, a.t(), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        update = F.linear(rows, b) * self.scaling[name]
        scale = getattr(base, "embed_scale", None)
        return update if scale is None else update * scale
