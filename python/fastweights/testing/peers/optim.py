"""Optimizer steps as torch, bitsandbytes and torchao take them on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastweights.testing.opspec import Peer, Sample, sample

__all__ = ["BITSANDBYTES", "TORCH", "TORCHAO"]

_Make = Callable[[str, list[Tensor], float], Any]


def _take_step(optimizer: Any) -> None:
    # The tensor subclasses of torchao cannot be under inference mode.
    with torch.inference_mode(False):
        optimizer.step()


def _adapt(call: Sample, make: _Make, bits: tuple[int, ...]) -> Sample | None:
    """The optimizer that `make` has for a rule, over parameters of its own."""
    params, grads, _, _, absmax1, _ = call.args
    if (8 if absmax1 else 32) not in bits:
        return None
    parameters: list[Tensor] = []
    for p, g in zip(params, grads, strict=True):
        parameters.append(torch.nn.Parameter(p.clone()))
        parameters[-1].grad = g.clone()
    optimizer = make(call.kwargs["rule"], parameters, call.kwargs["lr"])
    return None if optimizer is None else sample(optimizer)


def _torch(rule: str, parameters: list[Tensor], lr: float) -> Any:
    if rule == "adam":
        return torch.optim.AdamW(parameters, lr, fused=True)
    if rule == "momentum":
        return torch.optim.SGD(parameters, lr, momentum=0.9, fused=True)
    return None


def _load_bitsandbytes() -> Callable[..., Any]:
    import bitsandbytes  # noqa: F401

    return _take_step


def _bitsandbytes(rule: str, parameters: list[Tensor], lr: float) -> Any:
    from bitsandbytes.optim import AdamW8bit, Lion8bit, SGD8bit

    if rule == "momentum":
        return SGD8bit(parameters, lr, momentum=0.9)
    return (AdamW8bit if rule == "adam" else Lion8bit)(parameters, lr)


def _load_torchao() -> Callable[..., Any]:
    import torchao.optim  # noqa: F401

    return _take_step


def _torchao(rule: str, parameters: list[Tensor], lr: float) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr) if rule == "adam" else None


# It has no states of 8 bits: its step of 32 stands beside ours of either.
TORCH = Peer(
    "torch fused, 32-bit",
    load=lambda: _take_step,
    adapt=lambda call: _adapt(call, _torch, (8, 32)),
    backward=False,
)
BITSANDBYTES = Peer(
    "bitsandbytes",
    load=_load_bitsandbytes,
    adapt=lambda call: _adapt(call, _bitsandbytes, (8,)),
    backward=False,
)
TORCHAO = Peer(
    "torchao",
    load=_load_torchao,
    adapt=lambda call: _adapt(call, _torchao, (8,)),
    backward=False,
)
