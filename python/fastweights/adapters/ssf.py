"""SSF: a scale and a shift after every operation, merged away for inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastweights.adapters.base import (
    as_matrix,
    bias_of,
    changed,
    dtype_of,
    fresh,
    is_linear,
    replaced,
    row_tiles,
    sizes,
)
from fastweights.adapters.lora_conv import is_convolution
from fastweights.adapters.protocol import Adapter, AdapterLayer
from fastweights.adapters.rounding import rounded, wide_dtype
from fastweights.quantization.walk import set_module

__all__ = ["SSF", "Affine", "SSFLayer", "push_shift"]

_FIRST = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)  # channels in dimension 1
_LAST = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True, kw_only=True)
class SSF(Adapter):
    r"""Scaling and shifting features (Lian et al. 2022, arXiv:2210.08823, eq. 4).

    .. math::
        y' = \gamma \odot y + \beta

    after linear layers, convolutions and norms, one number of each per channel: the last dimension
    of tokens, dimension 1 of feature maps. `fastweights.adapters.merge` puts both into weights and
    biases; a norm without bias keeps its shift beside it (`push_shift` moves it on). Several active
    adapters follow one another, in the order they are given.

    Args:
        targets: see `Adapter`, as are the others; "all-linear" means convolutions, too.
        include_norms: norms as well, whatever `targets` names.
        exact_init: start at 1 and 0, so that nothing changes; else γ ~ N(1, 0.02²) and
            β ~ N(0, 0.02²), as the authors do.
        dtype: of γ and β; None means float32, or float64 over a float64 layer.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.adapters import SSF, merge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16))
        >>> model = fw.adapt(model, SSF())
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        64
        >>> [type(layer).__name__ for layer in merge(model)]
        ['Linear', 'LayerNorm']
    """

    include_norms: bool = True
    exact_init: bool = False
    dtype: torch.dtype | None = None

    def covers(self, module: nn.Module) -> bool:
        """See `Adapter.covers`."""
        return is_linear(module) or is_convolution(module)

    def adds(self, module: nn.Module) -> bool:
        """See `Adapter.adds`."""
        return self.include_norms and _is_norm(module)

    def build(self, module: nn.Module, path: str, name: str, known: Any = None) -> AdapterLayer:
        """See `Adapter.build`."""
        if not isinstance(module, SSFLayer):
            if not (self.covers(module) or _is_norm(module)):
                raise TypeError(
                    f"SSF: expected {path} to be a linear layer, a convolution or a norm, got "
                    f"{type(module).__name__}"
                )
            module = SSFLayer(module)
        module.add(name, self, path)
        return module


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return isinstance(module, _FIRST + _LAST) or (
        named and isinstance(weight, nn.Parameter) and weight.dim() == 1
    )


def _channels(module: nn.Module) -> int:
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.num_features
    if isinstance(module, _LAST):
        return int(module.normalized_shape[-1])
    if is_convolution(module):
        return module.out_channels
    return sizes(module)[1] if is_linear(module) else len(module.weight)  # type: ignore[arg-type]


class SSFLayer(AdapterLayer):
    """γ ⊙ base(x) + β (`SSF`).

    Args:
        base_layer: a linear layer, a convolution or a norm.

    Attributes:
        ssf_scale: γ by adapter, ``[channels]``.
        ssf_shift: β by adapter, ``[channels]``.
    """

    configs: dict[str, SSF]  # type: ignore[assignment]
    base_layer: nn.Module
    ssf_scale: nn.ParameterDict
    ssf_shift: nn.ParameterDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.ssf_scale, self.ssf_shift = nn.ParameterDict(), nn.ParameterDict()
        first = isinstance(base_layer, _FIRST) or is_convolution(base_layer)
        self.channel_dim = 1 if first else -1
        self.train(base_layer.training)

    def add(self, name: str, config: SSF, path: str) -> None:
        """Draws γ and β."""
        super().add(name, config, path)
        like, channels = fresh(self.base_layer, config.dtype), _channels(self.base_layer)
        self.ssf_scale[name] = nn.Parameter(like.new_ones(channels))
        self.ssf_shift[name] = nn.Parameter(like.new_zeros(channels))
        if not config.exact_init:
            nn.init.normal_(self.ssf_scale[name], 1.0, 0.02)
            nn.init.normal_(self.ssf_shift[name], 0.0, 0.02)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """As the base, scaled and shifted."""
        y: Tensor = self.bare()(x, *args, **options)
        dtype = y.dtype
        if self.rows is not None and self.used:
            scale, shift = self._by_sample(self.rows)
            return torch.addcmul(self._across(shift, y), y, self._across(scale, y)).to(dtype)
        for name in self.used:
            scale, shift = self.ssf_scale[name], self.ssf_shift[name]
            y = torch.addcmul(self._across(shift, y), y, self._across(scale, y))
        return y.to(dtype)

    def _by_sample(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """γ and β of every sample; the last of the table is for -1."""
        scales = [self.ssf_scale[name] for name in self.used]
        shifts = [self.ssf_shift[name] for name in self.used]
        one = torch.ones_like(scales[0])
        scale, shift = torch.stack([*scales, one]), torch.stack([*shifts, one * 0])
        return scale[rows], shift[rows]

    def _across(self, values: Tensor, y: Tensor) -> Tensor:
        """Values ``[channels]``, or ``[B, channels]``, in a shape that meets y."""
        if values.dim() == 1:
            return values if self.channel_dim == -1 else values.view(-1, *[1] * (y.dim() - 2))
        ones = [1] * (y.dim() - 2)
        by_sample = (len(values), *ones, -1) if self.channel_dim == -1 else (len(values), -1, *ones)
        return values.view(by_sample)

    @torch.no_grad()
    def merged_layer(
        self, names: tuple[str, ...], dtype: torch.dtype | None, rounding: str
    ) -> nn.Module:
        """A layer of the base's kind; beside a norm without bias, `Affine`."""
        base = self.base_layer
        chosen = dtype or dtype_of(base)
        wide = wide_dtype(chosen)
        scale = torch.ones(_channels(base), dtype=wide)
        shift = torch.zeros_like(scale)
        for name in names:
            if name in self.configs:
                own = self.ssf_scale[name].to(wide)
                scale, shift = scale * own, shift * own + self.ssf_shift[name].to(wide)
        if _is_norm(base):
            return _merged_norm(base, scale, shift, chosen, rounding)
        shape: Sequence[int] = base.weight.shape  # type: ignore[assignment]
        weight = torch.empty(tuple(shape), dtype=chosen)
        matrix = as_matrix(base, weight)
        for part, tile in row_tiles(base, wide):
            matrix[part] = rounded(tile * scale[part].unsqueeze(1), chosen, rounding)
        return replaced(base, weight, _shifted(bias_of(base), scale, shift).to(chosen))


