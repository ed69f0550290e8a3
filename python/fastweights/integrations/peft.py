"""PEFT: `patch` lets the LoRA layers of an unchanged `PeftModel` compute with our op on a CPU."""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastweights.adapters.base import bias_of, is_linear, matrix_of
from fastweights.integrations import _routing
from fastweights.ops._common import reference_forced
from fastweights.ops.lora.functional import add_updates, lora_linear

__all__ = ["patch", "patched", "stats", "unpatch"]

_NAME = "lora_linear"
_CLASSES = ("Linear", "Linear4bit", "Linear8bitLt")  # the last two only beside bitsandbytes
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TENSORS = (Tensor, nn.Parameter)
_REFERENCE = reference_forced()
_GLOBAL_HOOKS = nn.modules.module._global_forward_hooks
_is_compiling = torch.compiler.is_compiling

_calls: Counter[str] = Counter()
_exchanged = _routing.Attributes()


def patch() -> None:
    """Lets PEFT's LoRA over linear layers use `fastweights.lora_linear` on a CPU.

    Nothing is asked of the model: one that exists already is served, and so is one made later. One
    call computes the base and all active adapters, or those of a mixed batch (``adapter_names``);
    x is not copied to the adapter's dtype, and what PEFT rounds between its products is not
    rounded. Dropout leaves out other elements than PEFT would with the same seed, each with the
    same probability.

    Over `nn.Linear` and `Conv1D` of transformers, in float32, bfloat16, float16 or float64, under
    autocast, in training and in `torch.compile`; over layers of bitsandbytes where no gradient is
    recorded. PEFT's own forward serves everything else: other devices and quantized layers, DoRA
    and the other variants, ``lora_bias``, embeddings and convolutions, bases with hooks or with a
    weight that is trained, several active adapters with dropout, `torch.export`, forward-mode
    differentiation and `torch.func`.

    Double backward raises where our op served.

    Raises:
        ImportError: peft is not installed.

    Example:
        >>> from fastweights.integrations.peft import patch, stats, unpatch
        >>> patch()
        >>> stats()
        {'lora_linear': 0}
        >>> unpatch()
    """
    try:
        lora = importlib.import_module("peft.tuners.lora")
    except ModuleNotFoundError as error:
        raise ImportError(f"peft cannot be imported ({error}); run: pip install peft") from error
    if _exchanged:
        return
    _calls.clear()
    for name in _CLASSES:
        if (layer := getattr(lora, name, None)) is not None:
            _exchanged.exchange(layer, "forward", _routed(layer.forward))


def unpatch() -> None:
    """Puts PEFT's forward back; does nothing without `patch`."""
    _exchanged.restore()


def patched() -> AbstractContextManager[None]:
    """`patch` for the length of a ``with``; what was patched before stays so.

    Example:
        >>> from fastweights.integrations.peft import patched
        >>> with patched():
        ...     pass  # models called here use our op
    """
    return _routing.for_a_while(patch, unpatch, lambda: bool(_exchanged))


def stats() -> dict[str, int]:
    """How many calls our op has served since `patch`.

    Calls from within `torch.compile` are not counted.
    """
    return {_NAME: _calls[_NAME]}


