"""What all adapters have in common: a configuration, and layers that wrap what they adapt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastweights.adapters.base import is_linear, refuse_codes
from fastweights.quantization.samples import Sample

__all__ = ["Adapter", "AdapterLayer", "adapter_configs", "adapter_layers", "adapter_names"]


@dataclass(frozen=True, kw_only=True)
class Adapter(ABC):
    """Which modules are adapted; a method's configuration adds how.

    A module's path is its name in the model, ``"model.layers.0.self_attn.q_proj"``. Rules are
    those of PEFT.

    Args:
        targets: a regular expression that matches whole paths; or "all-linear": every linear layer
            but the output embedding or classification head; or paths, or their last segments, such
            as ``["q_proj", "v_proj"]``; or None: what is customary for the model's architecture.
        exclude: a regular expression or names, as in `targets`; excluded modules win.
        layers: numbers of the layers to adapt, with names as `targets`. A module's layer is the
            first number in its path; one without a number is left out.
        layers_pattern: what stands before that number, such as ``"h"``; with `layers` only.
        modules_to_save: names of modules that are trained whole, each adapter its own copy.
    """

    targets: str | Sequence[str] | None = "all-linear"
    exclude: str | Sequence[str] | None = None
    layers: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        chosen = self.layers is not None or self.layers_pattern is not None
        if isinstance(self.targets, str) and chosen:
            raise ValueError(
                f"{type(self).__name__}: expected layers and layers_pattern with targets by name, "
                f"got targets={self.targets!r}"
            )
        if self.layers_pattern is not None and self.layers is None:
            raise ValueError(
                f"{type(self).__name__}: expected layers with layers_pattern, got none"
            )
        if isinstance(self.modules_to_save, str):
            raise ValueError(
                f"{type(self).__name__}: expected modules_to_save to be a sequence of names, "
                f"got {self.modules_to_save!r}"
            )

    def covers(self, module: nn.Module) -> bool:
        """Whether "all-linear" means a module."""
        return is_linear(module)

    def adds(self, module: nn.Module) -> bool:
        """Whether a module is adapted though `targets` does not name it."""
        return False

    def survey(
        self, model: nn.Module, paths: Sequence[str], samples: Sequence[Sample]
    ) -> Iterator[tuple[str, Any]]:
        """What has to be known of modules before they are adapted; each is, when it is its turn.

        Args:
            model: bare, with the modules before adapted already.
            paths: of the modules.
            samples: to run through the model; none unless the user gave some.

        Yields:
            Every path, and what `build` gets as `known`.
        """
        for path in paths:
            yield path, None

    @abstractmethod
    def build(self, module: nn.Module, path: str, name: str, known: Any) -> AdapterLayer:
        """Puts this adapter on a module.

        Args:
            module: what stands in the model: a bare module, or a layer that this method made of
                one for another adapter.
            path: its path, for patterns.
            name: of the adapter.
            known: from `survey`.

        Returns:
            The layer to put in the place of `module`, or `module` itself.

        Raises:
            TypeError: this method does not adapt such modules.
        """


class AdapterLayer(nn.Module):
    """A module with the adapters on it, by name.

    Args:
        base_layer: what is adapted.

    Attributes:
        configs: the adapters on this layer, in the order they were added.
        active: names of those that count, if they are here.
        enabled: False leaves all of them out.
        used: what a call adds up: `active` without those that are not here or are merged.
        rows: which of `used` a sample meets, ``[B]``, within `fastweights.adapters.per_sample`.
    """

    wrapped = "base_layer"  # where a method keeps the base, as PEFT calls it
    untrained: tuple[str, ...] = ()  # dictionaries of adapters' parameters that stay as they are

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        setattr(self, self.wrapped, base_layer)
        self.configs: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.used: tuple[str, ...] = ()
        self.rows: Tensor | None = None
        self.routed: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.put_aside: list[nn.Module] = []  # the base before a merge; no submodule, so not saved

    @property
    def weight(self) -> Any:
        """The base's, for models that look at it."""
        return getattr(self, self.wrapped).weight

    @property
    def bias(self) -> Any:
        """The base's."""
        return getattr(self, self.wrapped).bias

    def add(self, name: str, config: Any, path: str) -> None:
        """Adds an adapter; subclasses make its parameters."""
        self.configs[name] = config

    def remove(self, name: str) -> None:
        """Takes an adapter away."""
        del self.configs[name]
        for module in self.children():
            if isinstance(module, (nn.ParameterDict, nn.ModuleDict)) and name in module:
                del module[name]
        self.activate(tuple(n for n in self.active if n != name))

    def own_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """What an adapter trains in this layer."""
        for part, module in self.named_children():
            if part in self.untrained:
                continue
            if isinstance(module, nn.ParameterDict) and name in module:
                yield module[name]
            elif isinstance(module, nn.ModuleDict) and name in module:
                yield from module[name].parameters()

    def activate(self, names: tuple[str, ...]) -> None:
        """Chooses the adapters that count."""
        self.active = names
        self.refresh()

    def route(self, names: tuple[str, ...], rows: Tensor | None) -> None:
        """Lets sample i meet the adapter ``names[rows[i]]``, -1 none; with None, all meet all."""
        self.rows, self.routed = rows, names
        self.refresh()

    def refresh(self) -> None:
        """Brings what is derived from the adapters up to date."""
        if self.merged or not self.enabled:
            self.used = ()
        elif self.rows is not None:
            self.used = self.routed
        else:
            self.used = tuple(name for name in self.active if name in self.configs)

    def check_rows(self, names: Sequence[str]) -> None:
        """Raises where an adapter cannot be chosen by sample."""

    def check_merge(self, names: tuple[str, ...], quantized: bool) -> None:
        """Raises where adapters cannot be merged: a broken one must not reach the base.

        `quantized` allows to round codes again.
        """
        here = [name for name in names if name in self.configs]
        if here:
            refuse_codes(getattr(self, self.wrapped), quantized)
        for name in here:
            if not all(p.isfinite().all() for p in self.own_parameters(name)):
                raise ValueError(f"merge: expected finite adapters, got NaN or inf in {name!r}")

    def merged_layer(
        self, names: tuple[str, ...], dtype: torch.dtype | None, rounding: str
    ) -> nn.Module:
        """A plain module that computes what the base and some adapters compute together."""
        raise NotImplementedError(f"merge: {type(self).__name__} cannot be merged")

    def merge(self, names: tuple[str, ...], dtype: torch.dtype | None, rounding: str) -> None:
        """Computes with a merged layer from now on and puts the base aside."""
        merged = self.merged_layer(names, dtype, rounding)
        self.put_aside = [getattr(self, self.wrapped)]
        setattr(self, self.wrapped, merged)
        self.merged = names
        self.refresh()

    def unmerge(self) -> None:
        """Takes the base that was put aside, as it was."""
        if self.put_aside:
            setattr(self, self.wrapped, self.put_aside.pop())
        self.merged = ()
        self.refresh()

    def original(self) -> nn.Module:
        """The base as it was before any adapter."""
        base: nn.Module = getattr(self, self.wrapped)
        return base

    def bare(self) -> nn.Module:
        """What computes a call that meets no adapter."""
        if self.put_aside and not self.enabled:
            return self.put_aside[0]
        base: nn.Module = getattr(self, self.wrapped)
        return base

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AdapterLayer:
        for module in self.put_aside:
            module._apply(fn)
        super()._apply(fn, recurse)
        self.refresh()
        return self


def adapter_layers(model: nn.Module) -> Iterator[AdapterLayer]:
    """The layers of a model that have adapters, in module order."""
    return (module for module in model.modules() if isinstance(module, AdapterLayer))


def adapter_configs(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by name, in the order of their layers."""
    return {name: c for layer in adapter_layers(model) for name, c in layer.configs.items()}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters."""
    return list(adapter_configs(model))
