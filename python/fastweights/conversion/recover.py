"""Stage two: LoRA on the attention's projections makes up for what the transfer could not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastweights import adapters
from fastweights.adapters import LoRA, adapt, adapter_layers, adapter_names
from fastweights.conversion.attention import LinearizedAttention
from fastweights.conversion.transfer import frozen, original_attention
from fastweights.training.causal_lm import hidden_states, output_loss
from fastweights.training.loop import TrainingLog, train

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def recover(
    model: nn.Module,
    tokens: Tensor,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    length: int | Sequence[int] = 512,
    batch_size: int = 1,
    accumulation: int = 1,
    lr: float = 1e-3,
    rank: int = 8,
    alpha: float = 16.0,
    distill: float = 0.0,
    merge: bool = True,
    seed: int = 1,
    checkpoint: str | Path | None = None,
    precision: str = "auto",
    progress: bool = True,
) -> TrainingLog:
    """Trains LoRA on q, k, v and o, and the parameters that `linearize` added, on text.

    Also works on a model that was not converted, as a control of what the text alone teaches.

    Args:
        model: a causal language model, usually after `transfer_attention`.
        tokens: `[N]` int64, the text to train on.
        steps: optimizer steps, or `minutes` of time; exactly one of the two.
        minutes: see `steps`.
        length: tokens of a sequence; several are taken in turn.
        batch_size: sequences of one forward pass.
        accumulation: forward passes of one step.
        lr: peak learning rate of AdamW.
        rank: of LoRA.
        alpha: of LoRA; its scale is alpha / rank.
        distill: share of the loss that is the cross-entropy with the original model's distribution
            instead of the next token. The original is the model itself with its softmax attention
            and without LoRA: no second model.
        merge: put the adapters into the weights afterwards; otherwise they stay on the model.
        seed: of the initial LoRA weights and the choice of sequences.
        checkpoint: file to resume from and to write, see `fastweights.training.train`.
        precision: "auto", "float32" or "bfloat16", see `fastweights.training.train`.
        progress: show a bar with loss and tokens per second.

    Returns:
        The losses (of what is trained on) and what they cost. Ctrl-C ends it cleanly with
        `interrupted` set.

    Raises:
        ValueError: an argument is out of range, or `merge` over quantized weights.
    """
    if not 0 <= distill <= 1:
        raise ValueError(f"recover: expected 0 <= distill <= 1, got {distill}")
    if not adapter_names(model):
        lora = LoRA(rank=rank, alpha=alpha, targets=_TARGETS)
        with torch.random.fork_rng(devices=[]), frozen(model):
            torch.manual_seed(seed)
            adapt(model, lora)
    layers = list(adapter_layers(model))
    if merge:
        for layer in layers:
            layer.check_merge(layer.active, quantized=False)
    trained = {
        id(p) for layer in layers for name in layer.active for p in layer.own_parameters(name)
    }
    for module in model.modules():
        if isinstance(module, LinearizedAttention):
            trained.update(map(id, module.own_parameters()))
    parameters = {name: p for name, p in model.named_parameters() if id(p) in trained}

    def loss_and_backward(batch: Tensor, weight: float) -> float:
        inputs, targets = batch[:, :-1], batch[:, 1:].flatten()
        teacher = None
        if distill:
            with torch.no_grad(), original_attention(model):
                teacher = hidden_states(model, inputs)
        hidden = hidden_states(model, inputs)
        return output_loss(model, hidden, targets, weight=weight, teacher=teacher, distill=distill)

    with frozen(model):
        log = train(
            loss_and_backward, parameters, tokens, lr=lr, steps=steps, minutes=minutes,
            length=length, batch_size=batch_size, accumulation=accumulation, clip=1.0, seed=seed,
            checkpoint=checkpoint, precision=precision, name="recover", progress=progress,
        )  # fmt: skip
    if merge:
        adapters.merge(model)
    return log