def _shifted(bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    return shift if bias is None else bias.detach().to(scale.dtype) * scale + shift


def _merged_norm(
    base: nn.Module, scale: Tensor, shift: Tensor, dtype: torch.dtype, rounding: str
) -> nn.Module:
    old = base._parameters.get("weight")
    if old is not None and isinstance(base, (*_FIRST, nn.LayerNorm)) and old.dim() == 1:
        weight = rounded(old.to(scale.dtype) * scale, dtype, rounding)
        return changed(base, weight=weight, bias=_shifted(base.bias, scale, shift).to(dtype))
    offset = None if old is None else _offset(base, old)
    if offset is None or old is None:
        return Affine(base, scale.to(dtype), shift.to(dtype))
    weight = old.to(scale.dtype) + offset
    norm = changed(base, weight=rounded(weight * scale - offset, dtype, rounding))
    return Affine(norm, None, shift.to(dtype))


def _offset(norm: nn.Module, weight: Tensor) -> float | None:
    """What a norm adds to its weight before it multiplies by it (Gemma's: 1), found by trial."""
    if norm._parameters.get("bias") is not None:
        return None
    x = torch.linspace(-2.0, 3.0, weight.numel(), dtype=weight.dtype).view(1, *weight.shape)
    y = norm(x)
    for offset in (0.0, 1.0):
        twice = changed(norm, weight=(weight + offset) * 2 - offset)(x)
        if torch.allclose(twice, y * 2, rtol=1e-2, atol=1e-4):
            return offset
    return None


class Affine(nn.Module):
    """scale ⊙ base(x) + shift, frozen: what is left of `SSF` beside a norm after a merge.

    Args:
        base: the norm.
        scale: ``[channels]`` or None.
        shift: ``[channels]``.
    """

    def __init__(self, base: nn.Module, scale: Tensor | None, shift: Tensor) -> None:
        super().__init__()
        self.base = base
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self.shift = nn.Parameter(shift, requires_grad=False)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """As the base."""
        y: Tensor = self.base(x)
        z = y + self.shift if self.scale is None else torch.addcmul(self.shift, y, self.scale)
        return z.to(y.dtype)


@torch.no_grad()
def push_shift(model: nn.Module, norm: str, into: Sequence[str]) -> None:
    """Moves the shift that a merge left beside a norm into the biases of what reads it: b + W β.

    Args:
        model: merged.
        norm: path of the norm.
        into: paths of the linear layers that read its output, all of them; nothing else may.

    Raises:
        ValueError: there is no shift, or a scale besides.
        TypeError: a reader is not a float linear layer.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.adapters import SSF, merge, push_shift
        >>> model = torch.nn.Sequential(torch.nn.RMSNorm(8), torch.nn.Linear(8, 8, bias=False))
        >>> model = merge(fw.adapt(model, SSF()))
        >>> push_shift(model, "0", into=["1"])
        >>> model
        Sequential(
          (0): RMSNorm((8,), eps=None, elementwise_affine=True)
          (1): Linear(in_features=8, out_features=8, bias=True)
        )
    """
    affine = model.get_submodule(norm)
    if not isinstance(affine, Affine) or affine.scale is not None:
        raise ValueError(
            f"push_shift: expected {norm} to be a norm that a merge left a shift beside, got "
            f"{type(affine).__name__}"
        )
    readers = [model.get_submodule(path) for path in into]
    for path, reader in zip(into, readers, strict=True):
        if not (is_linear(reader) and isinstance(reader.weight, Tensor)):
            raise TypeError(
                f"push_shift: expected {path} to be a float linear layer, got "
                f"{type(reader).__name__}"
            )
    for path, reader in zip(into, readers, strict=True):
        dtype = dtype_of(reader)
        wide = wide_dtype(dtype)
        moved = torch.cat([tile @ affine.shift.to(wide) for _, tile in row_tiles(reader, wide)])
        bias = bias_of(reader)
        total = moved if bias is None else moved + bias.to(wide)
        set_module(model, path, changed(reader, bias=total.to(dtype)))
    set_module(model, norm, affine.base)
