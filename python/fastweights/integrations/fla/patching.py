"""Routes fla's Triton functions through our ops, and back."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from inspect import unwrap
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastweights.integrations import _routing
from fastweights.integrations.fla import ops
from fastweights.integrations.fla.modules import (
    activations,
    convolution,
    cross_entropy,
    norm,
    rotary,
)

_BACKEND = "fastweights"


def patch() -> None:
    """Lets fla's layers and models run and train on a CPU, on our ops.

    Nothing is asked of the models. Functions that fla dispatches get a backend in its registries;
    every other one is exchanged wherever a loaded module holds it, so that layers that exist
    already are served, and a script's own ``from fla.ops.gla import chunk_gla``. Modules that are
    imported later get ours from fla. Calling it again is harmless, and serves what was imported in
    between from elsewhere.

    Tensors of another device than the CPU get the original. ``FLA_DISABLE_BACKEND_DISPATCH=1`` is
    respected: then everything is exchanged.

    ``generate`` of transformers 5.24 and newer hands a model its cache under a name that fla 0.6
    does not read, by which every token after the prompt starts from an empty state, without an
    error. For prompts on the CPU it gets the name that it reads.

    Raises:
        ImportError: fla is not installed or older than 0.6, or Triton is not installed, without
            which fla is empty.

    Example:
        >>> from fastweights.integrations.fla import patch, stats, unpatch
        >>> patch()
        >>> stats()["chunk_gated_delta_rule"]
        0
        >>> unpatch()
    """
    backends = _import_fla()
    if not _patched():
        _calls.clear()
        for target in _FUNCTIONS:
            _patch_function(target, backends)
        for repair in _REPAIRS:
            _repair(*repair)
    _exchange(_exchanged)


def unpatch() -> None:
    """Puts the original objects back; does nothing without `patch`."""
    _exchange({id(ours): (ours, original) for original, ours in _exchanged.values()})
    _exchanged.clear()
    while _registries:
        _registries.pop()._backends.pop(_BACKEND, None)
    _repaired.restore()


def patched() -> AbstractContextManager[None]:
    """`patch` for the length of a ``with``; what was patched before stays so."""
    return _routing.for_a_while(patch, unpatch, _patched)


def stats() -> dict[str, int]:
    """How many calls our ops have served since `patch`, by the name of fla's function.

    Calls from within `torch.compile` are not counted.
    """
    return {target.name: _calls[target.name] for target in _FUNCTIONS}


class _Function(NamedTuple):
    module: str
    name: str
    ours: Callable[..., Any]
    operation: str | None = None  # whose registry dispatches it, if not one of its own


def _named(module: str, *ours: Callable[..., Any]) -> list[_Function]:
    return [_Function(module, function.__name__, function) for function in ours]


_FUNCTIONS = [
    *_named("fla.ops.linear_attn.chunk", ops.chunk_linear_attn),
    *_named("fla.ops.linear_attn.fused_chunk", ops.fused_chunk_linear_attn),
    *_named("fla.ops.linear_attn.fused_recurrent", ops.fused_recurrent_linear_attn),
    *_named("fla.ops.retention.chunk", ops.chunk_retention),
    *_named("fla.ops.retention.fused_chunk", ops.fused_chunk_retention),
    *_named("fla.ops.retention.fused_recurrent", ops.fused_recurrent_retention),
    *_named("fla.ops.retention.parallel", ops.parallel_retention),
    *_named("fla.ops.simple_gla.chunk", ops.chunk_simple_gla),
    *_named("fla.ops.simple_gla.fused_chunk", ops.fused_chunk_simple_gla),
    *_named("fla.ops.simple_gla.fused_recurrent", ops.fused_recurrent_simple_gla),
    *_named("fla.ops.simple_gla.parallel", ops.parallel_simple_gla),
    *_named("fla.ops.lightning_attn.chunk", ops.chunk_lightning_attn),
    *_named("fla.ops.lightning_attn.fused_recurrent", ops.fused_recurrent_lightning_attn),
    *_named("fla.ops.gla.chunk", ops.chunk_gla),
    *_named("fla.ops.gla.fused_recurrent", ops.fused_recurrent_gla),
    *_named("fla.ops.delta_rule.chunk", ops.chunk_delta_rule),
    *_named("fla.ops.delta_rule.fused_recurrent", ops.fused_recurrent_delta_rule),
    _Function(
        "fla.ops.gated_delta_rule.chunk",
        "chunk_gated_delta_rule",
        ops.chunk_gated_delta_rule,
        "gated_delta_rule",
    ),
    *_named("fla.ops.gated_delta_rule.fused_recurrent", ops.fused_recurrent_gated_delta_rule),
    *_named("fla.ops.kda.chunk", ops.chunk_kda),
    *_named("fla.ops.kda.fused_recurrent", ops.fused_recurrent_kda),
    _Function("fla.ops.kda.gate", "fused_kda_gate", ops.fused_kda_gate, "kda"),
    *_named("fla.ops.gated_delta_product.chunk", ops.chunk_gated_delta_product),
    *_named("fla.ops.gdn2.chunk", ops.chunk_gdn2),
    *_named("fla.ops.gdn2.fused_recurrent", ops.fused_recurrent_gdn2),
    *_named("fla.ops.hgrn.chunk", ops.chunk_hgrn),
    *_named("fla.ops.hgrn.fused_recurrent", ops.fused_recurrent_hgrn),
    *_named(
        "fla.modules.causal_conv1d.ops",
        convolution.causal_conv1d,
        convolution.causal_conv1d_update,
        convolution.causal_conv1d_update_states,
    ),
    *_named(
        "fla.modules.norm.layernorm",
        norm.rms_norm,
        norm.layer_norm,
        norm.layer_norm_linear,
        norm.group_norm,
    ),
    *_named(
        "fla.modules.norm.fused_norm_gate",
        norm.rms_norm_gated,
        norm.layer_norm_gated,
    ),
    *_named("fla.modules.norm.l2norm", norm.l2norm),
    *_named("fla.modules.activations.ops", *(getattr(activations, x) for x in activations.__all__)),
    *_named("fla.modules.rotary.ops", rotary.rotary_embedding_fwdbwd),
    *_named(
        "fla.modules.fused_cross_entropy.ops",
        cross_entropy.cross_entropy_fwd,
        cross_entropy.cross_entropy_bwd,
    ),
    *_named(
        "fla.modules.fused_linear_cross_entropy.ops", cross_entropy.fused_linear_cross_entropy_bwd
    ),
]

_calls: Counter[str] = Counter()
_exchanged: dict[int, tuple[Any, Any]] = {}  # id of an original: it, and what stands in its place
_registries: list[Any] = []  # fla's registries that have a backend of ours
_repaired = _routing.Attributes()


def _patched() -> bool:
    return bool(_exchanged or _registries)


def _import_fla() -> Any:
    """The module of fla's registries; layers and models are loaded as far as installed."""
    try:
        return import_module("fla.backends")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"fla 0.6 cannot be imported ({error}); run: pip install flash-linear-attention triton"
        ) from error


