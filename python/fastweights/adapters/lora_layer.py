"""What LoRA's layers have in common: A, B, their scale, and DoRA's norms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastweights.adapters.base import (
    as_matrix,
    bias_of,
    device_of,
    dtype_of,
    fresh,
    replaced,
    row_tiles,
)
from fastweights.adapters.protocol import AdapterLayer
from fastweights.adapters.rounding import rounded, wide_dtype
from fastweights.adapters.rules import pattern_value

if TYPE_CHECKING:
    from fastweights.adapters.lora import LoRA

__all__ = ["LoRALayer"]


class LoRALayer(AdapterLayer):
    """A layer with low-rank updates W + Σ s_i B_i A_i; subclasses know the layer.

    Names are those of PEFT, `lora_A.<adapter>` and so on, so that files fit.

    Attributes:
        configs: the `LoRA` of every adapter.
    """

    configs: dict[str, LoRA]  # type: ignore[assignment]
    base_layer: nn.Module
    scale: Tensor
    down, up = "lora_A", "lora_B"  # where A and B are kept
    lora_magnitude_vector: nn.ParameterDict
    lora_bias: nn.ParameterDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for name in (self.down, self.up, "lora_magnitude_vector"):
            setattr(self, name, nn.ParameterDict())
        self._scaling: dict[str, float] = {}
        self.register_buffer("scale", None, persistent=False)
        self.train(base_layer.training)

    @property
    def scaling(self) -> Mapping[str, float]:
        """S of every adapter, to be changed by `set_scale`."""
        return MappingProxyType(self._scaling)

    def set_scale(self, name: str, value: float) -> None:
        """Changes s of an adapter."""
        self._scaling[name] = float(value)
        self.refresh()

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B."""
        raise NotImplementedError

    def add(self, name: str, config: LoRA, path: str, known: Any = None) -> None:
        """Makes A and B, and what else an adapter has."""
        if config.lora_bias and not hasattr(self, "lora_bias"):
            raise TypeError(f"LoRA: expected lora_bias=False for {type(self).__name__} at {path}")
        rank = pattern_value(path, config.rank_pattern, config.rank)
        alpha = pattern_value(path, config.alpha_pattern, config.alpha)
        alpha = config.rank if alpha is None else alpha
        like = fresh(self.base_layer, config.dtype)
        a, b = self.shapes(rank)
        getattr(self, self.down)[name] = nn.Parameter(like.new_zeros(a))
        getattr(self, self.up)[name] = nn.Parameter(like.new_zeros(b))
        if config.lora_bias:
            self.lora_bias[name] = nn.Parameter(like.new_zeros(b[0]))
        self._scaling[name] = alpha / (math.sqrt(rank) if config.rslora else rank)
        super().add(name, config, path)
        config.initialize(self, name, known)
        if config.dora:
            norms = self.norms(name).to(like.dtype)
            self.lora_magnitude_vector[name] = nn.Parameter(self.across(norms))

    def remove(self, name: str) -> None:
        """Takes an adapter away."""
        del self._scaling[name]
        super().remove(name)

    def reset(self, name: str, init: str) -> None:
        """Draws A, and B for "random", as nn.Linear and nn.Conv draw their weights."""
        a, b = self.factors(name)
        if init == "gaussian":
            nn.init.normal_(a, std=1 / len(a))
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if init == "random":
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of an adapter."""
        return getattr(self, self.down)[name], getattr(self, self.up)[name]

    def matrices(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A ``[rank, in]`` and s B ``[out, rank]``."""
        a, b = (t.detach().to(dtype).flatten(1) for t in self.factors(name))
        return a, b * self._scaling[name]

    def delta(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The update s B A of an adapter, ``[out_features, in_features]``."""
        a, b = self.matrices(name, dtype)
        return b @ a

    @torch.no_grad()
    def norms(self, name: str) -> Tensor:
        """DoRA's n: ‖W + s B A‖ by rows, ``[out_features]``."""
        dtype = dtype_of(self.base_layer)
        wide = dtype if dtype == torch.float64 else torch.float32
        a, b = self.matrices(name, wide)
        tiles = row_tiles(self.base_layer, wide)
        return torch.cat([(tile + b[part] @ a).norm(dim=1) for part, tile in tiles])

    def direction(self, name: str) -> Tensor:
        """DoRA's m / n; the gradient is m's."""
        m = self.lora_magnitude_vector[name]
        direction: Tensor = m / self.across(self.norms(name).to(m.dtype))
        return direction

    def across(self, values: Tensor) -> Tensor:
        """One value per output in the shape that meets y."""
        return values

    def original_rows(self, tile: Tensor, part: slice) -> Tensor:
        """Some rows of W as they were before any adapter."""
        return tile

    def merged_rows(self, tile: Tensor, part: slice, names: Iterable[str]) -> Tensor:
        """Some rows of W with the updates of adapters added."""
        result = tile.clone()
        for name in names:
            if name not in self.configs:
                continue
            a, b = self.matrices(name, tile.dtype)
            if name not in self.lora_magnitude_vector:
                result.addmm_(b[part], a)
                continue
            turned = torch.addmm(tile, b[part], a)
            m = self.lora_magnitude_vector[name].detach().flatten()[part].to(tile.dtype)
            result += turned * (m / turned.norm(dim=1)).unsqueeze(1) - tile
        return result

    @torch.no_grad()
    def merged_layer(
        self, names: tuple[str, ...], dtype: torch.dtype | None, rounding: str
    ) -> nn.Module:
        """A layer of the base's kind with the updates in its weight."""
        base = self.base_layer
        chosen = dtype or dtype_of(base)
        shape: tuple[int, ...] = base.weight.shape  # type: ignore[assignment]
        weight = self.scale.new_empty(shape, dtype=chosen)
        matrix = as_matrix(base, weight)
        for part, tile in row_tiles(base, wide_dtype(chosen)):
            matrix[part] = rounded(self.merged_rows(tile, part, names), chosen, rounding)
        bias = bias_of(base)
        for name in names:
            if name in getattr(self, "lora_bias", ()):
                own = self.lora_bias[name].double() * self._scaling[name]
                bias = own if bias is None else bias.double() + own
        return replaced(base, weight, bias if bias is None else bias.detach().to(chosen))

    def dropout(self) -> tuple[float, Tensor | None]:
        """The probability for this call, and a seed nobody had before."""
        if not self.training:
            return 0.0, None
        chances = {self.configs[name].dropout for name in self.used}
        if len(chances) > 1:
            raise ValueError(
                "LoRA: expected adapters that are trained together to have one dropout, got "
                + " and ".join(map(str, sorted(chances)))
            )
        chance = chances.pop() if chances else 0.0
        return chance, torch.randint(2**62, (1,)) if chance else None

    def check_rows(self, names: Any) -> None:
        """DoRA scales the base's part of y as well, which is no update of a row."""
        for name in names:
            if name in self.lora_magnitude_vector:
                raise ValueError(f"per_sample: expected adapters without DoRA, got {name!r}")

    def refresh(self) -> None:
        """Makes `scale` for the adapters of a call."""
        super().refresh()
        values = [self._scaling[name] for name in self.used]
        device = device_of(self.base_layer)
        self.scale = torch.tensor(values, dtype=torch.float64, device=device)

    def extra_repr(self) -> str:
        """Adapters with their ranks and scales."""
        described = [
            f"{name}: rank={len(self.factors(name)[0])}, scale={scale:g}"
            for name, scale in self._scaling.items()
        ]
        return "; ".join(described)
