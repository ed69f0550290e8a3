"""One loop: sample, accumulate, step, show progress, survive an interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastweights.data.text import windows
from fastweights.optim.adam import AdamW8bit
from fastweights.training.checkpoint import restore, store
from fastweights.training.interrupt import undivided
from fastweights.training.precision import autocast, resolve_precision

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adamw8bit": AdamW8bit,
}

# Learning rate: linear warm-up over this many steps, then a cosine down to a twentieth.
_WARM_UP = 5
_FINAL_RATE = 0.05
# Steps that are timed to turn minutes into a number of steps, after a first one that is slower.
_TIMED_STEPS = 3


@dataclass
class TrainingLog:
    """What a training did.

    Attributes:
        losses: mean loss of every step, resumed ones included.
        held_out: what `evaluate` returned, by the number of steps before it.
        steps: steps of the whole schedule.
        tokens: tokens seen by this call.
        seconds: time of this call.
        evaluation_seconds: the part of it that `evaluate` took.
        interrupted: Ctrl-C ended it early; the parameters are those of the last whole step.
    """

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Of this call, evaluations left out."""
        seconds = self.seconds - self.evaluation_seconds
        return self.tokens / seconds if seconds > 0 else 0.0


def train(
    loss_and_backward: Callable[[Tensor, float], float],
    parameters: dict[str, nn.Parameter],
    tokens: Tensor,
    *,
    lr: float | dict[str, float],
    steps: int | None,
    minutes: float | None,
    length: int | Sequence[int],
    batch_size: int = 1,
    accumulation: int = 1,
    clip: float | None = None,
    optimizer: str = "adamw",
    evaluate: Callable[[], float] | None = None,
    evaluate_every: int = 50,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 50,
    identity: Mapping[str, Any] | None = None,
    precision: str = "auto",
    name: str = "train",
    progress: bool = True,
) -> TrainingLog:
    """AdamW over windows of one token stream.

    Step s of a seed always sees the same windows and random numbers, so that a resumed training
    equals an uninterrupted one bit for bit. Torch's own generator is left as it was.

    Args:
        loss_and_backward: called with a batch `[B, T + 1]` (inputs and, shifted by one, targets)
            and a factor for the gradient; runs the backward and returns the loss.
        parameters: what is trained, by name. Their `requires_grad` is set for the call.
        tokens: `[N]`, the text.
        lr: peak learning rate, or one for every parameter's name.
        steps: optimizer steps. Exactly one of `steps` and `minutes` is given.
        minutes: time budget; the first steps are timed to choose the number of steps.
        length: tokens T of a window; of several, step s takes the s-th in turn.
        batch_size: windows of one forward pass.
        accumulation: forward passes of one step.
        clip: largest norm of the gradient.
        optimizer: "adamw", or "adamw8bit", whose states take a quarter.
        evaluate: returns a loss that is shown and kept: called before the first step, every
            `evaluate_every` steps and after the last.
        evaluate_every: see `evaluate`.
        seed: of the windows, and of what a step draws at random.
        checkpoint: safetensors file with parameters, optimizer and progress; resumed from if it
            exists, written every `checkpoint_every` steps, at an interruption and at the end.
        checkpoint_every: see `checkpoint`.
        identity: what else a checkpoint must agree on to be resumed from: plain values.
        precision: "float32", "bfloat16" (autocast), or "auto": what this machine is faster in, or
            what the checkpoint was begun in.
        name: shown on the progress bar and checked against the checkpoint.
        progress: show a bar with loss and tokens per second.

    Raises:
        ValueError: an argument is out of range, or the checkpoint belongs to another training.
    """
    lengths = [length] if isinstance(length, int) else list(length)
    _check(tokens, lengths, steps, minutes, name)
    rates = lr if isinstance(lr, dict) else dict.fromkeys(parameters, lr)
    _check_positive(
        name, lr=min(rates.values(), default=None), clip=clip, steps=steps, minutes=minutes,
        batch_size=batch_size, accumulation=accumulation, evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
    )  # fmt: skip
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"{name}: expected optimizer in {list(OPTIMIZERS)}, got {optimizer!r}")
    required = {key: parameter.requires_grad for key, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    groups: dict[float, list[nn.Parameter]] = {}
    for key, parameter in parameters.items():
        groups.setdefault(rates[key], []).append(parameter)
    descent = OPTIMIZERS[optimizer](
        [{"params": group, "lr": rate, "peak": rate} for rate, group in groups.items()],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    log = TrainingLog(steps=steps or 0)
    settings = {
        "name": name,
        "seed": seed,
        "lengths": lengths,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "parameters": len(parameters),
        "precision": resolve_precision(precision),
        **(identity or {}),
    }
    if checkpoint is not None and Path(checkpoint).exists():
        free = {"precision"} if precision == "auto" else set()
        log.losses, log.held_out, log.steps = restore(
            Path(checkpoint), parameters, descent, settings, steps, free
        )

    started = warm = time.perf_counter()
    bar = _bar(name, log, progress)

    def keep() -> None:
        if checkpoint is not None and log.steps:
            store(
                Path(checkpoint), parameters, descent, settings,
                log.losses, log.held_out, log.steps,
            )  # fmt: skip

    def look(step: int) -> None:
        due = step % evaluate_every == 0 or step == log.steps
        if evaluate is None or not due or step in log.held_out:
            return
        began = time.perf_counter()
        with autocast(str(settings["precision"])):
            log.held_out[step] = evaluate()
        log.evaluation_seconds += time.perf_counter() - began

    try:
        step = len(log.losses)
        first = step
        look(step)
        while log.steps == 0 or step < log.steps:
            if log.steps == 0 and step - first == 1:
                warm = time.perf_counter()
            if log.steps == 0 and step - first == 1 + _TIMED_STEPS:
                now = time.perf_counter()
                left = 60 * float(minutes or 0) - (now - started)
                seconds = (now - warm) / _TIMED_STEPS + log.evaluation_seconds / evaluate_every
                log.steps = step + max(1, int(left / seconds))
                bar.total = log.steps
            for group in descent.param_groups:
                group["lr"] = group["peak"] * _rate(step, log.steps)
            loss = 0.0
            for part in range(accumulation):
                draw = window_seed(seed, step, part)
                batch = windows(tokens, lengths[step % len(lengths)] + 1, batch_size, seed=draw)
                with torch.random.fork_rng(devices=[]), autocast(str(settings["precision"])):
                    torch.manual_seed(draw)
                    loss += loss_and_backward(batch, 1 / accumulation) / accumulation
                log.tokens += batch.shape[0] * (batch.shape[1] - 1)
            if not math.isfinite(loss):
                raise ValueError(
                    f"{name}: the loss of step {step} is {loss}; expected a smaller learning rate"
                )
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters.values(), clip)
            with undivided():  # parameters, their states and the count of steps belong together
                descent.step()
                descent.zero_grad(set_to_none=True)
                log.losses.append(loss)
                step += 1
            log.seconds = time.perf_counter() - started
            bar.set_postfix_str(_status(log))
            bar.update()
            look(step)
            if step % checkpoint_every == 0 or step == log.steps:
                keep()
    except KeyboardInterrupt:
        log.interrupted = True
        keep()
    finally:
        bar.close()
        for key, parameter in parameters.items():
            parameter.requires_grad_(required[key])
            parameter.grad = None
    log.seconds = time.perf_counter() - started
    return log


def _check_positive(name: str, **values: float | None) -> None:
    for argument, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name}: expected {argument} > 0, got {value}")


