"""LoRA on linear layers, through the op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastweights.adapters.base import (
    bias_of,
    matrix_of,
    order_of,
    sizes,
)
from fastweights.adapters.lora_layer import LoRALayer
from fastweights.ops.lora.functional import lora_linear
from fastweights.ops.quantization.functional import quantize
from fastweights.ops.quantization.layers import QuantizedLinear

__all__ = ["LoRALinear"]


class LoRALinear(LoRALayer):
    """y = x Wᵀ + b + Σ_i s_i (drop(x) A_iᵀ) B_iᵀ over the active adapters (`LoRA`).

    One call of `fastweights.lora_linear`, whatever the number of adapters; by samples within
    `fastweights.adapters.per_sample`. The base's own forward is not called, nor are its hooks.

    Args:
        base_layer: `nn.Linear`, `Conv1D` of transformers or `fastweights.nn.QuantizedLinear`.

    Attributes:
        lora_A: A by adapter, ``[rank, in_features]``.
        lora_B: B by adapter, ``[out_features, rank]``.
        lora_bias: by adapter, ``[out_features]``, where it has one.
        lora_magnitude_vector: m of DoRA by adapter, ``[out_features]``, where it has one.
    """

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_bias = nn.ParameterDict()
        self.in_features, self.out_features = sizes(base_layer)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B."""
        return (rank, self.in_features), (self.out_features, rank)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if not self.used:
            y: Tensor = self.bare()(x)
            return y
        turned = [name for name in self.used if name in self.lora_magnitude_vector]
        return self._turned(x, turned) if turned else self._sum(x, self.used, self.scale)

    def _sum(self, x: Tensor, names: Sequence[str], scale: Tensor, bias: bool = True) -> Tensor:
        """The base with the updates of some adapters."""
        base = self.base_layer
        lora_a = [self.lora_A[name] for name in names]
        lora_b = [self.lora_B[name] for name in names]
        order = order_of(base)
        if order is not None:  # the columns of such a weight meet x in another order
            x = x.index_select(-1, order)
            lora_a = [a.index_select(1, order) for a in lora_a]
        dropout, seed = self.dropout()
        b = self._bias(x, names, scale) if bias else None
        y = lora_linear(
            x, matrix_of(base), b, lora_a, lora_b, scale,
            indices=self.rows, dropout=dropout, seed=seed,
        )  # fmt: skip
        return y if self.rows is None else self._biased_rows(y, names)

    def _bias(self, x: Tensor, names: Sequence[str], scale: Tensor) -> Tensor | None:
        bias = bias_of(self.base_layer)
        if self.rows is not None or not self.lora_bias:
            return bias
        for name, s in zip(names, scale, strict=True):
            if name in self.lora_bias:
                own = s.to(self.lora_bias[name].dtype) * self.lora_bias[name]
                bias = own if bias is None else bias + own
        return bias if bias is None else bias.to(x.dtype)

    def _biased_rows(self, y: Tensor, names: Sequence[str]) -> Tensor:
        """Adds every sample its adapter's bias."""
        if self.rows is None or not any(name in self.lora_bias for name in names):
            return y
        table = y.new_zeros(len(names) + 1, self.out_features)  # the last row is for -1
        for i, name in enumerate(names):
            if name in self.lora_bias:
                table[i] = self.lora_bias[name] * self._scaling[name]
        shape = (*self.rows.shape, *[1] * (y.dim() - 1 - self.rows.dim()), self.out_features)
        return y + table[self.rows].view(shape)

    def _turned(self, x: Tensor, turned: list[str]) -> Tensor:
        """With DoRA: every such adapter adds m / n · (x Wᵀ + s u Bᵀ) - x Wᵀ."""
        plain = [name for name in self.used if name not in turned]
        scale = dict(zip(self.used, self.scale.split(1), strict=True))
        y = None
        for name in turned:
            z = self._sum(x, [name], scale[name], bias=False)
            z = (self.direction(name) * z).to(z.dtype)
            y = z if y is None else y + z
        assert y is not None
        if not plain and len(turned) == 1:
            bias = bias_of(self.base_layer)
            return y if bias is None else y + bias.to(y.dtype)
        rest = torch.cat([scale[name] for name in plain]) if plain else self.scale[:0]
        bare = self._sum(x, [], self.scale[:0], bias=False)
        return y + self._sum(x, plain, rest) - len(turned) * bare

    def check_merge(self, names: tuple[str, ...], quantized: bool) -> None:
        """Codes are not rounded again unasked."""
        super().check_merge(names, quantized)
        if isinstance(self.base_layer, QuantizedLinear) and not quantized:
            raise ValueError(
                f"merge: expected quantized=True to round {self.base_layer.format} weights again, "
                "which loses of the update what the format cannot hold"
            )

    def keep(self, matrix: Tensor, bias: Tensor | None) -> nn.Module:
        """As `LoRALayer.keep`; codes are found anew."""
        base = self.base_layer
        if not isinstance(base, QuantizedLinear):
            return super().keep(matrix, bias)
        columns = matrix if base.order is None else matrix[:, base.order]
        weight = quantize(
            columns, base.format, group_size=base.group_size, activation=base.activation
        )
        return QuantizedLinear(weight, bias, base.order).train(base.training)
