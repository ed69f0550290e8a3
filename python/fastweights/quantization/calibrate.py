"""Quantizing a model by what flows through it: one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastweights.ops.quantization.layers import QuantizedLinear
from fastweights.quantization.gptq import gptq

__all__ = ["gptq_"]

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def gptq_(
    model: Model,
    tokens: Tensor,
    format: str = "int4",
    *,
    group_size: int | None = None,
    activation: str = "float",
    damping: float = 0.01,
    act_order: bool = True,
    progress: bool = True,
) -> Model:
    """Quantize every `nn.Linear` of a model's decoder layers in place by GPTQ (2022).

    A layer is calibrated on what the layers before it give *after* their rounding, so that errors
    do not pile up unseen. What lies outside the layers (embedding, output layer) stays: see
    `fastweights.quantize_`.

    Args:
        model: a Hugging Face causal language model, converted by `linearize` or not.
        tokens: int64 ``[B, T]``, calibration text; a few thousand tokens suffice.
        format: see `fastweights.quantize`.
        group_size: see `fastweights.quantize`.
        activation: see `fastweights.quantize`.
        damping: see `fastweights.quantization.gptq`.
        act_order: see `fastweights.quantization.gptq`.
        progress: show a bar with the error that rounding left in the layer's output.

    Returns:
        The model.

    Raises:
        ValueError: tokens of another shape or dtype, another kind of model, or a layer with nothing
            to quantize.

    Interrupted, it leaves the layers done so far quantized.

    Memory: the activations of the text between two layers, and one layer's Hessians.
    """
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
        raise ValueError(
            f"gptq_: expected int64 tokens of shape [B, T], got {tokens.dtype} {list(tokens.shape)}"
        )
    find_decoder: Any = getattr(model, "get_decoder", lambda: None)
    layers = getattr(find_decoder(), "layers", None)
    if not layers:
        raise ValueError(
            f"gptq_: expected a Hugging Face decoder with layers, got {type(model).__name__}"
        )
    from tqdm.auto import tqdm

    training = model.training
    model.eval()
    try:
        rows, arguments = _inputs_of(layers, model, tokens)
        bar = tqdm(layers, desc="gptq", unit="layer", disable=not progress)
        for layer, options in zip(bar, arguments, strict=True):
            linears = {n: m for n, m in layer.named_modules() if type(m) is nn.Linear}
            if not linears:
                raise ValueError("gptq_: expected nn.Linear in every decoder layer, found none")
            with _second_moments(linears) as moments:
                exact = [_output(layer, row, options) for row in rows]
            for name, linear in linears.items():
                weight = gptq(
                    linear.weight, moments[name], format, group_size=group_size,
                    activation=activation, damping=damping, act_order=act_order,
                )  # fmt: skip
                parent, _, child = name.rpartition(".")
                setattr(layer.get_submodule(parent), child, QuantizedLinear(weight, linear.bias))
            rounded = [_output(layer, row, options) for row in rows]
            error = _distance(exact, rounded) / max(_distance(exact, rows), 1e-30)
            bar.set_postfix_str(f"error {100 * error:.2g} %")
            rows = rounded
    finally:
        model.train(training)
    return model


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True))


def _output(layer: nn.Module, row: Tensor, options: dict[str, Any]) -> Tensor:
    result = layer(row, **options)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


class _Caught(Exception):
    """Ends a forward pass once its first layer has been reached."""


def _inputs_of(
    layers: nn.ModuleList, model: nn.Module, tokens: Tensor
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Every row at the input of the first layer, and every layer's other arguments.

    Masks and positions may differ from layer to layer but not from row to row, so one row goes all
    the way and the others stop at the first layer.
    """
    rows: list[Tensor] = []
    arguments: dict[nn.Module, dict[str, Any]] = {}

    def catch(layer: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        if layer is layers[0]:
            rows.append(args[0])
        if len(rows) > 1:
            raise _Caught
        arguments[layer] = options

    handles = [layer.register_forward_pre_hook(catch, with_kwargs=True) for layer in layers]
    try:
        for row in tokens:
            with suppress(_Caught):
                model(row[None], use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return rows, [arguments[layer] for layer in layers]


@contextmanager
def _second_moments(linears: dict[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Within the context, forward passes add ``XᵀX`` of each layer's input ``[tokens, K]`` up.

    Layers that read the same tensor share one sum.
    """
    moments: dict[str, Tensor] = {}
    latest: list[tuple[Tensor, Tensor]] = []

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if latest and latest[0][0] is args[0]:
                moments[name] = latest[0][1]
                return
            x = args[0].flatten(0, -2).float()
            total = moments.setdefault(name, x.new_zeros(x.shape[1], x.shape[1]))
            total.addmm_(x.T, x)
            latest[:] = [(args[0], total)]

        return add

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
