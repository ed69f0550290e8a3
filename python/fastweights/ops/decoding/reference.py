"""`decode_step` from the references of its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastweights.ops.attention.reference import hybrid_attention_step
from fastweights.ops.attention.state import HybridState
from fastweights.ops.quantization.reference import quantized_linear
from fastweights.ops.quantization.tensor import QuantizedTensor

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
    """Same contract as `fastweights.functional.decode_step`."""
    width = x.shape[1]

    def linear(rows: Tensor, packed: Tensor, bias: Tensor, out_features: int) -> Tensor:
        shape = (out_features, rows.shape[-1])
        weight = QuantizedTensor(packed, format, shape, group_size, activation)
        return quantized_linear(rows, weight, bias if bias.numel() else None)

    def norm(rows: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(rows, rows.shape[-1:], weight, norm_eps) if weight.numel() else rows

    layers = len(weights) // 7
    for l in range(layers):  # noqa: E741 (a layer)
        q, k, v, o, gate, up, down = weights[7 * l : 7 * l + 7]
        b = biases[7 * l : 7 * l + 7] if biases else [x.new_empty(0)] * 7
        input_norm, mlp_norm, q_norm, k_norm = norms[4 * l : 4 * l + 4]
        state = HybridState(*states[6 * l : 6 * l + 6])
        heads, dim = maps[7 * l].shape[:2]
        kv_heads = state.k.shape[1]

        h = norm(x, input_norm)
        query = norm(linear(h, q, b[0], heads * dim).unflatten(1, (heads, dim)), q_norm)
        key = norm(linear(h, k, b[1], kv_heads * dim).unflatten(1, (kv_heads, dim)), k_norm)
        value = linear(h, v, b[2], kv_heads * dim).unflatten(1, (kv_heads, dim))
        angles = state.position[:, None].float() * inv_freq
        attended = _attend(
            query,
            key,
            value,
            maps[7 * l : 7 * l + 7],
            state,
            _rotation(angles, rotary_factor),
            rotated_features,
            scale,
        )
        x = x + linear(attended.flatten(1), o, b[3], width)
        h = norm(x, mlp_norm)
        h = F.silu(linear(h, gate, b[4], intermediate)) * linear(h, up, b[5], intermediate)
        x = x + linear(h, down, b[6], width)
    weight = QuantizedTensor(head, head_format, (vocab, width), head_group_size, activation)
    return quantized_linear(norm(x, final_norm), weight)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: Sequence[Tensor],
    state: HybridState,
    rotate: Callable[[Tensor], Tensor],
    rotated_features: bool,
    scale: float,
) -> Tensor:
    """The heads' outputs `[B, HQ, K]`; the state goes one token on."""
    if len(q) == 0:
        return torch.zeros_like(q)
    q_map, k_map, mix, decay, sink, q_gain, k_gain = maps
    turned_q, turned_k = rotate(q), rotate(k)
    source_q, source_k = (turned_q, turned_k) if rotated_features else (q, k)
    qf = _hedgehog(source_q, q_map, q_gain)
    kf = _hedgehog(source_k.repeat_interleave(k_map.shape[0] // k.shape[1], 1), k_map, k_gain)
    score = _affine(q, sink) if sink.numel() else None
    g = decay.log() if decay.numel() else None
    return hybrid_attention_step(
        turned_q,
        turned_k,
        v,
        qf,
        kf,
        mix,
        g,
        state=state,
        window=state.k.shape[2],
        scale=scale,
        sink=score,
    )


def _hedgehog(x: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
    """exp((x, 1) · gain) [softmax(xW), softmax(−xW)], x `[B, H, K]`, W `[H, K, F/2]`."""
    y = torch.einsum("bhk,hkf->bhf", x, weight)
    features = torch.cat((y.softmax(-1), (-y).softmax(-1)), -1)
    if gain.numel():
        features = features * _affine(x, gain).clamp(-15, 15).exp()[..., None]
    return features


def _affine(x: Tensor, weight: Tensor) -> Tensor:
    """(x, 1) · weight, weight `[H, K + 1]`."""
    return (x * weight[:, :-1]).sum(-1) + weight[:, -1]


def _rotation(angles: Tensor, factor: float) -> Callable[[Tensor], Tensor]:
    """Turns `[B, H, K]`, whose halves are real and imaginary parts, by `angles` `[B, K/2]`."""
    cos, sin = angles.cos()[:, None] * factor, angles.sin()[:, None] * factor

    def rotate(x: Tensor) -> Tensor:
        real, imaginary = x.chunk(2, -1)
        return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), -1)

    return rotate
