"""A linear layer with low-rank updates: the public function and its ops.

The base product is that of the base: torch's linear, or `quantized_linear`. The kernels add the
updates to what it gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastweights.ops import _common
from fastweights.ops.lora import reference
from fastweights.ops.quantization.tensor import QuantizedTensor

__all__ = ["lora_linear"]

_ops = torch.ops.fastweights
_add = _ops.lora_add_.default
_quantized = _ops.quantized_linear.default


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedTensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Tensor,
    *,
    segments: Tensor | None = None,
    indices: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    split: Sequence[int] | None = None,
) -> Tensor:
    r"""A frozen linear layer with low-rank updates.

    .. math::
        y = x W^T + b + \sum_i s_i \, (\mathrm{drop}(x) A_i^T) B_i^T

    (LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3; adapters by rows as in Punica, Chen et al. 2023,
    arXiv:2310.18547.) Nothing of the size of W is ever made, and W has no gradient.

    Args:
        x: ``[..., in_features]``; float32, bfloat16, float16 or float64.
        weight: ``[out_features, in_features]`` of x's dtype, or a `QuantizedTensor`.
        bias: ``[out_features]`` of x's dtype, or None.
        lora_a: A_i, ``[rank_i, in_features]``, any floating dtype. Ranks may differ.
        lora_b: B_i, ``[out_features, rank_i]``. The updates are computed in float32 (float64 for
            float64 x) whatever the dtypes, without copies of x, and added with one rounding.
        scale: ``[len(lora_a)]``, s_i: alpha / rank, or alpha / sqrt(rank). A tensor, so that
            compiled code does not depend on it; without gradient.
        segments: int64 or int32 ``[len(lora_a) + 1]``, ascending: only the rows
            ``segments[i] : segments[i + 1]`` of x (all dimensions but the last counted as one) meet
            adapter i. Rows outside meet none.
        indices: int64 or int32, of a shape that x's begins with: the adapter that a row meets (a
            sample, where it is ``[B]``), -1 for none. With neither, every row meets all adapters.
        dropout: probability that an element of x is left out of the update; the others are
            multiplied by 1 / (1 - dropout).
        seed: int64, one number: what is left out is a function of it and of the element's place,
            at any number of threads. Required if dropout > 0.
        split: sizes of projections that share x and whose weights are stacked (q, k and v; gate and
            up): ``sum(split) == out_features``. Then lora_a, lora_b and scale have
            ``len(split)`` entries for each adapter, one after another, that of projection p with
            B ``[split[p], rank]``; segments and indices count adapters. One pass over x serves all
            of them. ``y.split(split, -1)`` are the projections' outputs.

    Returns:
        y, ``[..., out_features]``, of x's dtype. Rows that meet no adapter are those of the base,
        bit for bit, as are all of them where B is zero.

    Raises:
        RuntimeError: shapes, dtypes, devices, segments or indices that do not fit.
        NotImplementedError: forward-mode differentiation or double backward; use
            `fastweights.reference.lora_linear`.

    Gradients reach x, bias, lora_a and lora_b; x and ``x A^T`` are kept for the backward. Beyond
    the base, the forward takes 2 M rank (in_features + out_features) operations for M rows and one
    pass over x and y. The updates are the same bits for any number of threads.

    Example:
        >>> x, a, b, scale = torch.ones(2, 3), torch.ones(1, 3), torch.ones(3, 1), torch.ones(1) / 2
        >>> lora_linear(x, torch.eye(3), None, [a], [b], scale)
        tensor([[2.5000, 2.5000, 2.5000],
                [2.5000, 2.5000, 2.5000]])
    """
    layout = _layout_of(weight)
    packed = weight.packed if isinstance(weight, QuantizedTensor) else weight
    _common.refuse_forward_ad("lora_linear", x, bias, *lora_a, *lora_b)
    sizes = [] if split is None else list(split)
    updates = (list(lora_a), list(lora_b), scale, segments, indices, dropout, seed, sizes)
    y: Tensor
    if _is_plain() and x.is_cpu and packed.is_cpu:
        y = _base(x, packed, *layout, bias)
        add_updates(y, x, updates)
        return y
    if _common.needs_reference(x, packed):
        return reference.lora_linear(
            x, weight, bias, lora_a, lora_b, scale,
            segments=segments, indices=indices, dropout=dropout, seed=seed, split=split,
        )  # fmt: skip
    if _is_traced() or not (x.is_cpu and packed.is_cpu):
        result: Tensor = _ops.lora_linear(x, packed.detach(), *layout, bias, *updates)[0]
        return result
    if torch.is_autocast_enabled("cpu"):
        x, packed, bias = (_in_autocast_dtype(t) for t in (x, packed, bias))
    y = _Eager.apply(
        layout,
        dropout,
        sizes,
        x,
        packed.detach(),
        bias,
        scale,
        segments,
        indices,
        seed,
        *lora_a,
        *lora_b,
    )
    return y


def add_updates(y: Tensor, x: Tensor, updates: Sequence[Any]) -> None:
    """Adds to y what `lora_linear` adds: its arguments from lora_a on."""
    # Arguments that need not be said cost a microsecond, which a single row takes notice of.
    _, _, _, segments, indices, dropout, _, split = updates
    plain = not dropout and not split and segments is None and indices is None
    _add(y, x, *(updates[:3] if plain else updates))


def _is_plain() -> bool:
    """Whether nothing but the arithmetic is wanted, which saves a call of the dispatcher."""
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or _common.reference_forced()
    )


def _is_traced() -> bool:
    """Whether something wants to see the op as one: a compiler, a transform, a fake tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _in_autocast_dtype(t: Any) -> Any:
    """A float x, weight or bias; adapters keep their dtypes."""
    if t is None or t.dtype != torch.float32:
        return t
    return t.to(torch.get_autocast_dtype("cpu"))


