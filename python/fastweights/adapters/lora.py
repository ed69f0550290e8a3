"""LoRA: low-rank updates of frozen layers, and the variants that share its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastweights.adapters.base import is_linear
from fastweights.adapters.lora_conv import LoRAConv, is_convolution
from fastweights.adapters.lora_embedding import LoRAEmbedding, is_embedding
from fastweights.adapters.lora_layer import LoRALayer
from fastweights.adapters.lora_linear import LoRALinear
from fastweights.adapters.protocol import Adapter, AdapterLayer

__all__ = ["LoRA", "layer_for"]

_INITS = ("kaiming", "gaussian", "random")
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    r"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    .. math::
        y = x W^T + b + s \, (\mathrm{drop}(x) A^T) B^T, \qquad s = \alpha / r

    with W and b frozen, A ``[r, in_features]`` and B ``[out_features, r]``. B starts at zero: a
    fresh adapter changes no bit.

    Args:
        targets: see `Adapter`, as are exclude, layers, layers_pattern and modules_to_save.
        rank: r.
        alpha: the numerator of s; None means `rank`.
        dropout: probability that an element of x is left out of the update, in training.
        rank_pattern: ranks of particular modules: a regular expression that matches the end of
            their path, and the rank. The first that matches counts.
        alpha_pattern: the same for alpha.
        rslora: s = alpha / sqrt(r) (rank-stabilised, Kalajdzievski 2023, arXiv:2312.03732).
        dora: learn the norm of every row beside its direction (DoRA, Liu et al. 2024,
            arXiv:2402.09353, eq. 5): y = m / n · (x Wᵀ + s u Bᵀ) + b, n = ‖W + s B A‖ by rows,
            without a gradient.
        bias: "none"; "lora_only": train the biases of adapted layers; "all": train every bias. They
            are the model's own, so at most one adapter may.
        lora_bias: a bias beside B, s times which is added to y.
        init: "kaiming": A uniform within ±1 / sqrt(in_features), B zero; "gaussian": A normal with
            deviation 1 / r, B zero; "random": neither zero.
        dtype: of A and B; None means float32, or float64 over a float64 layer. The products are
            those of `fastweights.lora_linear`, which takes any dtype beside any other.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.adapters import LoRA
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
        >>> model = fw.adapt(model, LoRA(rank=4))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        896
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    init: str = "kaiming"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise ValueError(f"{name}: expected rank >= 1, got {rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{name}: expected 0 <= dropout < 1, got {self.dropout}")
        if self.bias not in _BIASES:
            raise ValueError(f"{name}: expected bias in {_BIASES}, got {self.bias!r}")
        if self.init not in _INITS:
            raise ValueError(f"{name}: expected init in {_INITS}, got {self.init!r}")
        if self.dora and self.lora_bias:
            raise ValueError(f"{name}: expected dora or lora_bias, got both")

    def build(self, module: nn.Module, path: str, name: str, known: Any = None) -> AdapterLayer:
        """See `Adapter.build`."""
        layer = module if isinstance(module, LoRALayer) else layer_for(module, path)
        layer.add(name, self, path, known)
        return layer

    def initialize(self, layer: LoRALayer, name: str, known: Any) -> None:
        """Gives a layer's new adapter its first values; `known` is what the survey found."""
        layer.reset(name, self.init)


def layer_for(module: nn.Module, path: str) -> LoRALayer:
    """A layer without adapters over a module.

    Raises:
        TypeError: LoRA has none for such modules.
    """
    if is_linear(module):
        return LoRALinear(module)
    if is_embedding(module):
        return LoRAEmbedding(module)
    if is_convolution(module):
        return LoRAConv(module)
    raise TypeError(
        f"LoRA: expected {path} to be nn.Linear, Conv1D of transformers, QuantizedLinear, "
        f"nn.Embedding without max_norm, or a convolution, got {type(module).__name__}"
    )
