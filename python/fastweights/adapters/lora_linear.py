"""LoRA on linear layers, through the op."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastweights.adapters.base import (
    as_matrix,
    bias_of,
    changed,
    matrix_of,
    order_of,
    row_tiles,
    sizes,
)
from fastweights.adapters.lora_layer import LoRALayer
from fastweights.adapters.rounding import wide_dtype
from fastweights.ops.lora.functional import lora_linear
from fastweights.ops.quantization.layers import QuantizedLinear

if TYPE_CHECKING:
    from fastweights.adapters.lora import LoRA

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
        initial_A: A by adapter as it was when `take_out` took s B A out of the base.
        initial_B: B by adapter, the same.
        withheld: adapters that took something out of the base and are not in use: what they took
            is added to y, so that the others meet the layer as it was.
    """

    untrained = ("initial_A", "initial_B")
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_bias = nn.ParameterDict()
        self.initial_A, self.initial_B = nn.ParameterDict(), nn.ParameterDict()
        self._initial_scaling: dict[str, float] = {}
        self.withheld: tuple[str, ...] = ()
        self._turned: tuple[str, ...] = ()
        self._biased: tuple[str, ...] = ()
        self.in_features, self.out_features = sizes(base_layer)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B."""
        return (rank, self.in_features), (self.out_features, rank)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if not self.used:
            y: Tensor = self.bare()(x)
        else:
            y = self._with_dora(x) if self._turned else self._sum(x, self.used, self.scale)
        for name in self.withheld:
            a, b = self._initial(name, self.initial_A[name].dtype)
            y = y + F.linear(F.linear(x.to(a.dtype), a), b).to(y.dtype)
        return y

    def adds_only_updates(self) -> bool:
        """Whether a call is the base and plain low-rank updates of every row, without dropout."""
        if not self.used or self._turned or self._biased or self.withheld or self.rows is not None:
            return False
        return not self.training or all(self.configs[name].dropout == 0 for name in self.used)

    def _sum(self, x: Tensor, names: Sequence[str], scale: Tensor, bias: bool = True) -> Tensor:
        """The base with the updates of some adapters."""
        base, downs, ups = self.base_layer, self.lora_A, self.lora_B
        lora_a = [downs[name] for name in names]
        lora_b = [ups[name] for name in names]
        order = order_of(base)
        if order is not None:  # the columns of such a weight meet x in another order
            x = x.index_select(-1, order)
            lora_a = [a.index_select(1, order) for a in lora_a]
        dropout, seed = self.dropout()
        b = self._bias(base, x, names, scale) if bias else None
        y = lora_linear(
            x, matrix_of(base), b, lora_a, lora_b, scale,
            indices=self.rows, dropout=dropout, seed=seed,
        )  # fmt: skip
        return y if self.rows is None else self._biased_rows(y, names)

    def _bias(
        self, base: nn.Module, x: Tensor, names: Sequence[str], scale: Tensor
    ) -> Tensor | None:
        bias = bias_of(base)
        if self.rows is not None or not self._biased:
            return bias
        for name, s in zip(names, scale, strict=True):
            if name in self._biased:
                own = s.to(self.lora_bias[name].dtype) * self.lora_bias[name]
                bias = own if bias is None else bias + own
        return bias if bias is None else bias.to(x.dtype)

    def _biased_rows(self, y: Tensor, names: Sequence[str]) -> Tensor:
        """Adds every sample its adapter's bias."""
        if self.rows is None or not self._biased:
            return y
        table = y.new_zeros(len(names) + 1, self.out_features)  # the last row is for -1
        for i, name in enumerate(names):
            if name in self._biased:
                table[i] = self.lora_bias[name] * self._scaling[name]
        shape = (*self.rows.shape, *[1] * (y.dim() - 1 - self.rows.dim()), self.out_features)
        return y + table[self.rows].view(shape)

    def _with_dora(self, x: Tensor) -> Tensor:
        """Every adapter with DoRA adds m / n · (x Wᵀ + s u Bᵀ) - x Wᵀ."""
        turned = self._turned
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

    @torch.no_grad()
    def take_out(self, name: str, a: Tensor, b: Tensor) -> None:
        """Starts an adapter with A and B and takes s B A out of the base: together they are W."""
        if any(other in self.lora_magnitude_vector for other in self.configs if other != name):
            raise ValueError(f"LoRA: expected no DoRA beside {name!r}, which changes the base")
        for parameter, value in zip(self.factors(name), (a, b), strict=True):
            parameter.copy_(value)
        self.initial_A[name] = nn.Parameter(self.lora_A[name].detach().clone(), False)
        self.initial_B[name] = nn.Parameter(self.lora_B[name].detach().clone(), False)
        self._initial_scaling[name] = self._scaling[name]
        self.base_layer = self._with_initial([name], -1)
        self.refresh()

    @torch.no_grad()
    def give_back(self, name: str) -> None:
        """Puts into the base again what an adapter took out, with one rounding."""
        self.base_layer = self._with_initial([name], 1)
        del self.initial_A[name], self.initial_B[name], self._initial_scaling[name]
        self.refresh()

    def start_taken_back(self, name: str) -> tuple[Tensor, Tensor]:
        """The A and B that subtract, at the adapter's scale, what its start added."""
        if self.scaling[name] == 0:
            raise ValueError(f"LoRA: expected a scale of {name!r} that is not 0")
        ratio = self._initial_scaling[name] / self.scaling[name]
        return self.initial_A[name].detach(), -ratio * self.initial_B[name].detach()

    def float_base(self) -> nn.Module:
        """The base, if its weight can be changed."""
        base = self.base_layer
        if isinstance(base, QuantizedLinear):
            raise TypeError(
                "LoRA: expected a float layer to take the start of an adapter from and give it "
                f"back to, got {base.format}; adapt first, quantize_ then"
            )
        return base

    def _initial(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a, b = (t[name].detach().to(dtype) for t in (self.initial_A, self.initial_B))
        return a, b * self._initial_scaling[name]

    def _with_initial(self, names: Sequence[str], sign: int) -> nn.Module:
        """The base with what adapters took out of it added, or subtracted."""
        base = self.float_base()
        weight = torch.empty_like(base.weight)  # type: ignore[arg-type]
        matrix = as_matrix(base, weight)
        for part, tile in row_tiles(base, wide_dtype(weight.dtype)):
            matrix[part] = self._rows_with_initial(tile, part, names, sign)
        return changed(base, weight=weight)

    def _rows_with_initial(
        self, tile: Tensor, part: slice, names: Sequence[str], sign: int = 1
    ) -> Tensor:
        for name in names:
            a, b = self._initial(name, tile.dtype)
            tile = torch.addmm(tile, b[part], a, alpha=sign)
        return tile

    def original_rows(self, tile: Tensor, part: slice) -> Tensor:
        """With all that was taken out."""
        return self._rows_with_initial(tile, part, list(self.initial_A))

    def merged_rows(self, tile: Tensor, part: slice, names: Iterable[str]) -> Tensor:
        """As `LoRALayer.merged_rows`, and what other adapters took out."""
        names = list(names)
        others = [name for name in self.initial_A if name not in names]
        return super().merged_rows(self._rows_with_initial(tile, part, others), part, names)

    def original(self) -> nn.Module:
        """With all that was taken out."""
        return self._with_initial(list(self.initial_A), 1) if self.initial_A else super().original()

    def add(self, name: str, config: LoRA, path: str, known: Any = None) -> None:
        """As `LoRALayer.add`."""
        if config.dora and self.initial_A:
            raise ValueError(
                f"LoRA: expected no DoRA beside {next(iter(self.initial_A))!r}, "
                "which changes the base"
            )
        super().add(name, config, path, known)

    def remove(self, name: str) -> None:
        """Takes an adapter away and gives back what it took."""
        if name in self.initial_A:
            self.give_back(name)
        super().remove(name)

    def refresh(self) -> None:
        """Finds out what has to be added to y."""
        super().refresh()
        # A call looks at nothing that it can be told before.
        self._turned = tuple(name for name in self.used if name in self.lora_magnitude_vector)
        self._biased = tuple(name for name in self.used if name in self.lora_bias)
        taken = () if self.merged and self.enabled else tuple(self.initial_A)
        self.withheld = tuple(name for name in taken if name not in self.used)

    def check_rows(self, names: Any) -> None:
        """Rows that meet an adapter which changed the base would need another base than others."""
        super().check_rows(names)
        if self.initial_A:
            raise ValueError(
                "per_sample: expected adapters that leave the base as it is, got "
                f"{next(iter(self.initial_A))!r}; use fastweights.adapters.to_lora first"
            )
