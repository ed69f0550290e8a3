"""Routes the kernels of transformers' recurrent models through our ops, and back."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from fastweights.integrations import _routing
from fastweights.integrations.transformers import kernels

_NORM = "RMSNormGated"


def patch() -> None:
    """Lets Hugging Face models with a delta rule or a short convolution use our ops on a CPU.

    Nothing is asked of the models: Qwen3-Next, Qwen3.5, Kimi-Linear, OLMo-hybrid, LFM2, Mamba and
    every other model of the installed transformers whose functions are decorated for
    ``chunk_gated_delta_rule``, ``fused_recurrent_gated_delta_rule``, ``chunk_kda``,
    ``fused_recurrent_kda``, ``causal_conv1d_fn`` and ``causal_conv1d_update``, or whose
    ``RMSNormGated`` norms before it gates. Models that exist already are served, and so is model
    code that is imported later. Code that a model brings along itself (``trust_remote_code``) is
    found when it is loaded before the call: call again, which is harmless.

    Tensors of another device than the CPU, and `torch.export`, get the original. So do references
    to a function that were taken before.

    Packed sequences work, where transformers alone raises or lets one see the other: give
    ``cu_seq_lens_q`` [N + 1] (one row), or ``seq_idx`` [B, T], to the model.

    A decoding step that records no gradient updates the recurrent state in its cache in place.

    Example:
        >>> from fastweights.integrations.transformers import patch, stats, unpatch
        >>> patch()
        >>> stats()["chunk_gated_delta_rule"]
        0
        >>> unpatch()
    """
    if _FINDER not in sys.meta_path:
        _calls.clear()
        sys.meta_path.insert(0, _FINDER)
    for name, module in list(sys.modules.items()):
        if _is_modeling(name) and isinstance(module, ModuleType):
            _patch_module(module)


def unpatch() -> None:
    """Puts the original objects back; does nothing without `patch`."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    _exchanged.restore()


def patched() -> AbstractContextManager[None]:
    """`patch` for the length of a ``with``; what was patched before stays so.

    Example:
        >>> from fastweights.integrations.transformers import patched
        >>> with patched():
        ...     pass  # models called here use our ops
    """
    return _routing.for_a_while(patch, unpatch, lambda: _FINDER in sys.meta_path)


def stats() -> dict[str, int]:
    """How many calls our ops have served since `patch`, by the name of transformers' kernel.

    Calls from within `torch.compile` are not counted.
    """
    return {name: _calls[name] for name in (*kernels.FUNCTIONS, _NORM)}


_calls: Counter[str] = Counter()
_exchanged = _routing.Attributes()


class _Finder(MetaPathFinder):
    """Patches model code when it is imported: transformers does so on first use."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not _is_modeling(fullname):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            _patch_module(module)

        loader.exec_module = exec_module  # of this one loader, for this one import
        return spec


_FINDER = _Finder()


def _is_modeling(name: str) -> bool:
    package, _, last = name.rpartition(".")
    return last.startswith("modeling_") and package.startswith(
        ("transformers.models.", "transformers_modules.")
    )


def _patch_module(module: ModuleType) -> None:
    for name, value in list(vars(module).items()):
        ours = kernels.FUNCTIONS.get(kernel := _kernel_name(value))
        if ours is not None:
            _exchange(module, name, kernel, ours)
        elif name.endswith(_NORM) and _norms_before_gate(value):
            _exchange(value, "forward", _NORM, kernels.gated_norm)


def _exchange(owner: Any, name: str, kernel: str, ours: Callable[..., Any]) -> None:
    routed = _routing.route(vars(owner)[name], ours, _calls, kernel, _serves)
    _exchanged.exchange(owner, name, routed)


def _serves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return _routing.on_cpu(args, kwargs) and not torch.compiler.is_exporting()


def _kernel_name(value: Any) -> str:
    """The kernel that transformers would fetch for a function; empty for anything else."""
    if isinstance(value, nn.Module):  # what the decorator makes of it if `kernels` is installed
        return getattr(type(value), "kernel_layer_name", "")
    if not isinstance(value, FunctionType) or value.__closure__ is None:
        return ""
    cells = dict(zip(value.__code__.co_freevars, value.__closure__, strict=True))
    if not {"func_name", "torch_function", "implementation"} <= cells.keys():
        return ""
    name: str = cells["func_name"].cell_contents
    return name


def _norms_before_gate(value: Any) -> bool:
    """Whether a class computes what our norm does, which its name does not tell."""
    if (value, "forward") in _exchanged:
        return False
    with torch.device("cpu"), torch.no_grad():
        x = torch.linspace(-2, 3, 8)[None]
        gate = x.flip(1)
        try:
            norm = value(8)
            return torch.allclose(norm(x, gate), kernels.gated_norm(norm, x, gate))
        except Exception:  # of whatever kind: what has other arguments is another norm
            return False
