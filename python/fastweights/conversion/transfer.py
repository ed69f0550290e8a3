"""Stage one: the new attentions learn to give what the softmax attentions give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastweights.adapters.activate import disabled
from fastweights.conversion.attention import linearized_layers
from fastweights.training.causal_lm import decoder
from fastweights.training.loop import TrainingLog, train

# Reported as the papers do: a thousand times the mean squared error, the mean over layers.
_LOSS_SCALE = 1000.0


def transfer_attention(
    model: nn.Module,
    tokens: Tensor,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    length: int | Sequence[int] = 512,
    batch_size: int = 1,
    accumulation: int = 1,
    lr: float = 1e-2,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    precision: str = "auto",
    progress: bool = True,
) -> TrainingLog:
    """Attention transfer (LoLCATs, 2024, eq. 9): the new attentions imitate the softmax ones.

    Minimises 1000 · mean over layers of MSE(ours, softmax) of the heads' outputs. Every converted
    layer returns its softmax output, so that deeper layers see what the original model sees, and
    the layers learn independently: one forward pass without gradients, a small backward inside
    each attention, no output layer. Only the parameters that `linearize` added are trained.

    Args:
        model: converted by `linearize`.
        tokens: `[N]` int64, the text to train on.
        steps: optimizer steps, or `minutes` of time; exactly one of the two.
        minutes: see `steps`.
        length: tokens of a sequence; several are taken in turn.
        batch_size: sequences of one forward pass.
        accumulation: forward passes of one step.
        lr: peak learning rate of AdamW.
        seed: of the choice of sequences.
        checkpoint: file to resume from and to write, see `fastweights.training.train`.
        precision: "auto", "float32" or "bfloat16", see `fastweights.training.train`.
        progress: show a bar with loss and tokens per second.

    Returns:
        The losses and what they cost. Ctrl-C ends it cleanly with `interrupted` set.

    Raises:
        ValueError: the model is not converted, or an argument is out of range.
    """
    layers = linearized_layers(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = {names[id(p)]: p for layer in layers for p in layer.own_parameters()}
    losses: list[float] = []
    factor = 1.0

    def learn(ours: Tensor, softmax: Tensor) -> None:
        loss = F.mse_loss(ours.float(), softmax.float())
        (loss * (_LOSS_SCALE * factor / len(layers))).backward()
        losses.append(loss.item())

    def loss_and_backward(batch: Tensor, weight: float) -> float:
        nonlocal factor
        factor = weight
        losses.clear()
        with torch.no_grad():
            decoder(model)(input_ids=batch[:, :-1], use_cache=False)
        return _LOSS_SCALE * sum(losses) / len(losses)

    with original_attention(model), frozen(model):
        for layer in layers:
            layer.on_transfer = learn
        try:
            return train(
                loss_and_backward, parameters, tokens, lr=lr, steps=steps, minutes=minutes,
                length=length, batch_size=batch_size, accumulation=accumulation, seed=seed,
                checkpoint=checkpoint, precision=precision, name="transfer", progress=progress,
            )  # fmt: skip
        finally:
            for layer in layers:
                layer.on_transfer = None


@contextmanager
def original_attention(model: nn.Module) -> Iterator[None]:
    """Within the context `model` computes as before its conversion: softmax attention, no LoRA."""
    layers = linearized_layers(model)
    for layer in layers:
        layer.original = True
    try:
        with disabled(model):
            yield
    finally:
        for layer in layers:
            layer.original = False


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the context no parameter requires gradients and dropout is off."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter, before in required:
            parameter.requires_grad_(before)