def _layout_of(weight: Tensor | QuantizedTensor) -> tuple[str, int, int, int, str]:
    """What makes a tensor of bytes a weight: the arguments of `_ops.quantized_linear`."""
    if isinstance(weight, QuantizedTensor):
        return weight.format, *weight.shape, weight.group_size, weight.activation
    return "", 0, 0, 0, ""


def _base(
    x: Tensor, weight: Tensor, format: str, n: int, k: int, group_size: int, activation: str,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    if format:
        y: Tensor = _quantized(x, weight, bias, format, n, k, group_size, activation)
        return y
    try:
        return F.linear(x, weight, bias)
    except RuntimeError as problem:
        raise RuntimeError(_mistake(x, weight, bias) or str(problem)) from None


def _mistake(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """What is wrong with the arguments of a linear, in our words."""
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return (
            "lora_linear: expected x [..., in_features] and weight [out_features, in_features], "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        return (
            f"lora_linear: expected bias of shape [out_features] = [{weight.shape[0]}] "
            f"(from weight), got {list(bias.shape)}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            return (
                f"lora_linear: expected {name} of dtype {_name(x.dtype)} (from x), "
                f"got {_name(t.dtype)}"
            )
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_UPDATES = (
    "Tensor[] lora_a, Tensor[] lora_b, Tensor scale, Tensor? segments, Tensor? indices, "
    "float dropout, Tensor? seed, int[] split"
)
_WEIGHT = (
    "Tensor weight, str format, int out_features, int in_features, int group_size, str activation"
)

torch.library.define(
    "fastweights::lora_linear",
    f"(Tensor x, {_WEIGHT}, Tensor? bias, {_UPDATES}) -> (Tensor y, Tensor u)",
)
torch.library.define(
    "fastweights::lora_linear_backward",
    f"(Tensor dy, Tensor x, Tensor u, {_WEIGHT}, {_UPDATES}, bool needs_x)"
    " -> (Tensor dx, Tensor da, Tensor db)",
)


def _forward_cpu(
    x: Tensor, weight: Tensor, format: str, n: int, k: int, group_size: int, activation: str,
    bias: Tensor | None, *updates: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = _base(x, weight, format, n, k, group_size, activation, bias)
    return y, _ops.lora_update_(y, x, *updates)


def _backward_cpu(
    dy: Tensor, x: Tensor, u: Tensor, weight: Tensor, format: str, n: int, k: int,
    group_size: int, activation: str, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *updates, needs_x = rest
    dx = None
    if needs_x:
        layout = (format, n, k, group_size)
        dx = _ops.quantized_linear_backward(dy, weight, *layout) if format else dy @ weight
    da, db = _ops.lora_gradients(dx, dy, x, u, *updates)
    return x.new_empty(0) if dx is None else dx, da, db


torch.library.impl("fastweights::lora_linear", "CPU", _forward_cpu)
torch.library.impl("fastweights::lora_linear_backward", "CPU", _backward_cpu)


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _u_fake(
    x: Tensor, lora_a: Sequence[Tensor], segments: Tensor | None, indices: Tensor | None,
    split: Sequence[int],
) -> Tensor:  # fmt: skip
    """All ranks side by side, or those of a row's one adapter."""
    ranks, projections = [a.shape[0] for a in lora_a], max(1, len(split))
    width = sum(ranks)
    if segments is not None or indices is not None:
        each = [sum(ranks[i : i + projections]) for i in range(0, len(ranks), projections)]
        width = max(each, default=0)
    return x.new_empty((x.shape[:-1].numel(), width), dtype=_arithmetic(x))


def _update_fake(
    y: Tensor, x: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Tensor,
    segments: Tensor | None, indices: Tensor | None, dropout: float, seed: Tensor | None,
    split: Sequence[int],
) -> Tensor:  # fmt: skip
    return _u_fake(x, lora_a, segments, indices, split)


def _gradients_fake(
    dx: Tensor | None, dy: Tensor, x: Tensor, u: Tensor, lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor], *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ranks = sum(a.shape[0] for a in lora_a)
    da = x.new_empty((ranks, x.shape[-1]), dtype=_arithmetic(x))
    return da, x.new_empty((sum(b.numel() for b in lora_b),), dtype=_arithmetic(x))


def _forward_fake(
    x: Tensor, weight: Tensor, format: str, n: int, k: int, group_size: int, activation: str,
    bias: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Tensor,
    segments: Tensor | None, indices: Tensor | None, dropout: float, seed: Tensor | None,
    split: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out_features = n if format else weight.shape[0]
    return x.new_empty((*x.shape[:-1], out_features)), _u_fake(x, lora_a, segments, indices, split)


def _backward_fake(
    dy: Tensor, x: Tensor, u: Tensor, weight: Tensor, format: str, n: int, k: int,
    group_size: int, activation: str, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape if rest[-1] else 0)
    return dx, *_gradients_fake(dx, dy, x, u, lora_a, lora_b)


torch.library.register_fake("fastweights::lora_update_", _update_fake)
torch.library.register_fake("fastweights::lora_add_", lambda *_: None)
torch.library.register_fake("fastweights::lora_gradients", _gradients_fake)
torch.library.register_fake("fastweights::lora_linear", _forward_fake)
torch.library.register_fake("fastweights::lora_linear_backward", _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, *base, bias, lora_a, lora_b, scale, segments, indices, dropout, seed, split = inputs
    ctx.base, ctx.dropout, ctx.split, ctx.adapters = base, dropout, split, len(lora_a)
    ctx.bias = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight, scale, segments, indices, seed, *lora_a, *lora_b)


_Gradients = tuple[Tensor | None, Tensor | None, list[Tensor], list[Tensor]]


def _gradients(ctx: Any, dy: Tensor, needs_x: bool, needs_bias: bool) -> _Gradients:
    """Of x, bias, lora_a and lora_b."""
    x, u, weight, scale, segments, indices, seed, *adapters = ctx.saved_tensors
    lora_a, lora_b = adapters[: ctx.adapters], adapters[ctx.adapters :]
    updates = (lora_a, lora_b, scale, segments, indices, ctx.dropout, seed, ctx.split)
    backward = (
        _ops.lora_linear_backward if torch.is_grad_enabled() or _is_traced() else _backward_cpu
    )
    dx, da, db = backward(dy, x, u, weight, *ctx.base, *updates, needs_x)
    ranks = [a.shape[0] for a in lora_a]
    das = [g.to(a.dtype) for g, a in zip(da.split(ranks), lora_a, strict=True)]
    flat = db.split([b.numel() for b in lora_b])
    dbs = [g.view(b.shape).to(b.dtype) for g, b in zip(flat, lora_b, strict=True)]
    dbias = dy.sum_to_size(dy.shape[-1:]).to(ctx.bias) if needs_bias else None
    return dx if needs_x else None, dbias, das, dbs


def _backward(ctx: Any, dy: Tensor | None, du: Tensor | None) -> tuple[Any, ...]:
    base = (None,) * 6
    sizes: Any = None if ctx.split else []  # torch takes an empty list for one of tensors
    nothing = (None, None, None, None, None, sizes)
    if dy is None:
        return None, *base, None, [None] * ctx.adapters, [None] * ctx.adapters, *nothing
    dx, dbias, das, dbs = _gradients(ctx, dy, ctx.needs_input_grad[0], ctx.needs_input_grad[7])
    return dx, *base, dbias, das, dbs, *nothing


class _Eager(torch.autograd.Function):
    """The op without its two ways through the dispatcher, which take longer than few rows do."""

    @staticmethod
    def forward(
        ctx: Any, layout: Any, dropout: float, split: list[int], x: Tensor, weight: Tensor,
        bias: Tensor | None, scale: Tensor, segments: Tensor | None, indices: Tensor | None,
        seed: Tensor | None, *adapters: Tensor,
    ) -> Tensor:  # fmt: skip
        lora_a, lora_b = adapters[: len(adapters) // 2], adapters[len(adapters) // 2 :]
        updates = (list(lora_a), list(lora_b), scale, segments, indices, dropout, seed, split)
        inputs = (x, weight, *layout, bias, *updates)
        output = _forward_cpu(*inputs)
        _setup_context(ctx, inputs, output)
        y: Tensor = output[0]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * (10 + 2 * ctx.adapters)
        dx, dbias, das, dbs = _gradients(ctx, dy, ctx.needs_input_grad[3], ctx.needs_input_grad[5])
        return None, None, None, dx, None, dbias, None, None, None, None, *das, *dbs


torch.library.register_autograd("fastweights::lora_linear", _backward, setup_context=_setup_context)
_common.refuse_double_backward("lora_linear")


def _autocast(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *layout, bias = rest[:6]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        result: tuple[Tensor, Tensor] = _ops.lora_linear(
            _in_autocast_dtype(x), _in_autocast_dtype(weight), *layout, _in_autocast_dtype(bias),
            *rest[6:],
        )  # fmt: skip
        return result


torch.library.impl("fastweights::lora_linear", "AutocastCPU", _autocast)
