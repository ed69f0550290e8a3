"""Fine-tuning of causal language models on text: whatever of a model requires gradients."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from fastweights.adapters.lora_plus import lora_plus_groups
from fastweights.adapters.protocol import adapter_configs
from fastweights.ops.quantization.layers import QuantizedLinear
from fastweights.training.causal_lm import next_token_loss, plain_output
from fastweights.training.loop import TrainingLog, train

# Held-out windows: enough to see a training go wrong, and no more than three steps' time.
_HELD_OUT = 8


def finetune(
    model: nn.Module,
    tokens: Tensor,
    *,
    held_out: Tensor | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    length: int | Sequence[int] = 512,
    batch_size: int = 1,
    accumulation: int = 1,
    lr: float = 5e-4,
    ratio: float = 1.0,
    optimizer: str = "adamw",
    evaluate_every: int = 50,
    recompute: bool = False,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    precision: str = "auto",
    progress: bool = True,
) -> TrainingLog:
    """Trains what of a model requires gradients to predict the next token of a text.

    After `fastweights.adapt` that is the adapter, over a float or a quantized model (QLoRA,
    Dettmers et al. 2023, arXiv:2305.14314); on a bare model it is all of it. Logits exist for 128
    positions at a time.

    Args:
        model: a Hugging Face causal language model.
        tokens: `[N]` int64, the text to train on.
        held_out: `[M]` int64, a text of which up to eight sequences are predicted before, during
            and after the training; their mean loss is in `TrainingLog.held_out`.
        steps: optimizer steps, or `minutes` of time; exactly one of the two.
        minutes: see `steps`.
        length: tokens of a sequence; several are taken in turn.
        batch_size: sequences of one forward pass.
        accumulation: forward passes of one step.
        lr: peak learning rate, after five steps; a cosine takes it to a twentieth.
        ratio: of the rate of B to that of A (LoRA+), see `fastweights.adapters.lora_plus_groups`.
        optimizer: "adamw", or "adamw8bit", whose states take a quarter of the memory.
        evaluate_every: steps between two looks at `held_out`.
        recompute: keep the inputs of the model's layers alone and compute the rest again in the
            backward: less memory for a third more time.
        seed: of the choice of sequences and of dropout.
        checkpoint: file to resume from and to write, see `fastweights.training.train`. Text,
            adapters, optimizer and formats of the weights must be those that it was begun with.
        precision: "auto", "float32" or "bfloat16", see `fastweights.training.train`.
        progress: show a bar with losses and tokens per second.

    Returns:
        The losses and what they cost. Ctrl-C ends it cleanly with `interrupted` set.

    Raises:
        ValueError: nothing requires gradients, or an argument is out of range.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "finetune: expected a model with something to train, such as after fastweights.adapt"
        )
    rates = dict.fromkeys(parameters, lr)
    if ratio != 1:
        groups = lora_plus_groups(model, lr, ratio, embedding_lr=lr)
        of = {id(p): group["lr"] for group in groups for p in group["params"]}
        rates = {name: of[id(p)] for name, p in parameters.items()}
    longest = length if isinstance(length, int) else max(length, default=0)
    if held_out is not None and len(held_out) <= longest:
        raise ValueError(
            f"finetune: expected more than {longest} held-out tokens (one sequence and a target), "
            f"got {len(held_out)}"
        )
    with _mode(model, training=False):
        plain = plain_output(model)

    @torch.no_grad()
    def evaluate() -> float:
        assert held_out is not None
        starts = range(0, len(held_out) - longest, longest)[:_HELD_OUT]
        with _mode(model, training=False):
            rows = (held_out[None, start : start + longest + 1] for start in starts)
            return sum(next_token_loss(model, row, plain=plain) for row in rows) / len(starts)

    with _mode(model, training=True), _recomputing(model, recompute):
        return train(
            lambda batch, weight: next_token_loss(model, batch, weight=weight, plain=plain),
            parameters, tokens, lr=rates, steps=steps, minutes=minutes, length=length,
            batch_size=batch_size, accumulation=accumulation, clip=1.0, optimizer=optimizer,
            evaluate=None if held_out is None else evaluate, evaluate_every=evaluate_every,
            seed=seed, checkpoint=checkpoint,
            identity=_identity(model, tokens) | {"optimizer": optimizer, "lr": lr, "ratio": ratio},
            precision=precision, name="finetune", progress=progress,
        )  # fmt: skip


def _identity(model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    return {
        "text": zlib.crc32(tokens.cpu().numpy().tobytes()),
        "adapters": {name: repr(config) for name, config in adapter_configs(model).items()},
        "formats": sorted(
            {f"{layer.format} in {layer.group_size}" for layer in layers}
            | {str(p.dtype) for p in model.parameters() if not p.requires_grad}
        ),
    }


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Within the context all of a model is in training or in evaluation mode."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def _recomputing(model: nn.Module, recompute: bool) -> Iterator[None]:
    """Within the context the model's layers keep their inputs alone for the backward.

    transformers' own switch would also make the embedding's output require a gradient for good.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if recompute and not layers:
        raise ValueError(
            f"finetune: expected recompute=False for {type(model).__name__}, whose layers "
            "transformers cannot compute again"
        )
    before = [layer.gradient_checkpointing for layer in layers]
    for layer in layers if recompute else ():
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(recomputed, use_reentrant=False)
    try:
        yield
    finally:
        for layer, switched in zip(layers, before, strict=True):
            layer.gradient_checkpointing = switched
