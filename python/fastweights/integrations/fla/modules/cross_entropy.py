"""`fla.modules.fused_cross_entropy` and `fused_linear_cross_entropy`: what their losses call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "fused_cross_entropy_loss",
    "fused_linear_cross_entropy_bwd",
]


def cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    logit_softcapping: float | None = None,
    ignore_index: int = -100,
    process_group: object = None,
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """`cross_entropy_fwd` of fla.

    Args:
        logits: [N, V].
        target: [N].
        label_smoothing: share of the target that goes to all classes alike.
        logit_scale: factor of the logits.
        lse_square_scale: factor of the squared log-sum-exp, which is added to the loss.
        logit_softcapping: c of c tanh(logits / c), after the scale.
        ignore_index: target of rows without a loss.
        process_group: only None.

    Returns:
        loss [N], the part of it that is the squared log-sum-exp [N], the log-sum-exp [N], all in
        float32; V, and 0: the number of the first class.

    Raises:
        NotImplementedError: classes that are spread over processes.
    """
    if process_group is not None:
        raise NotImplementedError("`process_group`: a vocabulary in parts is not supported.")
    scaled = _scaled(logits, logit_scale, logit_softcapping)
    lse = scaled.logsumexp(-1)
    kept = target != ignore_index
    at_target = scaled.gather(1, target.where(kept, 0).unsqueeze(1)).squeeze(1)
    z_loss = lse_square_scale * lse.square()
    loss = lse - (1 - label_smoothing) * at_target + z_loss
    if label_smoothing:
        loss = loss - label_smoothing * scaled.mean(-1)
    return loss.where(kept, 0), z_loss.where(kept, 0), lse, logits.shape[1], 0


def cross_entropy_bwd(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    dloss: Tensor,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    logit_softcapping: float | None = None,
    ignore_index: int = -100,
    total_classes: int | None = None,
    class_start_idx: int = 0,
    inplace_backward: bool = False,
) -> Tensor:
    """`cross_entropy_bwd` of fla: the gradient of `cross_entropy_fwd`'s loss.

    Args:
        logits: [N, V].
        target: [N].
        lse: log-sum-exp [N].
        dloss: gradient of the loss [N].
        label_smoothing: as in the forward, and so are the next four.
        logit_scale: see there.
        lse_square_scale: see there.
        logit_softcapping: see there.
        ignore_index: see there.
        total_classes: V.
        class_start_idx: 0.
        inplace_backward: write to logits.

    Returns:
        [N, V] in the dtype of logits; logits itself with `inplace_backward`.
    """
    scaled = _scaled(logits, logit_scale, logit_softcapping)
    grad = (scaled - lse.unsqueeze(1)).exp_()
    if lse_square_scale:
        grad.mul_((1 + 2 * lse_square_scale * lse).unsqueeze(1))
    if label_smoothing:
        grad.sub_(label_smoothing / logits.shape[1])
    kept = target != ignore_index
    column = target.where(kept, 0).unsqueeze(1)
    grad.scatter_add_(1, column, grad.new_full((), label_smoothing - 1).expand(column.shape))
    if logit_softcapping is not None:
        grad.mul_(1 - (scaled / logit_softcapping).square())
    grad.mul_((dloss * logit_scale).where(kept, 0).unsqueeze(1))
    return logits.copy_(grad) if inplace_backward else grad.to(logits.dtype)


def fused_linear_cross_entropy_bwd(
    do: Tensor, dx: Tensor, dw: Tensor | None, db: Tensor | None
) -> tuple[Tensor | None, ...]:
    """`fused_linear_cross_entropy_bwd` of fla: the gradients of the forward, times its own."""
    return tuple(None if grad is None else grad * do.to(grad.dtype) for grad in (dx, dw, db))


def fused_cross_entropy_loss(
    self: Any, input: Tensor, target: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """`FusedCrossEntropyLoss.forward` of fla without its refusal of CPU tensors."""
    from fla.modules.fused_cross_entropy import cross_entropy_loss

    names = (
        "label_smoothing",
        "logit_scale",
        "lse_square_scale",
        "logit_softcapping",
        "ignore_index",
        "inplace_backward",
        "process_group",
    )
    losses: tuple[Tensor, Tensor] = cross_entropy_loss(
        input, target, **{name: getattr(self, name) for name in names}
    )
    loss, z_loss = losses
    if self.reduction != "none":
        count = (target != self.ignore_index).sum() if self.reduction == "mean" else 1
        loss, z_loss = loss.sum() / count, z_loss.sum() / count
    return (loss, z_loss) if self.return_z_loss else loss


def _scaled(logits: Tensor, scale: float, softcapping: float | None) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    wide = wide * scale if scale != 1.0 else wide
    return wide if softcapping is None else softcapping * torch.tanh(wide / softcapping)
