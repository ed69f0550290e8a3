"""GPTQ: rounding that makes up for what it has rounded so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from fastweights.ops.quantization.formats import FORMATS
from fastweights.ops.quantization.gptq_block import gptq_block
from fastweights.ops.quantization.layout import pack, unpack, unpack_parameters, with_codes
from fastweights.ops.quantization.tensor import QuantizedTensor
from fastweights.quantization.calibrate import Solver
from fastweights.quantization.round_to_nearest import (
    check_grid,
    check_rule,
    round_to_nearest,
)
from fastweights.quantization.walk import Block

__all__ = ["GPTQ", "Factor", "round_columns"]

_BLOCK = 128
# Tries at a Hessian that is not positive definite in float64, with ten times the damping each.
_DAMPINGS = 5


@dataclass(frozen=True)
class GPTQ(Solver):
    """Rounds a weight so that its *outputs* change least: ``min ||(W - Q) X||^2`` (GPTQ, 2022).

    Columns are rounded one after another; the error of each is passed on to the columns that are
    not rounded yet, along the inverse of the Hessian ``X X^T``. The layers of a block are rounded
    in the order they run, each on what those before it give after their own rounding ("true
    sequential").

    Args:
        damping: of the Hessian, a share of the mean of its diagonal.
        act_order: round the inputs of largest second moment first, while most columns are left to
            make up for it.
        static_groups: find all scales and minima before anything is rounded; else those of a group
            when its first column comes up, for what the weights are by then. Without static groups
            act-order forms groups of inputs that are rounded together; the layer then gathers its
            input in that order (``QuantizedLinear.order``).
        group_aware: act-order within groups, and of whole groups by their largest second moment, so
            that groups stay together and nothing has to be gathered (GAR).
        asymmetric: share α of the correction for the inputs having changed with the rounding of
            earlier layers (GPTAQ, 2025, which uses 0.25); 0 is without it. It keeps the float
            block and its inputs beside the rounded ones and takes twice the time.
        rule: of the grid, see `round_to_nearest`.

    Raises:
        ValueError: values out of range, or `group_aware` without `act_order`.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.quantization import GPTQ
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
        >>> x = torch.randn(8, 16, 64)
        >>> model = fw.quantize_(model, "int4", solver=GPTQ(), calibration=x, progress=False)
    """

    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    group_aware: bool = False
    asymmetric: float = 0.0
    rule: str = "search"

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"GPTQ: expected damping > 0, got {self.damping}")
        if not 0 <= self.asymmetric <= 1:
            raise ValueError(f"GPTQ: expected asymmetric in [0, 1], got {self.asymmetric}")
        if self.group_aware and not self.act_order:
            raise ValueError("GPTQ: expected act_order with group_aware, got act_order=False")
        check_rule("GPTQ", self.rule)

    @property
    def compares(self) -> bool:
        """With the asymmetric correction."""
        return self.asymmetric > 0

    def solve(self, block: Block, prepared: Mapping[str, Tensor]) -> None:
        """Rounds the layers of a block, those that read the same input with one Hessian."""
        for names in block.shared_inputs():
            hessian, drift = self._moments(block, names[0])
            group_size = block.target["group_size"]
            factor = self.factor(hessian, group_size, drift)
            for name in names:
                w = block.linears[name].weight
                block.replace(name, *self.quantize(w, factor, **block.target))

    def factor(self, hessian: Tensor, group_size: int, drift: Tensor | None = None) -> Factor:
        """What rounding needs to know of a layer's inputs.

        Args:
            hessian: ``[K, K]``, ``X X^T`` of inputs X ``[K, tokens]`` in any scale; inputs that
                never occur have a zero on the diagonal.
            group_size: inputs per scale.
            drift: ``[K, K]``, ``(X - X₀) X^T`` in the same scale, X₀ the inputs in the float model.

        Raises:
            ValueError: a Hessian that is not square, finite and positive semidefinite.
        """
        k = hessian.shape[-1]
        if hessian.shape != (k, k):
            raise ValueError(f"gptq: expected a hessian of shape [K, K], got {list(hessian.shape)}")
        bad = int(hessian.isfinite().logical_not().sum())
        if bad:
            raise ValueError(
                f"gptq: expected a finite hessian, got {bad} elements of {k * k} that are infinite "
                "or NaN; so are inputs of the layer, or their squares"
            )
        order = torch.arange(k, device=hessian.device)
        if self.act_order:
            order = _by_moment(hessian.diagonal(), group_size if self.group_aware else k)
        together = self.static_groups or self.group_aware
        groups = (order if together else torch.arange(k, device=order.device)) // group_size
        u = _inverse_factor(hessian[order][:, order], self.damping)
        p = None
        if drift is not None and self.asymmetric:
            # P = α triu(ΔX Xᵀ Uᵀ, 1) U: row i spreads the drift of input i over the later ones.
            d = drift[order][:, order].double()
            p = (self.asymmetric * ((d @ u.T).triu(1) @ u)).float()
        return Factor(order, groups, u.float(), p)

    def quantize(
        self,
        w: Tensor,
        factor: Factor,
        format: str = "int4",
        *,
        group_size: int,
        activation: str = "float",
    ) -> tuple[QuantizedTensor, Tensor | None]:
        """One weight.

        Args:
            w: ``[N, K]``, finite.
            factor: from `factor`, with the same group size.
            format: see `fastweights.quantize`, as are the rest; one with evenly spaced levels.
            group_size: inputs per scale.
            activation: "float" or "int8".

        Returns:
            The weight, and the order in which it wants its inputs, or None.

        Cost: N K² operations.
        """
        n, k = w.shape
        if len(factor.order) != k:
            raise ValueError(
                f"gptq: expected a hessian of shape [{k}, {k}], got {list(factor.u.shape)}"
            )
        check_grid("gptq", format, free=not self.static_groups)
        form = FORMATS[format]
        w = w.detach().float()
        gathered = self.act_order and not (self.static_groups or self.group_aware)
        fit = partial(
            round_to_nearest, format=format, group_size=group_size, activation=activation,
            rule=self.rule,
        )  # fmt: skip
        found = fit(w)
        codes, scale, minimum = unpack(found)
        rounded, _ = round_columns(
            w,
            factor,
            scale[..., 0],
            minimum[..., 0],
            form.extent,
            refit=None if self.static_groups else lambda now: unpack_parameters(fit(now)),
        )
        rounded = rounded if gathered else rounded[:, factor.order.argsort()]
        codes.flatten(1)[:, :k] = form.encode(rounded)
        if self.static_groups:
            return with_codes(found, codes), None
        packed = pack(codes, scale, minimum, format, (n, k), activation)
        return packed, factor.order if gathered else None

    def _moments(self, block: Block, name: str) -> tuple[Tensor, Tensor | None]:
        """``X Xᵀ`` and, for the correction, ``(X - X₀) Xᵀ``, over all calls."""
        k = block.linears[name].in_features
        hessian = torch.zeros(k, k)
        if not self.compares:
            for x in block.inputs(name):
                hessian.addmm_(x.T, x)
            return hessian, None
        drift = torch.zeros(k, k)
        for x, exact in zip(block.inputs(name), block.exact_inputs(name), strict=True):
            hessian.addmm_(x.T, x)
            if exact.shape == x.shape:  # a router may have sent other tokens
                drift.addmm_((x - exact).T, x)
        return hessian, drift


@dataclass(frozen=True)
class Factor:
    """The inputs of a layer, as rounding wants them.

    Args:
        order: int64 ``[K]``, the columns in the order they are rounded.
        groups: int64 ``[K]``, the group of each of them.
        u: ``[K, K]``, upper triangular with ``H⁻¹ = Uᵀ U`` of the damped Hessian in that order.
        p: ``[K, K]``, strictly upper triangular, or None: see `GPTQ`'s `asymmetric`.
    """

    order: Tensor
    groups: Tensor
    u: Tensor
    p: Tensor | None = None


def round_columns(
    w: Tensor,
    factor: Factor,
    scale: Tensor,
    minimum: Tensor,
    extent: tuple[float, float],
    *,
    refit: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    block: int = _BLOCK,
) -> tuple[Tensor, float]:
    """Algorithm 1 of the paper.

    Args:
        w: float32 ``[N, K]``.
        factor: of its inputs.
        scale: ``[N, G]``, of every group; 0 for a group of equal weights.
        minimum: ``[N, G]``; a weight is ``scale * code + minimum``.
        extent: least and largest code.
        refit: ``[N, g]`` to new scale and minimum ``[N, 1, 1]``: asked when a group's first column
            comes up, with its weights after all that has been passed on to them; written to `scale`
            and `minimum`.
        block: columns between updates of everything to their right; of no effect on the result but
            for rounding.

    Returns:
        Codes ``[N, K]`` in the order of the factor, and the loss ``½ tr((W - Q) H (W - Q)ᵀ)``.
    """
    w = w[:, factor.order]  # indexing copies
    codes = torch.empty_like(w)
    loss = 0.0
    u, p, groups = factor.u, factor.p, factor.groups
    k = w.shape[1]
    starts = set(range(0, k, block))
    widths: dict[int, int] = {}
    if refit is not None:
        first = torch.cat([groups.new_zeros(1), (groups.diff() != 0).nonzero()[:, 0] + 1]).tolist()
        widths = {i: j - i for i, j in pairwise([*first, k])}
        starts |= widths.keys()
    for start, stop in pairwise([*sorted(starts), k]):
        if refit is not None and start in widths:
            s, m = refit(w[:, start : start + widths[start]].contiguous())
            scale[:, groups[start]], minimum[:, groups[start]] = s[:, 0, 0], m[:, 0, 0]
        here, rest = slice(start, stop), slice(stop, k)
        s, m = scale[:, groups[here]], minimum[:, groups[here]]
        spread = None if p is None else p[here, here]
        codes[:, here], errors = gptq_block(w[:, here], u[here, here], s, m, *extent, spread)
        w[:, rest].addmm_(errors, u[here, rest], alpha=-1)
        if p is not None:
            values = s * codes[:, here] + m + errors * u[here, here].diagonal()
            w[:, rest].addmm_(values, p[here, rest], alpha=-1)
        loss += 0.5 * float(errors.double().square().sum())
    return codes, loss


def _by_moment(moments: Tensor, width: int) -> Tensor:
    """Inputs by falling second moment: within groups of a width, groups by their largest."""
    groups = []
    for group in torch.arange(len(moments), device=moments.device).split(width):
        groups.append(group[moments[group].argsort(descending=True, stable=True)])
    largest = torch.stack([moments[group[0]] for group in groups])
    return torch.cat([groups[i] for i in largest.argsort(descending=True, stable=True).tolist()])


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular float64 U with ``H⁻¹ = Uᵀ U`` for the damped Hessian.

    ``H = R Rᵀ`` with an upper triangular R, which Cholesky gives of H read backwards, has U = R⁻¹:
    the inverse of H is never formed.
    """
    h = hessian.double()
    diagonal = h.diagonal()
    h = h + torch.diag((diagonal == 0).double())
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    for attempt in range(_DAMPINGS):
        damped = h + torch.diag((damping * 10**attempt * mean).expand(len(h)))
        backwards, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            one = torch.eye(len(h), dtype=h.dtype, device=h.device)
            u: Tensor = torch.linalg.solve_triangular(backwards.flip(0, 1), one, upper=True)
            return u
    raise ValueError("gptq: expected a positive semidefinite hessian, got one that is not")