def _check(
    tokens: Tensor, lengths: list[int], steps: int | None, minutes: float | None, name: str
) -> None:
    if (steps is None) == (minutes is None):
        raise ValueError(
            f"{name}: expected either steps or minutes, got steps={steps}, minutes={minutes}"
        )
    if not lengths or min(lengths) < 2:
        raise ValueError(f"{name}: expected length >= 2, got {lengths}")
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(
            f"{name}: expected int64 tokens of shape [N], got {tokens.dtype} {list(tokens.shape)}"
        )
    if len(tokens) <= max(lengths):
        raise ValueError(
            f"{name}: expected more than {max(lengths)} tokens (one window and a target), "
            f"got {len(tokens)}"
        )


def window_seed(seed: int, step: int, part: int) -> int:
    """What the windows of forward pass `part` of a step depend on."""
    return ((seed * 1_000_003 + step) * 1009 + part) % 2**63


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate; `steps` is 0 while it is unknown."""
    warm = min(1.0, (step + 1) / _WARM_UP)
    if steps == 0:
        return warm
    return warm * (_FINAL_RATE + (1 - _FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _status(log: TrainingLog) -> str:
    recent = list(islice(reversed(log.losses), 10))
    parts = [f"loss {sum(recent) / len(recent):.4g}"]
    if log.held_out:
        parts.append(f"held-out {log.held_out[max(log.held_out)]:.4g}")
    return ", ".join([*parts, f"{log.tokens_per_second:.0f} tokens/s"])


def _bar(name: str, log: TrainingLog, progress: bool):  # type: ignore[no-untyped-def]
    from tqdm.auto import tqdm

    return tqdm(
        total=log.steps or None,
        initial=len(log.losses),
        desc=name,
        unit="step",
        disable=not progress,
    )
