"""What trainings of causal language models share: next-token losses in little memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Positions whose logits exist at one time.
_CHUNK = 128
# Tokens on which a model is asked what it does to its logits.
_PROBE = 4


def decoder(model: Any) -> Any:
    """The part of a causal language model before its output layer."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def hidden_states(model: Any, inputs: Tensor) -> Tensor:
    """What the output layer of a model meets, `[B · T, D]`, for tokens `[B, T]`."""
    output = decoder(model)(input_ids=inputs, use_cache=False)
    hidden: Tensor = output.last_hidden_state.flatten(0, 1)
    return hidden


def output_loss(
    model: Any,
    hidden: Tensor,
    targets: Tensor,
    *,
    weight: float = 1.0,
    teacher: Tensor | None = None,
    distill: float = 0.0,
) -> float:
    """The mean loss of the output layer over `hidden` `[N, D]`, and its backward if there is one.

    Logits exist for 128 positions at a time; the backward through the rest of the model runs once.

    Args:
        model: whose output embedding is used.
        hidden: with or without a gradient to compute.
        targets: `[N]` tokens.
        weight: factor of the gradient.
        teacher: `[N, D]`, hidden states of the distribution to imitate.
        distill: share of the loss that is the cross-entropy with it.
    """
    head = model.get_output_embeddings()
    gradient, total = torch.empty_like(hidden), 0.0
    for start in range(0, len(hidden), _CHUNK):
        part = slice(start, start + _CHUNK)
        x = hidden.detach()[part].requires_grad_(hidden.requires_grad)
        logits = head(x)
        with torch.no_grad():
            log_p = logits.float().log_softmax(-1)
            places = targets[part, None]
            total -= (1 - distill) * log_p.gather(1, places).sum().item()
            slope = -(1 - distill) * torch.ones_like(places, dtype=log_p.dtype)
            expected = None
            if teacher is not None:
                expected = head(teacher[part]).float().softmax(-1)
                total -= distill * torch.linalg.vecdot(expected, log_p).sum().item()
            if not logits.requires_grad:
                continue
            # The gradient of a cross-entropy is the difference of the distributions.
            slopes = log_p.exp_().scatter_add_(1, places, slope)
            if expected is not None:
                slopes.sub_(expected, alpha=distill)
            slopes *= weight / len(hidden)
        logits.backward(slopes.to(logits.dtype))  # into the output layer's own parameters, too
        if x.grad is not None:
            gradient[part] = x.grad
    if hidden.requires_grad:
        hidden.backward(gradient)
    return total / len(hidden)


def next_token_loss(model: Any, batch: Tensor, *, weight: float = 1.0, plain: bool = True) -> float:
    """The mean loss of `batch` `[B, T + 1]`, and its backward if there is one.

    Args:
        model: a causal language model.
        batch: tokens; each but the first is predicted.
        weight: factor of the gradient.
        plain: see `plain_output`.
    """
    inputs, targets = batch[:, :-1], batch[:, 1:].flatten()
    if plain:
        return output_loss(model, hidden_states(model, inputs), targets, weight=weight)
    logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
    loss = F.cross_entropy(logits.float(), targets)
    if loss.requires_grad:
        (loss * weight).backward()
    return loss.item()


@torch.no_grad()
def plain_output(model: Any) -> bool:
    """Whether logits are what the output layer gives; some models scale or bend them."""
    tokens = torch.arange(_PROBE, device=model.device)[None] % model.config.vocab_size
    head = model.get_output_embeddings()
    ours = head(hidden_states(model, tokens))
    logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    return ours.shape == logits.shape and torch.allclose(ours, logits, rtol=1e-5, atol=1e-5)
