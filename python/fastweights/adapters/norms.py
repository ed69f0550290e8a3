"""How large queries and keys are, with adapters: what decides whether attention is of low rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastweights._tables import markdown_table
from fastweights.adapters.activate import disabled
from fastweights.adapters.rules import paths
from fastweights.quantization.samples import read_samples

__all__ = ["AttentionNorms", "NormReport", "lora_norm_report", "polynomial_attention"]

_QUERIES = ("q_proj", "query", "to_q", "q")
_KEYS = ("k_proj", "key", "to_k", "k")


@dataclass(frozen=True)
class AttentionNorms:
    """The projections of one attention on one batch, X being their input.

    Attributes:
        path: of the attention.
        query: max |X W_q| without adapters.
        adapted_query: the same with them.
        query_update: max of what they change of it.
        key: max |X W_k| without adapters.
        adapted_key: the same with them.
        key_update: max of what they change of it.
        tokens: T.
        ratio: the larger of `adapted_query` and `adapted_key` over √(ln T).
        logits: the least and the largest q·k / √d, before positions turn q and k.
    """

    path: str
    query: float
    adapted_query: float
    query_update: float
    key: float
    adapted_key: float
    key_update: float
    tokens: int
    ratio: float
    logits: tuple[float, float]


@dataclass(frozen=True)
class NormReport:
    """The attentions of a model; printed as a table.

    Attributes:
        layers: in module order.
    """

    layers: tuple[AttentionNorms, ...]

    def __iter__(self) -> Iterator[AttentionNorms]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        heads = ("attention", "query", "adapted", "update", "key", "adapted", "update", "ratio")
        rows = []
        for n in self.layers:
            sizes = (n.query, n.adapted_query, n.query_update, n.key, n.adapted_key, n.key_update)
            low, high = n.logits
            rows.append(
                (n.path, *(f"{x:.3g}" for x in (*sizes, n.ratio)), f"{low:.3g}..{high:.3g}")
            )
        return markdown_table((*heads, "logits"), rows)


@torch.no_grad()
def lora_norm_report(
    model: nn.Module,
    batch: Any,
    *,
    query: str | Sequence[str] = _QUERIES,
    key: str | Sequence[str] = _KEYS,
    head_dim: int | None = None,
) -> NormReport:
    """The sizes on which it depends whether LoRA's gradients can be approximated fast.

    Softmax attention over T tokens, and with it the gradients of adapters on its projections, have
    approximations in almost linear time if the entries of X W_q and X W_k, adapters included, are
    o(√(log T)); above that there are none, unless the strong exponential time hypothesis fails
    (Hu et al. 2024, arXiv:2406.03136). The constants are not known: the ratio tells one layer,
    length or checkpoint from another.

    Args:
        model: with adapters or not, in which an attention has a query and a key projection.
        batch: arguments of one forward pass: a tensor, a tuple or a mapping.
        query: last names of query projections.
        key: last names of key projections, beside them.
        head_dim: of a head; None: the attention's own `head_dim`, or what the heads in the model's
            configuration make of it.

    Raises:
        ValueError: there is no such pair of projections, or no `head_dim`.

    Example:
        >>> import torch
        >>> from fastweights.adapters import lora_norm_report
        >>> class Attention(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.q, self.k = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        ...     def forward(self, x):
        ...         return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ x
        >>> (norms,) = lora_norm_report(Attention(), torch.ones(1, 5, 8), head_dim=8)
        >>> norms.tokens
        5
    """
    pairs = _pairs(model, query, key)
    if not pairs:
        raise ValueError(
            f"lora_norm_report: expected projections {query} and {key} side by side in "
            f"{type(model).__name__}, found none"
        )
    widths = {path: head_dim or _head_dim(model, path) for path in pairs}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(path: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            with disabled(module):
                seen[path] = output, module.forward(*args)

        return after

    handles = [
        model.get_submodule(path).register_forward_hook(note(path))
        for pair in pairs.values()
        for path in pair
    ]
    try:
        (sample,) = read_samples([batch], function="lora_norm_report")
        sample.run(model)
    finally:
        for handle in handles:
            handle.remove()
    rows = [_norms(path, *seen[q], *seen[k], widths[path]) for path, (q, k) in pairs.items()]
    return NormReport(tuple(rows))


def _pairs(
    model: nn.Module, query: str | Sequence[str], key: str | Sequence[str]
) -> dict[str, tuple[str, str]]:
    queries, keys = ((n,) if isinstance(n, str) else tuple(n) for n in (query, key))
    known = dict(paths(model))
    pairs: dict[str, tuple[str, str]] = {}
    for path in known:
        parent, _, name = path.rpartition(".")
        start = f"{parent}." if parent else ""
        if name in queries:
            other = next((start + k for k in keys if start + k in known), None)
            if other is not None:
                pairs.setdefault(parent, (path, other))
    return pairs


def _head_dim(model: nn.Module, path: str) -> int:
    attention = model.get_submodule(path)
    for owner, name in ((attention, "head_dim"), (attention, "attention_head_size")):
        if isinstance(getattr(owner, name, None), int):
            return int(getattr(owner, name))
    config: Any = getattr(model, "config", None)
    if hasattr(config, "hidden_size") and hasattr(config, "num_attention_heads"):
        return int(config.hidden_size // config.num_attention_heads)
    raise ValueError(f"lora_norm_report: expected head_dim, which {path or 'the model'} has not")


def _norms(path: str, q: Tensor, q0: Tensor, k: Tensor, k0: Tensor, width: int) -> AttentionNorms:
    q, q0, k, k0 = (t.double().reshape(-1, *t.shape[-2:]) for t in (q, q0, k, k0))
    tokens = q.shape[1]
    by_head = [t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k)]
    shared = by_head[0].shape[1] // by_head[1].shape[1]
    low, high = math.inf, -math.inf
    for head in range(by_head[0].shape[1]):
        logits = by_head[0][:, head] @ by_head[1][:, head // shared].mT / math.sqrt(width)
        low, high = min(low, float(logits.min())), max(high, float(logits.max()))
    largest = {"query": q0, "adapted_query": q, "query_update": q - q0}
    largest |= {"key": k0, "adapted_key": k, "key_update": k - k0}
    sizes = {name: float(t.abs().max()) for name, t in largest.items()}
    threshold = math.sqrt(math.log(tokens)) if tokens > 1 else math.nan
    ratio = max(sizes["adapted_query"], sizes["adapted_key"]) / threshold
    return AttentionNorms(path=path, tokens=tokens, ratio=ratio, logits=(low, high), **sizes)


def polynomial_attention(
    q: Tensor, k: Tensor, v: Tensor, degree: int, *, bound: float | None = None
) -> Tensor:
    """Attention with a polynomial in place of exp, and so of a rank that T does not enter.

    The polynomial interpolates exp in Chebyshev's points between ±bound. As a product of features
    of q and k it has rank C(d + degree, degree); here it is applied to the logits, to see its
    error: small while the degree exceeds the bound, and large soon after.

    Args:
        q: ``[..., T, d]``.
        k: ``[..., T, d]``.
        v: ``[..., T, dv]``.
        degree: of the polynomial.
        bound: of the logits q·k / √d; None: their largest absolute value.

    Returns:
        ``[..., T, dv]``; without a causal mask.

    Raises:
        ValueError: a negative degree, or a bound that is not positive.

    Example:
        >>> import torch
        >>> from fastweights.adapters.norms import polynomial_attention
        >>> q, k, v = torch.randn(3, 32, 8, generator=torch.Generator().manual_seed(0))
        >>> exact = torch.softmax(q @ k.T / 8**0.5, -1) @ v
        >>> bool((polynomial_attention(q, k, v, 12) - exact).abs().max() < 1e-3)
        True
    """
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    bound = float(logits.abs().max()) if bound is None else bound
    if degree < 0 or bound <= 0:
        raise ValueError(
            f"polynomial_attention: expected degree >= 0 and bound > 0, got {degree} and {bound}"
        )
    interpolate: Any = np.polynomial.chebyshev.chebinterpolate
    x, weights = logits / bound, torch.zeros_like(logits)
    before, now = torch.ones_like(x), x
    for i, coefficient in enumerate(interpolate(lambda x: np.exp(bound * x), degree)):
        weights = weights + float(coefficient) * before
        if i < degree:
            before, now = now, 2 * x * now - before
    return weights @ v / weights.sum(-1, keepdim=True)
