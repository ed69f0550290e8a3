"""What every public op decides before it calls its kernel."""

import os
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_BACKENDS = ("native", "reference")
_BACKEND = os.environ.get("FASTWEIGHTS_BACKEND", "native")
if _BACKEND not in _BACKENDS:
    raise ImportError(f"FASTWEIGHTS_BACKEND: expected one of {_BACKENDS}, got {_BACKEND!r}")

_warned_devices: set[str] = set()


def reference_forced() -> bool:
    """Whether ``FASTWEIGHTS_BACKEND=reference`` was set when the package was imported."""
    return _BACKEND == "reference"


def needs_reference(*tensors: Tensor | None) -> bool:
    """Whether the plain-torch reference must run: forced, or a device without a kernel.

    The second warns, once per device type.
    """
    if reference_forced():
        return True
    for tensor in tensors:
        if tensor is None or tensor.is_cpu or tensor.is_meta:  # faster than asking for the type
            continue
        device = tensor.device.type
        if device not in _warned_devices:
            _warned_devices.add(device)
            warnings.warn(
                f"fastweights has no kernels for device {device!r}: its plain-torch reference runs",
                stacklevel=3,
            )
        return True
    return False


def refuse_forward_ad(op: str, *tensors: Tensor | None) -> None:
    """Raise if an input carries a forward-mode tangent: a custom op would return a silent zero.

    Raises:
        NotImplementedError: the message names the reference, which supports it.
    """
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{op}: forward-mode differentiation is not supported; "
                f"use fastweights.reference.{op}"
            )


def refuse_double_backward(op: str) -> None:
    """Make the backward op ``op``_backward raise when it is itself differentiated."""

    def backward(ctx: object, *grads: Tensor | None) -> None:
        raise NotImplementedError(
            f"{op}: double backward is not supported; use fastweights.reference.{op}"
        )

    torch.library.register_autograd(f"fastweights::{op}_backward", backward)


def refuse_gradients(op: str) -> None:
    """Make the in-place op ``op`` raise when an input would need a gradient through it."""
    overload = getattr(torch.ops.fastweights, op).default
    differentiable = op.removesuffix("_step").removesuffix("_update")
    known = hasattr(torch.ops.fastweights, differentiable)
    instead = f" or use fastweights.{differentiable}" if known else ""

    def needs_gradient(value: object) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(needs_gradient, value))
        return isinstance(value, Tensor) and value.requires_grad

    def guard(*args: object, **kwargs: object) -> object:
        if torch.is_grad_enabled() and any(map(needs_gradient, (*args, *kwargs.values()))):
            raise NotImplementedError(
                f"{op}: works in place and has no gradient; call it under torch.no_grad(){instead}"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args, **kwargs)

    torch.library.impl(f"fastweights::{op}", "Autograd", guard)


def default_scale(q: Tensor, scale: float | None) -> float:
    """The factor of q: ``scale``, or K ** -0.5 if that is None."""
    if scale is not None:
        return scale
    key_size = q.shape[-1] if q.dim() else 0
    return float(key_size) ** -0.5 if key_size else 1.0


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What recurrent states are kept in for inputs of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_qkv(op: str) -> None:
    """Under CPU autocast q, k and v go to its dtype; gates and states keep theirs."""
    overload = getattr(torch.ops.fastweights, op).default
    autocast_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def cast(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("cpu")

        def to(x: Tensor) -> Tensor:
            return x.to(dtype) if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x

        with torch._C._ExcludeDispatchKeyGuard(autocast_keys):
            return overload(to(q), to(k), to(v), *args, **kwargs)

    torch.library.impl(f"fastweights::{op}", "AutocastCPU", cast)
