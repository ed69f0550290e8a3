"""`decode_step`: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from fastweights.ops._common import needs_reference, refuse_gradients
from fastweights.ops.decoding import reference

__all__ = ["decode_step"]


def decode_step(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    norms: list[Tensor],
    maps: list[Tensor],
    states: list[Tensor],
    final_norm: Tensor,
    head: Tensor,
    inv_freq: Tensor,
    *,
    intermediate: int,
    vocab: int,
    rotated_features: bool,
    rotary_factor: float,
    scale: float,
    norm_eps: float,
    format: str,
    group_size: int,
    head_format: str,
    head_group_size: int,
    activation: str,
) -> Tensor:
    """One token per row through all layers of a linearised, quantized Llama-type decoder.

    The lists hold the tensors of layer 0, then those of layer 1 and so on. A layer is

        x <- x + o(hybrid_attention_step(q, k, v of RMSNorm(x)));  x <- x + down(silu(gate(h))
        up(h)), h = RMSNorm(x)

    with the attention of `LinearizedAttention`; the logits are head(RMSNorm(x)). All layers have
    the same sizes. The phases of a token are short and many, so they run inside one parallel
    region.

    Args:
        x: float32 `[B, D]`, the embeddings of the tokens.
        weights: 7 per layer, packed: q, k, v, o, gate, up, down.
        biases: as many, each float32 `[out_features]` or empty; or none at all.
        norms: 4 per layer: before attention `[D]`, before the MLP `[D]`, of q and of k `[K]` or
            empty.
        maps: 7 per layer: Hedgehog matrices of q `[HQ, K, F/2]` and of k `[HS, K, F/2]`, HS being
            HKV or HQ; the window's weight `[HQ]`; the factors exp(g) by which features decay
            `[HS, F]` or empty; the sink's score `[HQ, K + 1]` and the logarithms of the features'
            gains `[HQ, K + 1]` and `[HS, K + 1]`, weights and bias side by side, or empty.
        states: 6 per layer, those of a sliding `HybridState`; updated in place.
        final_norm: `[D]`.
        head: packed, of the output layer.
        inv_freq: `[K/2]`, angles of the rotary embedding per position.
        intermediate: out_features of gate and up.
        vocab: out_features of the head.
        rotated_features: features of q and k after (True) or before the rotation.
        rotary_factor: multiplies cosine and sine.
        scale: of the window's scores.
        norm_eps: of every norm.
        format: of the layers' weights.
        group_size: of the layers' weights.
        head_format: of the head.
        head_group_size: of the head.
        activation: "float" or "int8", see `fastweights.quantized_linear`.

    Returns:
        Logits, float32 `[B, vocab]`.

    Raises:
        RuntimeError: a tensor that does not fit, or one that requires a gradient.
    """
    function = reference.decode_step if needs_reference(x) else torch.ops.fastweights.decode_step
    logits: Tensor = function(
        x, weights, biases, norms, maps, states, final_norm, head, inv_freq,
        intermediate=intermediate, vocab=vocab, rotated_features=rotated_features,
        rotary_factor=rotary_factor, scale=scale, norm_eps=norm_eps, format=format,
        group_size=group_size, head_format=head_format, head_group_size=head_group_size,
        activation=activation,
    )  # fmt: skip
    return logits


def _fake(x: Tensor, *args: object, vocab: int, **options: object) -> Tensor:
    return x.new_empty(x.shape[0], vocab)


torch.library.register_fake("fastweights::decode_step", _fake)
refuse_gradients("decode_step")