def _patch_function(target: _Function, backends: Any) -> None:
    """By fla's registry of the function, or of its operation, or as an object to be exchanged."""
    owner, name = _find(target.module, target.name)
    if not name:
        return
    original = vars(owner)[name]
    ours = _routing.count(target.ours, _calls, target.name)
    if not backends._DISPATCH_DISABLED:
        if target.operation is not None:
            # One backend serves all functions of an operation, each as a method of its name.
            registry = backends._operation_registries[target.operation]
            backend = registry._backends.get(_BACKEND) or _backend(backends)()
            setattr(backend, target.name, ours)
            registry.register(backend)
            _registries.append(registry)
            return
        registry = backends._function_registries.get(unwrap(original))
        if registry is not None:
            backends.register(original, backend=_backend(backends))(ours)
            _registries.append(registry)
            return
    routed = _routing.route(original, target.ours, _calls, target.name)
    _exchanged[id(original)] = original, routed


def _backend(backends: Any) -> Any:
    """The class of our backends: CPU tensors only, and before every other."""

    def verify(self: Any, function_name: str, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        return _routing.on_cpu(args, kwargs), "not on the CPU"

    attributes = {"backend_type": _BACKEND, "priority": -1, "verify": verify}
    return type("FastweightsBackend", (backends.BaseBackend,), attributes)


def _exchange(pairs: dict[int, tuple[Any, Any]]) -> None:
    """Sets the second of a pair wherever a module has the first as an attribute."""
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", None)
        for name, value in list(namespace.items()) if isinstance(namespace, dict) else ():
            if id(value) in pairs:
                setattr(module, name, pairs[id(value)][1])


def _repair(module: str, path: str, make: Callable[..., Any]) -> None:
    owner, name = _find(module, path)
    if name:
        _repaired.exchange(owner, name, make(vars(owner)[name]))


def _find(module: str, path: str) -> tuple[Any, str]:
    """What has the object, and its name there, which is empty if this fla does not have it."""
    try:
        owner: Any = import_module(module)
    except ImportError:
        return None, ""
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part, None)
    return owner, name if name in getattr(owner, "__dict__", ()) else ""


def _accept_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    return _routing.route(
        original, cross_entropy.fused_cross_entropy_loss, _calls, "FusedCrossEntropyLoss"
    )


def _name_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = original(self, *args, **kwargs)
        if "cache" in inputs and _routing.on_cpu((), inputs):
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    return prepare_inputs_for_generation


def _sort_stably(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `MomAttention`, which sorts tokens by memory and needs equal ones to keep their order."""

    class StableSort(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            options = {"stable": True} if function is Tensor.argsort else {}
            return function(*args, **(kwargs or {}), **options)

    @functools.wraps(original)
    def transform(*args: Any, **kwargs: Any) -> Any:
        with StableSort() if _routing.on_cpu(args, kwargs) else nullcontext():
            return original(*args, **kwargs)

    return transform


# What is not ours but mended: where it is, and what makes the new of the old.
_REPAIRS = (
    ("fla.modules.fused_cross_entropy.ops", "FusedCrossEntropyLoss.forward", _accept_cpu),
    (
        "fla.models.generation_utils",
        "FLAGenerationMixin.prepare_inputs_for_generation",
        _name_cache,
    ),
    ("fla.layers.mom", "transform", _sort_stably),
)
