"""Modules that an adapter trains whole (`modules_to_save`)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastweights.adapters.protocol import Adapter, AdapterLayer

__all__ = ["SavedModule"]


class SavedModule(AdapterLayer):
    """The module of the first active adapter that has one, else the original.

    Args:
        original_module: copied for every adapter and left as it is.

    Attributes:
        modules_to_save: the copies, by adapter.
    """

    wrapped = "original_module"
    original_module: nn.Module

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__(original_module)
        self.modules_to_save = nn.ModuleDict()
        self.train(original_module.training)

    def add(self, name: str, config: Adapter, path: str) -> None:
        """Copies the original."""
        super().add(name, config, path)
        self.modules_to_save[name] = copy.deepcopy(self.original_module)

    def activate(self, names: tuple[str, ...]) -> None:
        """Modules do not add up: at most one of the names may have one."""
        here = [name for name in names if name in self.configs]
        if len(here) > 1:
            raise ValueError(
                "activate: expected at most one adapter with modules_to_save, got "
                + " and ".join(map(repr, here))
            )
        super().activate(names)

    def forward(self, x: Any, *args: Any, **options: Any) -> Any:
        """As the module in use; by samples, a tensor put together of what each gives."""
        if self.rows is None or not self.used:
            return self._module(self.used[0] if self.used else None)(x, *args, **options)
        result: Tensor | None = None
        for i, name in enumerate((*self.used, None)):
            mine = self.rows == (-1 if name is None else i)
            if not mine.any():
                continue
            y = self._module(name)(x[mine], *args, **options)
            if result is None:
                result = y.new_empty(len(x), *y.shape[1:])
            result[mine] = y
        return result

    def _module(self, name: str | None) -> nn.Module:
        return self.original_module if name is None else self.modules_to_save[name]

    def check_merge(self, names: tuple[str, ...], quantized: bool) -> None:
        """A module that takes the place of codes rounds none."""
        super().check_merge(names, True)

    def merged_layer(
        self, names: tuple[str, ...], dtype: torch.dtype | None, rounding: str
    ) -> nn.Module:
        """The trained module."""
        here = [name for name in names if name in self.configs]
        return self._module(here[0] if here else None)

    def merge(self, names: tuple[str, ...], dtype: torch.dtype | None, rounding: str) -> None:
        """Nothing: a whole module is exact as it is."""
