"""Block-wise optimizer steps and the dynamic 8-bit maps as their definitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastweights.ops._random import mixed, random_bits

Rule = Literal["adam", "lion", "momentum"]

# Elements that share a key of the random numbers.
_KEYED = 4096


def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 levels of a dynamic 8-bit map in increasing order, float32.

    Seven decades with 1, 2, 4, … 64 equally spaced levels each (twice as many without signs), 0 and
    1 (Dettmers et al. 2021, arXiv:2110.02861, section 2.1; the numbers are those of bitsandbytes).

    Example:
        >>> dynamic_map()[126:130]
        tensor([-5.5000e-07,  0.0000e+00,  5.5000e-07,  3.2500e-06])
    """
    levels = [
        10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / n)
        for i in range(7)
        for n in [2**i if signed else 2 ** (i + 1)]
        for j in range(n)
    ]
    below = [-level for level in reversed(levels)] if signed else []
    return torch.tensor([*below, 0.0, *levels, 1.0])


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """`[blocks, block_size]`, padded with zeros."""
    flat = x.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)


def quantize_blockwise(
    x: Tensor, *, signed: bool = True, block_size: int = 256
) -> tuple[Tensor, Tensor]:
    """The definition of `fastweights.functional.quantize_blockwise`."""
    blocks = _blocks(x.float(), block_size)
    absmax = blocks.abs().amax(1)
    levels = dynamic_map(signed).to(x.device)
    middles = (levels[1:].double() + levels[:-1].double()) / 2
    scaled = (blocks.double() / absmax[:, None]).nan_to_num(0)
    codes = torch.bucketize(scaled, middles).to(torch.uint8)
    return codes.flatten()[: x.numel()].view(x.shape), absmax


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, *, signed: bool = True, block_size: int = 256
) -> Tensor:
    """The definition of `fastweights.functional.dequantize_blockwise`."""
    levels = dynamic_map(signed).to(codes.device)[codes.flatten().long()]
    scale = absmax.repeat_interleave(block_size)[: codes.numel()]
    return (levels * scale).view(codes.shape)


def _adam(
    p: Tensor, g: Tensor, states: list[Tensor], step: int, lr: float, beta1: float, beta2: float,
    eps: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    m, v = states
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    states[:] = m, v
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return (1 - lr * weight_decay) * p - lr * m_hat / (v_hat.sqrt() + eps)


def _lion(
    p: Tensor, g: Tensor, states: list[Tensor], step: int, lr: float, beta1: float, beta2: float,
    eps: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    (m,) = states
    states[:] = [beta2 * m + (1 - beta2) * g]
    return (1 - lr * weight_decay) * p - lr * (beta1 * m + (1 - beta1) * g).sign()


def _momentum(
    p: Tensor, g: Tensor, states: list[Tensor], step: int, lr: float, beta1: float, beta2: float,
    eps: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    (m,) = states
    m = beta1 * m + g + weight_decay * p
    states[:] = [m]
    return p - lr * m


_RULES = {
    "adam": (_adam, (True, False)),
    "lion": (_lion, (True,)),
    "momentum": (_momentum, (True,)),
}


def _keep_sign(codes: Tensor, numbers: Tensor) -> Tensor:
    """Codes of a signed state of which only 0 itself is coded as 0."""
    nudged = codes.int() + torch.where(codes == 127, numbers.sign().int(), 0)
    return nudged.to(torch.uint8)


def _random_bits(numel: int, seed: int, first_task: int) -> Tensor:
    """16 random bits per element from its counter, as int64."""
    tasks = range(first_task, first_task + -(-numel // _KEYED))
    return random_bits([mixed(seed + t) for t in tasks], _KEYED).flatten()[:numel] >> 16


def _round_at_random(x: Tensor, seed: int, first_task: int) -> Tensor:
    bits = x.flatten().view(torch.int32).long() & 0xFFFFFFFF
    carried = bits + _random_bits(x.numel(), seed, first_task).to(x.device)
    up = ((carried & 0xFFFF0000) << 32 >> 32).int().view(torch.float32)
    return torch.where(x.flatten().isfinite(), up, x.flatten()).view(x.shape).to(torch.bfloat16)


def optimizer_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor] = (),
    absmax1: Sequence[Tensor] = (),
    absmax2: Sequence[Tensor] = (),
    *,
    rule: Rule,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    block_size: int = 256,
    seed: Tensor | None = None,
) -> None:
    """The definition of `fastweights.functional.optimizer_step`."""
    update, signs = _RULES[rule]
    task = 0
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        kept, scales = (
            [s[i] for s in (state1, state2) if s],
            [a[i] for a in (absmax1, absmax2) if a],
        )
        old = kept
        if scales:
            old = [
                dequantize_blockwise(codes, absmax, signed=signed, block_size=block_size)
                for codes, absmax, signed in zip(kept, scales, signs, strict=True)
            ]
        states, p = list(old), param.to(wide)
        moved = update(p, grad.to(wide), states, step, lr, beta1, beta2, eps, weight_decay)
        finite = states[-1].isfinite()
        p = torch.where(finite, moved, p)
        if seed is not None and param.dtype == torch.bfloat16:
            p = _round_at_random(p, int(seed), task)
        param.copy_(p)
        task += -(-param.numel() // _KEYED)
        for s, signed in enumerate(signs):
            new = torch.where(finite, states[s], old[s])
            if not scales:
                kept[s].copy_(new)
                continue
            codes, absmax = quantize_blockwise(new, signed=signed, block_size=block_size)
            codes = _keep_sign(codes, new) if signed else codes
            live = _blocks(finite, block_size).any(1)
            scales[s].copy_(torch.where(live, absmax, scales[s]))
            live = live.repeat_interleave(block_size)[: new.numel()].view(new.shape)
            kept[s].copy_(torch.where(live, codes, kept[s]))
