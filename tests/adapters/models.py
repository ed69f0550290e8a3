"""Small models to adapt."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastweights as fw
from fastweights.adapters import LoRA, adapter_layers


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = Conv1D(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.sigmoid(self.q_proj(x)) * self.v_proj(x)
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Blocks in a list, a head; `Conv1D` of transformers among the layers."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def model(**sizes: int) -> Model:
    torch.manual_seed(0)
    made = Model(**sizes)
    for module in made.modules():
        if isinstance(module, Conv1D):
            nn.init.normal_(module.weight, std=0.2)
    return made


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3)), 32, generator=torch.Generator().manual_seed(1))


def shake(adapted: nn.Module, name: str = "default", by: float = 0.2) -> None:
    """Moves an adapter away from where it starts."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapter_layers(adapted):
            for p in layer.own_parameters(name) if name in layer.configs else ():
                p += by * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def quantized(format: str = "int8") -> nn.Module:
    return fw.quantize_(model(), format, group_size=32, skip=())


VARIANTS = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "lora_bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {"up": 3}, "alpha_pattern": {"down": 1}},
    "random": {"init": "random"},
    "gaussian": {"init": "gaussian"},
}


def adapted(base=None, name="default", **options):
    options = {"rank": 4, "alpha": 8.0} | options
    return fw.adapt(base or model(), LoRA(**options), name=name)


def two(**options):
    ours = adapted(name="a", **options)
    fw.adapt(ours, LoRA(rank=2, alpha=1, targets=["q_proj", "down", "head"]), name="b")
    shake(ours, "a")
    shake(ours, "b")
    return ours
