"""Adam and AdamW."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastweights.optim.blockwise import BlockwiseOptimizer

__all__ = ["Adam", "Adam8bit", "AdamW", "AdamW8bit"]


class Adam(BlockwiseOptimizer):
    r"""Adam (Kingma and Ba 2014) by one fused op over all parameters.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow (1 - \mathrm{lr}\,\lambda) p - \mathrm{lr}
        \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    As in bitsandbytes, weight decay is decoupled here too, so that `Adam` and `AdamW` differ only
    in its default (`torch.optim.Adam` adds it to the gradient).

    Where a gradient is NaN or infinite, parameter and state stay as they are. Parameters are
    float32, bfloat16, float16 or float64 (whose states are float64, never codes).

    Args:
        params: parameters, or groups of them; every option below may differ by group.
        lr: learning rate.
        betas: β₁, β₂.
        eps: ε.
        weight_decay: λ.
        optim_bits: 32, or 8 for states as codes of the dynamic 8-bit maps with one absmax per
            block: 2.03 instead of 8 bytes per element (Dettmers et al. 2021, arXiv:2110.02861).
        min_8bit_size: smaller parameters keep states of 32 bits.
        block_size: elements per absmax, a power of two from 64 to 4096.
        stochastic_rounding: round bfloat16 parameters at random, with the right mean, so that
            updates below half a unit in the last place are not lost. Drawn from torch's generator.

    Raises:
        ValueError: an option outside its range.

    Example:
        >>> model = torch.nn.Linear(100, 100)
        >>> optimizer = Adam(model.parameters(), lr=1e-3, optim_bits=8)
        >>> model(torch.ones(100)).sum().backward()
        >>> optimizer.step()
    """

    rule = "adam"
    signs = (True, False)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        block_size: int = 256,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, optim_bits=optim_bits,
            min_8bit_size=min_8bit_size, block_size=block_size,
            stochastic_rounding=stochastic_rounding,
        )  # fmt: skip


class AdamW(Adam):
    """`Adam` with a weight decay of 0.01 by default."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        block_size: int = 256,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, optim_bits=optim_bits,
            min_8bit_size=min_8bit_size, block_size=block_size,
            stochastic_rounding=stochastic_rounding,
        )  # fmt: skip


class Adam8bit(Adam):
    """`Adam` with states of 8 bits."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        min_8bit_size: int = 4096,
        block_size: int = 256,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, optim_bits=8, min_8bit_size=min_8bit_size,
            block_size=block_size, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip


class AdamW8bit(Adam8bit):
    """`AdamW` with states of 8 bits."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = 4096,
        block_size: int = 256,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, min_8bit_size=min_8bit_size,
            block_size=block_size, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip
