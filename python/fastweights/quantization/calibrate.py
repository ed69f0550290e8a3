"""Quantizing a model by what flows through it: one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastweights.ops.quantization.layers import QuantizedLinear
from fastweights.quantization.gptq import gptq

__all__ = ["gptq_"]

Model = TypeVar("Model", bound=nn.Module)
# A row of the calibration text at the input of a layer, and the layer's other arguments.
Row = tuple[Tensor, dict[str, Any]]


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
        ValueError: tokens of another shape or dtype, or a layer with nothing to quantize.

    Memory: the activations of the text between two layers, and one layer's Hessians.
    """
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
        raise ValueError(
            f"gptq_: expected int64 tokens of shape [B, T], got {tokens.dtype} {list(tokens.shape)}"
        )
    from tqdm.auto import tqdm

    training = model.training
    model.eval()
    layers = model.get_decoder().layers  # type: ignore[operator]
    rows = _inputs_of(layers[0], model, tokens)
    bar = tqdm(layers, desc="gptq", unit="layer", disable=not progress)
    for layer in bar:
        linears = {n: m for n, m in layer.named_modules() if type(m) is nn.Linear}
        if not linears:
            raise ValueError("gptq_: expected nn.Linear in every decoder layer, found none")
        with _second_moments(linears) as moments:
            exact = [_output(layer, row) for row in rows]
        for name, linear in linears.items():
            weight = gptq(
                linear.weight, moments[name], format, group_size=group_size, activation=activation,
                damping=damping, act_order=act_order,
            )  # fmt: skip
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, QuantizedLinear(weight, linear.bias))
        rounded = [_output(layer, row) for row in rows]
        error = sum(float((a - b).square().sum()) for a, b in zip(exact, rounded, strict=True))
        change = sum(float((a - x).square().sum()) for a, (x, _) in zip(exact, rows, strict=True))
        bar.set_postfix_str(f"error {100 * error / max(change, 1e-30):.2g} %")
        rows = [(x, row[1]) for x, row in zip(rounded, rows, strict=True)]
    model.train(training)
    return model


def _output(layer: nn.Module, row: Row) -> Tensor:
    result = layer(row[0], **row[1])
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


class _Caught(Exception):
    """Ends a forward pass once its first layer has been reached."""


def _inputs_of(layer: nn.Module, model: nn.Module, tokens: Tensor) -> list[Row]:
    rows: list[Row] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        rows.append((args[0], kwargs))
        raise _Caught

    handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for row in tokens:
            try:
                model(row[None], use_cache=False)
            except _Caught:
                continue
    finally:
        handle.remove()
    return rows


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
