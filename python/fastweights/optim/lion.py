"""Lion."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastweights.optim.blockwise import BlockwiseOptimizer

__all__ = ["Lion", "Lion8bit"]


class Lion(BlockwiseOptimizer):
    r"""Lion (Chen et al. 2023, arXiv:2302.06675) by one fused op over all parameters.

    .. math::
        p \leftarrow (1 - \mathrm{lr}\,\lambda) p
        - \mathrm{lr}\,\mathrm{sign}(\beta_1 m + (1 - \beta_1) g) \qquad
        m \leftarrow \beta_2 m + (1 - \beta_2) g

    Args:
        params: parameters, or groups of them; every option below may differ by group.
        lr: learning rate, three to ten times smaller than Adam's.
        betas: β₁ of the direction, β₂ of the state.
        weight_decay: λ, decoupled; three to ten times larger than AdamW's.
        optim_bits: 32, or 8 for a state of 1.02 bytes per element. See `Adam` for this and the
            rest.
        min_8bit_size: smaller parameters keep states of 32 bits.
        block_size: elements per absmax.
        stochastic_rounding: of bfloat16 parameters.

    Raises:
        ValueError: an option outside its range.
    """

    rule = "lion"
    signs = (True,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        block_size: int = 256,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, eps=0.0, weight_decay=weight_decay, optim_bits=optim_bits,
            min_8bit_size=min_8bit_size, block_size=block_size,
            stochastic_rounding=stochastic_rounding,
        )  # fmt: skip


class Lion8bit(Lion):
    """`Lion` with a state of 8 bits."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        min_8bit_size: int = 4096,
        block_size: int = 256,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, weight_decay, optim_bits=8, min_8bit_size=min_8bit_size,
            block_size=block_size, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip
