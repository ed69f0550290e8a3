"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastweights.optim.blockwise import BlockwiseOptimizer

__all__ = ["SGD", "SGD8bit"]


class SGD(BlockwiseOptimizer):
    r"""SGD with momentum by one fused op over all parameters.

    .. math::
        m \leftarrow \mu m + g + \lambda p \qquad p \leftarrow p - \mathrm{lr}\,m

    This is `torch.optim.SGD` without dampening and Nesterov's variant. The groups hold the momentum
    as the first of `betas`, as in bitsandbytes.

    Args:
        params: parameters, or groups of them; every option below may differ by group.
        lr: learning rate.
        momentum: μ > 0 (without momentum there is no state, and `torch.optim.SGD` does).
        weight_decay: λ, added to the gradient.
        optim_bits: 32, or 8 for a state of 1.02 bytes per element. See `Adam` for this and the
            rest.
        min_8bit_size: smaller parameters keep states of 32 bits.
        block_size: elements per absmax.
        stochastic_rounding: of bfloat16 parameters.

    Raises:
        ValueError: an option outside its range.
    """

    rule = "momentum"
    signs = (True,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        block_size: int = 256,
        stochastic_rounding: bool = False,
    ) -> None:
        if not 0 < momentum < 1:
            raise ValueError(
                f"{type(self).__name__}: expected 0 < momentum < 1, got {momentum} "
                "(torch.optim.SGD works without momentum)"
            )
        super().__init__(
            params, lr=lr, betas=(momentum, 0.0), eps=0.0, weight_decay=weight_decay,
            optim_bits=optim_bits, min_8bit_size=min_8bit_size, block_size=block_size,
            stochastic_rounding=stochastic_rounding,
        )  # fmt: skip


class SGD8bit(SGD):
    """`SGD` with a state of 8 bits."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        min_8bit_size: int = 4096,
        block_size: int = 256,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params, lr, momentum, weight_decay, optim_bits=8, min_8bit_size=min_8bit_size,
            block_size=block_size, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip
