"""CorDA: LoRA that starts from the components of a weight that its inputs tell apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastweights.adapters.activate import disabled
from fastweights.adapters.base import dtype_of, sizes
from fastweights.adapters.lora import LoRA
from fastweights.adapters.lora_layer import LoRALayer
from fastweights.adapters.pissa import linear_of, weight_of
from fastweights.quantization.samples import Sample
from fastweights.quantization.walk import hooked

__all__ = ["CorDA", "covariances", "oriented_svd"]

_MODES = ("ipm", "kpm")
_NORMALIZE = ("absmax", "none")
_TOLERANCE = 0.05  # of the inverse that decides how much damping there is, in Frobenius' norm
_MOST = 1e6  # damping at which a covariance is beyond help


@dataclass(frozen=True, kw_only=True)
class CorDA(LoRA):
    r"""Context-oriented decomposition adaptation (Yang et al. 2024, arXiv:2406.05223).

    .. math::
        C = X^T X, \quad W \tilde C = U S V^T, \quad P = V^T \tilde C^{-1}, \quad
        A = \sqrt{S_r / s}\, P_r, \quad B = U_r \sqrt{S_r / s}, \quad W_{res} = W - s B A

    with the inputs X that calibration brings to a layer. Mode "ipm" (instruction-previewed) trains
    the r largest components: calibrate on what is to be learnt. Mode "kpm" (knowledge-preserved)
    trains the r smallest: calibrate on what is to be kept, and it is forgotten less. All else is as
    with `fastweights.adapters.PiSSA`, which this is where C is the identity.

    C is damped, C̃ = C + δ mean(diag C) I, δ = 0.01, 0.02, ... until C̃ times its inverse is the
    identity to 0.05. C is kept in float32 (float64 of float64 inputs) and decomposed in float64.
    Some 256 samples of 2048 tokens do for 4096 inputs.

    Args:
        rank: see `LoRA`, as are the others but `init`, which has no effect.
        mode: "ipm" or "kpm".
        normalize: "absmax" divides every sample by its largest absolute value, as the authors do
            against overflow; samples then count alike whatever their size. "none" does not.
        memory: bytes for covariances at one time; calibration runs again for those that did not
            fit. 0 keeps one layer's at a time.

    Raises:
        ValueError: an argument out of range; a rank that a layer does not have; no calibration
            in `fastweights.adapt`, or one that does not reach a layer.
        TypeError: a layer that is not linear, or quantized: adapt first, `quantize_` then.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.adapters import CorDA
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(16, 16)), torch.randn(64, 16)
        >>> y = model(x)
        >>> adapted = fw.adapt(model, CorDA(rank=4, mode="kpm"), calibration=x)
        >>> torch.allclose(adapted(x), y, atol=1e-4)
        True
    """

    mode: str = "ipm"
    normalize: str = "absmax"
    memory: int = 1 << 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in _MODES:
            raise ValueError(f"CorDA: expected mode in {_MODES}, got {self.mode!r}")
        if self.normalize not in _NORMALIZE:
            raise ValueError(f"CorDA: expected normalize in {_NORMALIZE}, got {self.normalize!r}")

    def survey(
        self, model: nn.Module, paths: Sequence[str], samples: Sequence[Sample]
    ) -> Iterator[tuple[str, Tensor]]:
        """The covariances of as many layers at a time as fit into `memory`."""
        if not samples:
            raise ValueError("adapt: expected calibration with CorDA, got None")
        group: list[str] = []
        used = 0
        for path in [*paths, None]:
            size = 0 if path is None else _bytes(model.get_submodule(path))
            if group and (path is None or used + size > self.memory):
                found = covariances(model, group, samples, normalize=self.normalize)
                for name in group:
                    yield name, found.pop(name)
                group, used = [], 0
            if path is not None:
                group.append(path)
                used += size

    @torch.no_grad()
    def initialize(self, layer: LoRALayer, name: str, known: Any) -> None:
        """Takes the chosen components out of the base."""
        linear = linear_of(layer, name, "CorDA")
        rank = len(linear.lora_A[name])
        u, s, p = oriented_svd(weight_of(linear), known)
        chosen = slice(0, rank) if self.mode == "ipm" else slice(len(s) - rank, None)
        root = (s[chosen] / linear.scaling[name]).sqrt()
        linear.take_out(name, root.unsqueeze(1) * p[chosen], u[:, chosen] * root)


def _bytes(module: nn.Module) -> int:
    base = module.base_layer if isinstance(module, LoRALayer) else module
    width = 8 if dtype_of(base) == torch.float64 else 4
    return width * sizes(base)[0] ** 2


@torch.no_grad()
def covariances(
    model: nn.Module, paths: Sequence[str], samples: Sequence[Sample], *, normalize: str = "absmax"
) -> dict[str, Tensor]:
    """XᵀX of the inputs of linear layers, the mean over samples of one calibration.

    A sample is an entry of a batch, or all of an input ``[N, D]``. Adapters are left out.

    Raises:
        ValueError: a layer that is not reached, or inputs that are not finite or all zero.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(paths, 0)
    latest: tuple[Any, Tensor, int] | None = None  # layers that read one input follow each other

    def note(path: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            nonlocal latest
            (x,) = (*args, *options.values())
            if latest is None or latest[0] is not x:
                latest = (x, *_product(x.detach(), normalize))
            _, product, count = latest
            sums[path] = sums[path].add_(product) if path in sums else product.clone()
            counts[path] += count

        return before

    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        with disabled(model), hooked({model.get_submodule(path): note(path) for path in paths}):
            for sample in samples:
                sample.run(model)
                latest = None
    finally:
        for module in training:
            module.training = True
    for path in paths:
        if not counts[path]:
            raise ValueError(f"CorDA: expected calibration to reach {path}, which it does not")
        sums[path] /= counts[path]
        size = sums[path].diagonal().sum()
        if not size.isfinite() or size == 0:
            raise ValueError(f"CorDA: expected finite inputs of {path}, not all zero, got {size}")
    return sums


def _product(x: Tensor, normalize: str) -> tuple[Tensor, int]:
    rows = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    rows = rows.flatten(1, -2) if rows.dim() > 2 else rows.reshape(1, -1, rows.shape[-1])
    if normalize == "absmax":
        largest = rows.abs().amax((1, 2), keepdim=True)
        rows = rows / torch.where(largest > 0, largest, 1)
    flat = rows.flatten(0, 1)
    return flat.t() @ flat, len(rows)


def oriented_svd(w: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and P of W = U S P, where W C̃ = U S Vᵀ and P = Vᵀ C̃⁻¹.

    Args:
        w: ``[out, in]``.
        c: ``[in, in]``, symmetric.

    Returns:
        U ``[out, k]``, S ``[k]`` descending, P ``[k, in]``, k = min(out, in), in float64.

    Raises:
        ValueError: no damping makes C invertible.
    """
    w, c = w.double(), c.double()
    damped, factor = _damped(c)
    u, s, vh = torch.linalg.svd(w @ damped, full_matrices=False)
    return u, s, torch.cholesky_solve(vh.t(), factor).t()


def _damped(c: Tensor) -> tuple[Tensor, Tensor]:
    """C̃ and its Cholesky factor."""
    eye, mean, damping = torch.eye(len(c), dtype=c.dtype), c.diagonal().mean(), 0.01
    while damping < _MOST:
        damped = c + damping * mean * eye
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed and torch.dist(damped @ torch.cholesky_inverse(factor), eye) < _TOLERANCE:
            return damped, factor
        damping *= 2
    raise ValueError("CorDA: expected a covariance that damping makes invertible")
