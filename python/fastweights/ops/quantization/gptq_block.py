"""`gptq_block`: the columns of one block of GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor

from fastweights.ops._common import needs_reference
from fastweights.ops.quantization import gptq_block_reference as reference

__all__ = ["gptq_block"]


def gptq_block(
    w: Tensor,
    u: Tensor,
    scale: Tensor,
    minimum: Tensor,
    least: float,
    most: float,
    p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Rounds the columns of a block one after another, each error passed on to those that follow.

    .. math::
        w_i' = w_i - \sum_{j<i} (e_j u_{ji} + w_j' p_{ji}), \quad
        c_i = \mathrm{round}((w_i' - m_i) / s_i), \quad e_i = (w_i' - s_i c_i - m_i) / u_{ii}

    (Frantar et al. 2022, arXiv:2210.17323, algorithm 1, the inner loop; with p the correction of
    GPTAQ.) `fastweights.quantization.GPTQ` is made of these and of products of matrices.

    Args:
        w: ``[N, C]``, float32 or float64, finite, as are all others.
        u: ``[C, C]``, upper triangular with a positive diagonal; what is below it is not read.
        scale: ``[N, C]``, of every weight; 0 rounds to the code 0 (or the nearest there is).
        minimum: ``[N, C]``: a level is ``scale * code + minimum``.
        least: the least code, an integer of at most 2^21 in magnitude.
        most: the largest code.
        p: ``[C, C]``, read above the diagonal, or None.

    Returns:
        (codes, errors), ``[N, C]`` in the dtype of w; they have no gradient. The weight when its
        turn came is ``scale * codes + minimum + errors * u.diagonal()``.

    Raises:
        RuntimeError: shapes or dtypes that do not go together, codes that are no integers.

    Cost: N C² operations; rows are independent and the same bits for any number of threads.

    Example:
        >>> w, u = torch.tensor([[0.6, 0.6]]), torch.tensor([[1.0, 0.5], [0.0, 1.0]])
        >>> codes, errors = gptq_block(w, u, torch.ones(1, 2), torch.zeros(1, 2), 0, 3)
        >>> codes, errors
        (tensor([[1., 1.]]), tensor([[-0.4000, -0.2000]]))
    """
    call = w.detach(), u.detach(), scale.detach(), minimum.detach(), least, most
    p = None if p is None else p.detach()
    if needs_reference(w):
        return reference.gptq_block(*call, p)
    codes, errors = torch.ops.fastweights.gptq_block(*call, p)
    return codes, errors


def _fake(w: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape), w.new_empty(w.shape)


torch.library.register_fake("fastweights::gptq_block", _fake)
