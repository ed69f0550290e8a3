"""LoRA on convolutions."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastweights.adapters.lora_added import AddedLoRALayer

__all__ = ["LoRAConv", "is_convolution"]

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the dimensions of a weight


def is_convolution(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Whether a module is a convolution whose computation is known."""
    return any(isinstance(module, k) and type(module).forward is k.forward for k in _KINDS)


class LoRAConv(AddedLoRALayer):
    """y = W * x + b + Σ_i s_i B_i * (A_i * drop(x)): A convolves as W does, B has a kernel of one.

    With groups, A sees all channels and B has the groups, as in PEFT; such an update is no change
    of W, so it cannot be merged, and DoRA is refused.

    Args:
        base_layer: `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.

    Attributes:
        lora_A: A by adapter, ``[rank, in_channels, *kernel_size]``.
        lora_B: B by adapter, ``[out_channels, rank / groups, 1, ...]``.
        lora_bias: by adapter, ``[out_channels]``, where it has one.
        lora_magnitude_vector: m of DoRA by adapter, ``[1, out_channels, 1, ...]``.
    """

    base_layer: nn.Conv1d | nn.Conv2d | nn.Conv3d
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict

    def __init__(self, base_layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__(base_layer)
        self.lora_bias = nn.ParameterDict()

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B."""
        base = self.base_layer
        if rank % base.groups:
            raise ValueError(
                f"LoRA: expected a rank that the {base.groups} groups divide, got {rank}"
            )
        ones = (1,) * len(base.kernel_size)
        down = (rank, base.in_channels, *base.kernel_size)
        return down, (base.out_channels, rank // base.groups, *ones)

    def update(self, name: str, x: Tensor) -> Tensor:
        """S (B * (A * drop(x)) + lora_bias)."""
        base = self.base_layer
        a, b = self.factors(name)
        x = F.dropout(x, self.configs[name].dropout, self.training).to(a.dtype)
        padding = base.padding
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = (0,) * len(base.kernel_size)
        convolve = _FUNCTIONS[a.dim()]
        u = convolve(x, a, None, base.stride, padding, base.dilation)
        bias = self.lora_bias.get(name)
        return convolve(u, b, bias, groups=base.groups) * self.scaling[name]

    def across(self, values: Tensor) -> Tensor:
        """``[1, out_channels, 1, ...]``."""
        return values.view(1, -1, *[1] * len(self.base_layer.kernel_size))

    def matrices(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `LoRALayer.matrices`, where there are no groups."""
        if self.base_layer.groups > 1:
            raise ValueError(
                "LoRA: expected a convolution without groups for DoRA and merging, "
                f"got {self.base_layer.groups}"
            )
        return super().matrices(name, dtype)

    def check_merge(self, names: tuple[str, ...], quantized: bool) -> None:
        """Refuses groups before anything is changed."""
        super().check_merge(names, quantized)
        for name in names:
            if name in self.configs:
                self.matrices(name, self.scale.dtype)
