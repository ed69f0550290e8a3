"""Low-rank adapters on linear layers (LoRA, 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """y = x Wᵀ + b + (alpha / rank) · (x Aᵀ) Bᵀ with W and b frozen (LoRA, eq. 3).

    B starts at zero, so the layer starts out bit for bit as `base`.

    Args:
        base: the linear layer; its parameters stop requiring gradients.
        rank: rows r of A and columns of B.
        alpha: numerator of the scale; the update grows with alpha / rank.

    Attributes:
        lora_a: `[r, in_features]`, U(−1/√in, 1/√in) (Kaiming with a = √5).
        lora_b: `[out_features, r]`, zeros.
        enabled: False leaves out the update.
    """

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRALinear: expected rank >= 1, got {rank}")
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.enabled = rank, alpha, True
        weight = base.weight
        self.lora_a = nn.Parameter(weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(weight.new_zeros(base.out_features, rank))
        nn.init.uniform_(self.lora_a, -(base.in_features**-0.5), base.in_features**-0.5)

    @property
    def scale(self) -> float:
        """Alpha / rank."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        return y + F.linear(F.linear(x, self.lora_a), self.lora_b * self.scale)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with W + scale · BA as its weight (W is changed in place)."""
        update = self.scale * (self.lora_b.double() @ self.lora_a.double())
        self.base.weight.copy_(self.base.weight.double() + update)
        return self.base

    def extra_repr(self) -> str:
        """Rank and scale."""
        return f"rank={self.rank}, alpha={self.alpha}"


def add_lora(
    model: nn.Module, targets: tuple[str, ...], *, rank: int = 8, alpha: float = 16.0
) -> list[LoRALinear]:
    """Puts a `LoRALinear` over every `nn.Linear` whose last name is in `targets`, in place.

    Args:
        model: any module.
        targets: attribute names such as `("q_proj", "v_proj")`.
        rank: see `LoRALinear`.
        alpha: see `LoRALinear`.

    Returns:
        The new layers, in module order.

    Raises:
        ValueError: no such layer exists.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name in targets and isinstance(child, nn.Linear)
    ]
    if not found:
        raise ValueError(f"add_lora: expected linear layers named {', '.join(targets)}, found none")
    layers = []
    for parent, name, child in found:
        layer = LoRALinear(child, rank, alpha).train(child.training)
        setattr(parent, name, layer)
        layers.append(layer)
    return layers


def merge_lora(model: nn.Module) -> None:
    """Replaces every `LoRALinear` of `model` by its merged base layer, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Within the context every `LoRALinear` of `model` computes its base layer only."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
