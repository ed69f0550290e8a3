"""Exchanging softmax attentions for linear ones, in place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from fastweights.conversion.attention import LinearizedAttention
from fastweights.conversion.recipes import Recipe, recipe_named

Model = TypeVar("Model", bound=nn.Module)

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
# Largest relative difference between an attention and ours on the same input in its dtype: a few
# roundings.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def linearize(
    model: Model,
    recipe: str | Recipe = "stable",
    *,
    window: int | None = None,
    feature_dim: int | None = None,
    keep_softmax: Iterable[int] = (),
) -> Model:
    """Makes the attention of a pretrained decoder linear in its context, in place.

    Every Llama-type attention (Llama, SmolLM, Mistral, Qwen2, Qwen3, found by structure and checked
    on a probe input) becomes a `LinearizedAttention` on the same projections. The new parameters
    start untrained: follow with `transfer_attention` and `recover`. The model stays a Hugging Face
    model: `generate`, `Trainer` and `save_pretrained` work as before, and `fastweights.load` opens
    what was saved.

    Args:
        model: a Hugging Face causal language model.
        recipe: "stable" (window and linear attention on unrotated features with trained decays;
            does not drift beyond its training length), "lolcats" (as published), "hedgehog" (as
            published, no window), or a `Recipe`.
        window: latest tokens under exact softmax attention; None leaves the recipe's (64).
        feature_dim: columns of the feature matrices; None leaves the recipe's (64, twice as many
            features).
        keep_softmax: indices of layers that stay as they are; their cost keeps growing with the
            context.

    Returns:
        `model`.

    Raises:
        ValueError: the architecture is not supported, or an argument is out of range.

    Papers: LoLCATs (2024), eq. 5-8; Hedgehog (2024), eq. 6.
    """
    base = recipe_named(recipe) if isinstance(recipe, str) else recipe
    base = replace(
        base,
        window=base.window if window is None else window,
        feature_dim=base.feature_dim if feature_dim is None else feature_dim,
    )
    kept = set(keep_softmax)
    sites = _attention_sites(model)
    indices = {attention.layer_idx for _, _, attention in sites}
    if not kept <= indices:
        raise ValueError(
            f"linearize: expected keep_softmax within layers 0 to {max(indices)}, "
            f"got {sorted(kept - indices)}"
        )
    if kept >= indices:
        raise ValueError(
            "linearize: expected at least one layer to convert, got all of them in keep_softmax"
        )
    _check_same_attention(model, sites[0][2])
    return convert(model, base, kept)


def convert(model: Model, recipe: Recipe, kept: set[int]) -> Model:
    """`linearize` without its checks, for a model whose weights are not there yet."""
    from fastweights.integrations.transformers.converted import use_padding_masks

    for parent, name, attention in _attention_sites(model):
        if attention.layer_idx not in kept:
            setattr(parent, name, LinearizedAttention(attention, recipe))
    use_padding_masks(model)
    description = {"recipe": recipe.to_dict(), "keep_softmax": sorted(kept)}
    model.config.fastweights = description  # type: ignore[union-attr]
    return model


def _attention_sites(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Every (parent, name, attention) of Llama type, in layer order."""
    if any(isinstance(module, LinearizedAttention) for module in model.modules()):
        raise ValueError("linearize: expected a softmax model, got one that is converted already")
    sites = []
    for parent in model.modules():
        for name, child in parent.named_children():
            if all(hasattr(child, projection) for projection in _PROJECTIONS):
                sites.append((parent, name, child))
    kind = type(model).__name__
    if not sites or not hasattr(model, "config"):
        raise ValueError(
            "linearize: expected a model with Llama-type attention (q_proj, k_proj, v_proj, "
            f"o_proj), got {kind}"
        )
    for _, _, child in sites:
        unknown = [n for n, _ in child.named_children() if n not in (*_PROJECTIONS, *_NORMS)]
        unknown += [n for n, _ in child.named_parameters(recurse=False)]
        missing = [
            n for n in ("head_dim", "scaling", "layer_idx", "config") if not hasattr(child, n)
        ]
        if unknown or missing:
            what = f"extra {', '.join(unknown)}" if unknown else f"no {', '.join(missing)}"
            raise ValueError(
                f"linearize: expected Llama-type attention, got {type(child).__name__} of {kind} "
                f"with {what}"
            )
    return sites


@torch.no_grad()
def _check_same_attention(model: Any, attention: Any) -> None:
    """Compares our softmax attention with the model's own on eight random tokens.

    The names of an attention's parts do not say how it rotates, scales or normalises; its output
    does.
    """
    from fastweights.integrations.transformers.converted import softmax_mask

    weight = next(model.parameters())  # the projections may be packed
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, attention.q_proj.in_features, generator=generator).to(weight)
    kind = type(attention).__name__
    try:
        rotary = next(m for n, m in model.named_modules() if n.split(".")[-1] == "rotary_emb")
        embeddings = rotary(x, torch.arange(8, device=x.device)[None])
        ours = LinearizedAttention(attention, recipe_named("hedgehog"))
        ours.original = True
        ours.sliding_window = 7  # so that the mask is one that both are given
        got = ours(x, embeddings)[0]
        visible = softmax_mask(8, 8, None, ours.sliding_window, x.device)
        assert visible is not None
        mask = torch.where(visible, 0.0, torch.finfo(x.dtype).min).to(x.dtype)
        expected = attention(x, position_embeddings=embeddings, attention_mask=mask)[0]
    except (RuntimeError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"linearize: {kind} cannot be called as a Llama-type attention: {error}"
        ) from error
    difference = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-20)
    if not difference <= _TOLERANCE.get(x.dtype, 1e-3):
        raise ValueError(
            f"linearize: expected Llama-type attention, got {kind}, whose output differs from it "
            f"by {difference:.1e}"
        )
