"""Softmax mimicry: attention weights as matrices, and the loss that makes one imitate the other.

This is the quadratic path, for training a feature map on sequences of a few hundred tokens; what it
trains runs on the linear one.
"""

import math

import torch
from torch import Tensor

__all__ = ["linear_attention_weights", "mimicry_loss", "softmax_attention_weights"]


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def softmax_attention_weights(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Weights p_ij ∝ exp(scale·q_i·k_j), j ≤ i, of causal softmax attention.

    Args:
        q: Queries `[B, T, H, K]`.
        k: Keys `[B, T, H, K]`.
        scale: Default K^-½.

    Returns:
        `[B, H, T, T]`; rows sum to 1.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * torch.einsum("bihk,bjhk->bhij", q, k)
    return logits.masked_fill(~_causal(q.shape[1], q.device), -math.inf).softmax(dim=-1)


def linear_attention_weights(qf: Tensor, kf: Tensor, eps: float = 1e-6) -> Tensor:
    """Weights a_ij = φ(q_i)·φ(k_j) / (Σ_{j' ≤ i} φ(q_i)·φ(k_j') + eps), j ≤ i.

    Args:
        qf: Features of the queries `[B, T, H, F]`.
        kf: Features of the keys `[B, T, H, F]`.
        eps: Added to the denominator.

    Returns:
        `[B, H, T, T]`. `a @ v` is `linear_attention(qf, kf, v, scale=1, normalize=True)`.
    """
    products = torch.einsum("bihf,bjhf->bhij", qf, kf)
    products = products.masked_fill(~_causal(qf.shape[1], qf.device), 0)
    return products / (products.sum(dim=-1, keepdim=True) + eps)


def mimicry_loss(p: Tensor, a: Tensor) -> Tensor:
    """The cross-entropy -mean_i Σ_j p_ij log max(a_ij, 1e-12) of Hedgehog (arXiv:2402.04347).

    Args:
        p: Weights of the teacher, `[..., T, T]`; no gradient reaches them.
        a: Weights of the student, `[..., T, T]`.

    Returns:
        A scalar, at least the mean entropy of p's rows.
    """
    return -(p.detach() * a.clamp(min=1e-12).log()).sum(dim=-1).mean()
