"""The embedding that keeps 8-bit training stable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastweights.optim.overrides import GlobalOptimManager

__all__ = ["StableEmbedding"]


class StableEmbedding(nn.Embedding):
    """An embedding with Xavier initialisation, a layer norm behind it and 32-bit optimizer states.

    Rare tokens make the gradients of an embedding the most uneven of a language model, which 8-bit
    states take worst (Dettmers et al. 2021, arXiv:2110.02861, section 2.3). The layer norm works in
    float32 at least; the output has the weight's dtype. Arguments, names of the parameters and
    state-dict keys are those of bitsandbytes.

    Args:
        num_embeddings: size of the vocabulary.
        embedding_dim: size of a vector.
        padding_idx: this row starts as zeros and gets no gradient.
        options: as of `torch.nn.Embedding`.

    Example:
        >>> StableEmbedding(100, 16)(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 16])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, **options)
        self.norm = nn.LayerNorm(embedding_dim, device=options.get("device"))
        self._keep_32_bits()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and loaded modules register, too."""
        super().__setstate__(state)
        self._keep_32_bits()

    def _keep_32_bits(self) -> None:
        manager = GlobalOptimManager.get_instance()
        manager.register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        """Xavier-uniform, with a padding row of zeros."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        """Vectors `[..., D]` of the tokens `[...]`."""
        x = super().forward(input)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.norm.weight.to(wide), self.norm.bias.to(wide)
        y = nn.functional.layer_norm(
            x.to(wide), self.norm.normalized_shape, weight, bias, self.norm.eps
        )
        return y.to(self.weight.dtype)
