"""Hyperparameters of single parameters, whatever group they are in."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["GlobalOptimManager"]


class GlobalOptimManager:
    """The registry of overrides, with the interface of bitsandbytes.

    An override replaces hyperparameters of the group that a parameter is in, such as `lr` or
    `optim_bits`. It holds for every optimizer of `fastweights.optim`, from its next step on;
    `optim_bits`, `min_8bit_size` and `block_size` only where the parameter has no state yet.
    Parameters and modules are not kept alive.

    Example:
        >>> manager = GlobalOptimManager.get_instance()
        >>> head = torch.nn.Linear(64, 1000)
        >>> manager.register_module_override(head, "weight", {"optim_bits": 32})
        >>> manager.override_config(head.bias, "lr", 1e-4)
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        self._of_parameters = WeakIdKeyDictionary()
        self._of_modules: list[tuple[weakref.ref[nn.Module], str, dict[str, Any]]] = []

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The one registry of the process."""
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Nothing to do here, other than in bitsandbytes: a parameter is found by what it is."""

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Override one hyperparameter, or those of a dictionary, for some parameters.

        Raises:
            ValueError: not exactly one of `key` and `key_value_dict`.
        """
        if (key is None) == (key_value_dict is None):
            raise ValueError("override_config: expected either key and value or key_value_dict")
        changes = {key: value} if key_value_dict is None else dict(key_value_dict)
        for p in [parameters] if isinstance(parameters, Tensor) else parameters:
            self._of_parameters[p] = self._of_parameters.get(p, {}) | changes

    def register_module_override(
        self, module: nn.Module, param_name: str, config: Mapping[str, Any]
    ) -> None:
        """Override hyperparameters for what `module.<param_name>` is at the time of a step."""
        self._of_modules.append((weakref.ref(module), param_name, dict(config)))

    def overrides(self) -> dict[int, dict[str, Any]]:
        """What is overridden now, by the `id` of the parameter."""
        self._of_modules = [entry for entry in self._of_modules if entry[0]() is not None]
        found: dict[int, dict[str, Any]] = {}
        for module, name, config in self._of_modules:
            p = getattr(module(), name, None)
            found[id(p)] = found.get(id(p), {}) | config
        for p, config in self._of_parameters.items():
            found[id(p)] = found.get(id(p), {}) | config
        return found
