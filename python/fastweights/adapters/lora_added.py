"""LoRA on layers that no op of ours fuses: the update is added to what the base returns."""

from __future__ import annotations

from torch import Tensor

from fastweights.adapters.base import bias_of
from fastweights.adapters.lora_layer import LoRALayer

__all__ = ["AddedLoRALayer"]


class AddedLoRALayer(LoRALayer):
    """y = base(x) + Σ_i s_i up_i(down_i(x)), with DoRA m / n · (base(x) - b + update) + b."""

    def update(self, name: str, x: Tensor) -> Tensor:
        """The update of an adapter, s included."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """As the base."""
        base: Tensor = self.bare()(x)
        y = base
        for i, name in enumerate(self.used):
            if self.rows is None:
                y = y + self._change(name, x, base)
                continue
            mine = self.rows == i
            if mine.any():
                y = y.index_put((mine,), y[mine] + self.update(name, x[mine]).to(y.dtype))
        return y.to(base.dtype)

    def _change(self, name: str, x: Tensor, base: Tensor) -> Tensor:
        update = self.update(name, x)
        if name not in self.lora_magnitude_vector:
            return update
        bias = bias_of(self.base_layer)
        product = base if bias is None else base - self.across(bias)
        direction = self.direction(name)
        return (direction - 1) * product + direction * update
