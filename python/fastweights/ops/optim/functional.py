"""Optimizer steps with states of 8 bits: the public functions, and their ops for torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastweights import _load  # noqa: F401  (defines torch.ops.fastweights)
from fastweights.ops import _common
from fastweights.ops.optim import reference
from fastweights.ops.optim.reference import Rule, dynamic_map

__all__ = ["dequantize_blockwise", "dynamic_map", "optimizer_step", "quantize_blockwise"]


def quantize_blockwise(
    x: Tensor, *, signed: bool = True, block_size: int = 256
) -> tuple[Tensor, Tensor]:
    r"""Codes of a dynamic 8-bit map, nearest to x over the largest magnitude of its block.

    .. math::
        \mathrm{code}_i = \arg\min_c
        |x_i / \mathrm{absmax}_{\lfloor i / \mathrm{block} \rfloor} - \mathrm{level}_c|

    (Dettmers et al. 2021, arXiv:2110.02861, eq. 4 and 5.) The levels are those of
    `dynamic_map(signed)`; they are computed, not looked up.

    Args:
        x: any shape; float32, bfloat16 or float16. Blocks are consecutive elements in logical
            order. Without signs, x must not be negative.
        signed: which map.
        block_size: a power of two from 64 to 4096; the last block may be shorter.

    Returns:
        codes, uint8 of x's shape, and absmax, float32 `[ceil(numel / block_size)]`. A block of
        zeros has absmax 0 and the codes of 0. A NaN or an infinity makes absmax the same and the
        block's codes useless.

    Raises:
        RuntimeError: a dtype, device or block size that does not fit.

    Example:
        >>> codes, absmax = quantize_blockwise(torch.tensor([0.0, 0.5, -2.0, 2.0]))
        >>> codes, absmax
        (tensor([127, 202,   0, 255], dtype=torch.uint8), tensor([2.]))
    """
    if _common.needs_reference(x):
        return reference.quantize_blockwise(x, signed=signed, block_size=block_size)
    codes, absmax = torch.ops.fastweights.quantize_blockwise(
        x, signed=signed, block_size=block_size
    )
    return codes, absmax


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, *, signed: bool = True, block_size: int = 256
) -> Tensor:
    """The numbers that `quantize_blockwise` stands for: level times absmax, float32.

    Args:
        codes: uint8, any shape.
        absmax: float32 `[ceil(numel / block_size)]`.
        signed: which map.
        block_size: as it was quantized.

    Returns:
        float32 of the shape of codes.

    Raises:
        RuntimeError: shapes, dtypes, devices or a block size that do not fit.

    Example:
        >>> dequantize_blockwise(torch.tensor([127, 255], dtype=torch.uint8), torch.tensor([2.0]))
        tensor([0., 2.])
    """
    if _common.needs_reference(codes, absmax):
        return reference.dequantize_blockwise(codes, absmax, signed=signed, block_size=block_size)
    x: Tensor = torch.ops.fastweights.dequantize_blockwise(
        codes, absmax, signed=signed, block_size=block_size
    )
    return x


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
    r"""One step of an optimizer on all tensors of a list, in place, with states of 8 or 32 bits.

    "adam" (Kingma and Ba 2014, with the decoupled decay of AdamW):

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow (1 - \mathrm{lr}\,\lambda) p - \mathrm{lr}
        \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    "lion" (Chen et al. 2023, arXiv:2302.06675):

    .. math::
        p \leftarrow (1 - \mathrm{lr}\,\lambda) p
        - \mathrm{lr}\,\mathrm{sign}(\beta_1 m + (1 - \beta_1) g) \qquad
        m \leftarrow \beta_2 m + (1 - \beta_2) g

    "momentum" (SGD):

    .. math::
        m \leftarrow \beta_1 m + g + \lambda p \qquad p \leftarrow p - \mathrm{lr}\,m

    States of 8 bits are decoded, updated, used and coded again, block by block (Dettmers et al.
    2021, arXiv:2110.02861): the parameter sees the new state before it is rounded, so that a first
    step is that of 32 bits exactly. Signed states keep their sign: only 0 is coded as 0. Where the
    new state would not be finite, because the gradient is NaN, infinite or too large, parameter and
    state stay as they are; a block without a single finite gradient is not touched at all.

    Args:
        params: contiguous tensors; float32, bfloat16, float16 or, with states of 32 bits, float64.
        grads: one per parameter, of its shape and dtype.
        state1: m; uint8 codes of the signed map if absmax1 is given, else float32 (float64 for
            float64 parameters), of the parameter's shape.
        state2: v of "adam": codes of the map without signs or numbers; empty for other rules.
        absmax1: float32 `[ceil(numel / block_size)]` per parameter, or empty: states of 32 bits.
        absmax2: the same for state2.
        rule: "adam", "lion" or "momentum".
        step: t, which counts from 1.
        lr: learning rate.
        beta1: decay of the first state; of "momentum" the momentum.
        beta2: decay of the second state; of "lion" that of the state.
        eps: of "adam".
        weight_decay: λ.
        block_size: a power of two from 64 to 4096.
        seed: int64 with one element: bfloat16 parameters are rounded to one of their two neighbours
            at random, so that small updates are not lost. None: to the nearest.

    Raises:
        RuntimeError: lists, shapes, dtypes, devices or numbers that do not fit; the message says
            which.
        NotImplementedError: gradients through the step; call it under `torch.no_grad()`.

    Everything is computed in float32 (float64 for float64 parameters). Results are the same bits
    for any number of threads.

    Example:
        >>> p, g = torch.ones(3), torch.tensor([0.5, -0.5, torch.nan])
        >>> optimizer_step([p], [g], [torch.zeros(3)], rule="momentum", step=1, lr=1.0)
        >>> p
        tensor([0.5000, 1.5000, 1.0000])
    """
    tensors = params, grads, state1, state2, absmax1, absmax2
    options = {
        "rule": rule, "step": step, "lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps,
        "weight_decay": weight_decay, "block_size": block_size, "seed": seed,
    }  # fmt: skip
    if not params:
        return  # the dispatcher has no tensor to go by
    if _common.needs_reference(*params):
        reference.optimizer_step(*tensors, **options)  # type: ignore[arg-type]
        return
    torch.ops.fastweights.optimizer_step(*tensors, **options)


def _step_fake(*args: object, **options: object) -> None:
    return None


def _quantize_fake(x: Tensor, *, signed: bool, block_size: int) -> tuple[Tensor, Tensor]:
    blocks = (x.numel() + block_size - 1) // block_size
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(blocks, dtype=torch.float32)


def _dequantize_fake(codes: Tensor, absmax: Tensor, *, signed: bool, block_size: int) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


torch.library.register_fake("fastweights::optimizer_step", _step_fake)
torch.library.register_fake("fastweights::quantize_blockwise", _quantize_fake)
torch.library.register_fake("fastweights::dequantize_blockwise", _dequantize_fake)
_common.refuse_gradients("optimizer_step")