def _routed(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """PEFT's forward, whose calls go to our op where that serves them."""

    # A decoding step calls it for every layer, after the base has swept the caches: few lines, few
    # objects.
    @functools.wraps(original)
    def forward(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        modules, compiling, call = layer._modules, _is_compiling(), None
        if not (layer._disable_adapters or layer.merged_adapters or args):
            call = _call(layer, modules, compiling, x, **kwargs)
        if call is None:
            return original(layer, x, *args, **kwargs)
        base = modules["base_layer"]
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or compiling or _REFERENCE:
            if not _is_product(base, x):
                return original(layer, x, *args, **kwargs)
            lora_a, lora_b, scale, _, indices, dropout, seed, _ = call
            y = lora_linear(
                x, matrix_of(base), bias_of(base), lora_a, lora_b, scale,
                indices=indices, dropout=dropout, seed=seed,
            )  # fmt: skip
        else:
            y = base(x)
            add_updates(y, x, call)
        if not compiling:
            _calls[_NAME] += 1
        return y

    return forward


def _call(
    layer: Any,
    modules: Mapping[str, Any],
    compiling: bool,
    x: Any,
    adapter_names: Sequence[str] | None = None,
    **others: Any,
) -> tuple[Any, ...] | None:
    """What our op takes beside x and the base, or None where PEFT's own forward has to run."""
    if (
        type(x) not in _TENSORS
        or not x.is_cpu
        or x.dtype not in _FLOATS
        or not _is_known(modules["base_layer"])
        or _GLOBAL_HOOKS
        or _is_transformed(compiling)
        or (others and any(value is not None for value in others.values()))
    ):
        return None
    names, indices = layer.active_adapters, None
    down, up = modules["lora_A"]._modules, modules["lora_B"]._modules
    if adapter_names is not None:
        layer._check_forward_args(x, adapter_names=adapter_names)
        names, indices = _by_sample(adapter_names, down)
    lora_a, lora_b, scales, chances = [], [], [], []
    for name in names:
        if name not in down:
            continue
        if name in layer.lora_variant:
            return None
        a, b, drop = down[name], up[name], modules["lora_dropout"]._modules[name]
        weight_a, weight_b = _matrix(a), _matrix(b)
        if weight_a is None or weight_b is None:
            return None
        lora_a.append(weight_a)
        lora_b.append(weight_b)
        scales.append(layer.scaling[name])
        if type(drop) is nn.Dropout:
            chances.append(float(drop.p) if drop.training else 0.0)
        elif type(drop) is not nn.Identity:
            return None
    if not lora_a:
        return None
    dropout, seed = 0.0, None
    if any(chances):
        dropout = chances[0]
        # Each of several that act on one row draws its own mask in PEFT, and all share the op's.
        shared = len(lora_a) > 1 and indices is None
        if shared or dropout >= 1 or chances != [dropout] * len(lora_a):
            return None
        seed = torch.randint(2**62, (1,))
    return lora_a, lora_b, _scale(scales, compiling), None, indices, dropout, seed, []


def _by_sample(adapter_names: Sequence[str], known: Container[str]) -> tuple[list[str], Tensor]:
    """The adapters of a mixed batch, and which of them every sample meets, -1 for none."""
    names = [name for name in dict.fromkeys(adapter_names) if name in known]
    row = {name: i for i, name in enumerate(names)}
    return names, torch.tensor([row.get(name, -1) for name in adapter_names])


def _matrix(module: nn.Module) -> Tensor | None:
    """The weight of a module that multiplies by it and does nothing else."""
    parameters = module._parameters
    weight = parameters.get("weight")
    if (
        type(module) is nn.Linear
        and type(weight) is nn.Parameter
        and parameters["bias"] is None
        and weight.is_cpu
        and not (module._forward_hooks or module._forward_pre_hooks)
    ):
        return weight
    return None


def _is_known(base: nn.Module) -> bool:
    """Whether what the base gives is a new tensor, to which the updates may be added in place."""
    if base._forward_hooks or "forward" in base.__dict__:
        return False
    if type(base._parameters.get("weight")) is nn.Parameter:
        return type(base) is nn.Linear or is_linear(base)
    return type(base).__module__.startswith("bitsandbytes.")


def _is_product(base: nn.Module, x: Tensor) -> bool:
    """Whether `lora_linear` computes what the base does, which has no gradient of its weight."""
    weight = base._parameters["weight"]
    assert weight is not None
    if (
        type(weight) is not nn.Parameter
        or not weight.is_cpu
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or (weight.requires_grad and torch.is_grad_enabled())
    ):
        return False
    if torch.is_autocast_enabled("cpu"):
        own = (torch.float32, torch.get_autocast_dtype("cpu"))
        return x.dtype in own and weight.dtype in own
    return x.dtype == weight.dtype


def _is_transformed(compiling: bool) -> bool:
    """Whether somebody wants of the arithmetic what our op has no rule for."""
    if compiling:
        return torch.compiler.is_exporting()
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _scale(values: list[Any], compiling: bool) -> Tensor:
    """As the op takes it; PEFT has numbers, and tensors for hot-swapping in compiled models."""
    if not compiling and len(values) == 1 and type(values[0]) is float:
        return _constant(values[0])
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(value).reshape(()).double() for value in values])
    return torch.tensor(values, dtype=torch.float64)


@functools.lru_cache(maxsize=256)
def _constant(value: float) -> Tensor:
    with torch.inference_mode(False):  # it may be saved for a backward later
        return torch.tensor([value], dtype=torch.float64)
