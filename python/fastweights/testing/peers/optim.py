"""Optimizer steps as torch, bitsandbytes and torchao take them on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastweights.testing.opspec import Peer, Sample, sample

__all__ = ["BITSANDBYTES", "TORCH", "TORCHAO"]


def _parameters(call: Sample) -> list[Tensor]:
    """Parameters of their own, with their gradients."""
    parameters: list[Tensor] = []
    for p, g in zip(*call.args[:2], strict=True):
        parameter = torch.nn.Parameter(p.clone())
        parameter.grad = g.clone()
        parameters.append(parameter)
    return parameters


def _take_step(optimizer: Any) -> None:
    optimizer.step()


def _adapt(
    call: Sample, make: Callable[[str, list[Tensor], float], Any], bits: int
) -> Sample | None:
    """The step of the optimizer that `make` makes of a rule's name, where there is one."""
    if bits != (8 if call.args[4] else 32):
        return None
    try:
        optimizer = make(call.kwargs["rule"], _parameters(call), call.kwargs["lr"])
    except ImportError:
        return None
    return None if optimizer is None else sample(optimizer)


def _torch(rule: str, parameters: list[Tensor], lr: float) -> Any:
    if rule == "adam":
        return torch.optim.AdamW(parameters, lr, fused=True)
    if rule == "momentum":
        return torch.optim.SGD(parameters, lr, momentum=0.9, fused=True)
    return None


def _bitsandbytes(rule: str, parameters: list[Tensor], lr: float) -> Any:
    import bitsandbytes

    if rule == "momentum":
        return bitsandbytes.optim.SGD8bit(parameters, lr, momentum=0.9)
    make = {"adam": bitsandbytes.optim.AdamW8bit, "lion": bitsandbytes.optim.Lion8bit}[rule]
    return make(parameters, lr)


def _torchao(rule: str, parameters: list[Tensor], lr: float) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr) if rule == "adam" else None


def _fused_for_both(call: Sample) -> Sample | None:
    """Fused by torch, which has no states of 8 bits: that of 32 stands beside ours of either."""
    return _adapt(call, _torch, 8 if call.args[4] else 32)


TORCH = Peer("torch fused, 32-bit", load=lambda: _take_step, adapt=_fused_for_both, backward=False)
BITSANDBYTES = Peer(
    "bitsandbytes",
    load=lambda: _take_step,
    adapt=lambda call: _adapt(call, _bitsandbytes, 8),
    backward=False,
)
TORCHAO = Peer(
    "torchao", load=lambda: _take_step, adapt=lambda call: _adapt(call, _torchao, 8), backward=False
)
