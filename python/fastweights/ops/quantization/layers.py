"""Modules over quantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastweights.ops.quantization.formats import STRIP
from fastweights.ops.quantization.functional import dequantize_rows, quantize, quantized_linear
from fastweights.ops.quantization.layout import unpack_parameters
from fastweights.ops.quantization.tensor import QuantizedTensor, packed_shape

__all__ = ["QuantizedEmbedding", "QuantizedLinear", "fuse_linears"]


class _Quantized(nn.Module):
    """Holds the parts of one QuantizedTensor: `packed` as a buffer, the rest as attributes.

    `packed` is uint8, so ``.half()``, ``.to(torch.bfloat16)`` and the like leave the weight alone.
    """

    packed: Tensor

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.register_buffer("packed", weight.packed)
        self.format = weight.format
        self.shape = (int(weight.shape[0]), int(weight.shape[1]))
        self.group_size = weight.group_size
        self.activation = weight.activation

    @property
    def weight(self) -> QuantizedTensor:
        """The weight; it shares memory with the module."""
        return QuantizedTensor(
            self.packed, self.format, self.shape, self.group_size, self.activation
        )

    def extra_repr(self) -> str:
        return f"{self.format}, group_size={self.group_size}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        packed = state_dict.get(prefix + "packed")
        if packed is not None:
            _check_packed(packed, self.weight, prefix + "packed")
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)


def _check_packed(packed: Tensor, like: QuantizedTensor, name: str) -> None:
    """A file is not trusted: bytes of another layout, or scales that are not finite, raise."""
    expected = packed_shape(like.format, *like.shape, like.group_size)
    if tuple(packed.shape) != expected or packed.dtype != torch.uint8:
        raise ValueError(
            f"{name}: expected uint8 of shape {list(expected)} for {like.format} "
            f"{list(like.shape)} with group_size {like.group_size}, got {packed.dtype} of shape "
            f"{list(packed.shape)}"
        )
    if packed.is_meta or packed.numel() == 0:
        return
    if not all(t.isfinite().all() for t in unpack_parameters(replace(like, packed=packed))):
        raise ValueError(f"{name}: expected finite scales and minima, got an infinite or NaN one")


class QuantizedLinear(_Quantized):
    """``y = x W^T + bias`` with a quantized W (`fastweights.quantized_linear`).

    The weight is frozen; the gradient flows to x and to bias. state_dict: ``packed`` (uint8),
    ``bias`` and ``order`` if there are any; format, group size and activation are the
    constructor's, as the sizes of an `nn.Linear` are.

    Args:
        weight: ``[out_features, in_features]`` from `fastweights.quantize`.
        bias: ``[out_features]`` or None.
        order: int64 ``[in_features]``, a permutation, or None: column j of `weight` meets
            ``x[..., order[j]]``. Checkpoints of GPTQ with act-order group their inputs in another
            order than they come in.

    Example:
        >>> import torch
        >>> from fastweights.nn import QuantizedLinear
        >>> layer = QuantizedLinear.from_linear(torch.nn.Linear(64, 32), "int4")
        >>> layer(torch.randn(2, 64)).shape
        torch.Size([2, 32])
    """

    bias: nn.Parameter | None
    order: Tensor | None

    def __init__(
        self, weight: QuantizedTensor, bias: Tensor | None = None, order: Tensor | None = None
    ) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = self.shape
        self.register_buffer("order", order)
        if order is not None:
            _check_order(order, self.in_features, "order")
        if bias is None or isinstance(bias, nn.Parameter):
            self.bias = bias
        else:
            self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: str = "int4",
        *,
        group_size: int | None = None,
        activation: str = "float",
    ) -> QuantizedLinear:
        """Quantize a linear layer; its bias is shared, its weight is not kept.

        Args:
            linear: any ``nn.Linear``.
            format: see `fastweights.quantize`, as are the rest.
            group_size: inputs per scale.
            activation: "float" or "int8".
        """
        weight = quantize(linear.weight, format, group_size=group_size, activation=activation)
        return cls(weight, linear.bias).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        return quantized_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes, format and activation mode."""
        ordered = "" if self.order is None else ", ordered"
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"{super().extra_repr()}, activation={self.activation}{ordered}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        order = state_dict.get(prefix + "order")
        if order is not None:
            _check_order(order, self.in_features, prefix + "order")
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)


def _check_order(order: Tensor, inputs: int, name: str) -> None:
    fits = order.dtype == torch.int64 and tuple(order.shape) == (inputs,)
    if not fits or not (order.is_meta or torch.equal(order.sort()[0], torch.arange(inputs))):
        raise ValueError(
            f"{name}: expected int64, a permutation of 0 to {inputs - 1}, "
            f"got {order.dtype} {list(order.shape)}"
        )


class QuantizedEmbedding(_Quantized):
    """A lookup in a quantized table.

    Its `packed` may be that of a `QuantizedLinear`: tied embeddings then stay one tensor.

    Args:
        weight: ``[num_embeddings, embedding_dim]`` from `fastweights.quantize`; its `activation` is
            of no consequence here.
        dtype: of the result.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.nn import QuantizedEmbedding
        >>> table = QuantizedEmbedding(fw.quantize(torch.randn(100, 64), "int8"))
        >>> table(torch.tensor([3, 99])).shape
        torch.Size([2, 64])
    """

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = self.shape
        self.dtype = dtype

    def forward(self, index: Tensor) -> Tensor:
        """Integer ``[...]`` to ``[..., embedding_dim]``."""
        return dequantize_rows(self.weight, index.long(), self.dtype)

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {super().extra_repr()}"


def fuse_linears(layers: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """One layer for several that read the same input, such as q, k, v or gate, up.

    Its output is theirs side by side: ``fused(x).split([layer.out_features for layer in layers],
    -1)``. The bits are the same; x is quantized once and the threads meet once.

    Args:
        layers: of one format, group size, activation and in_features. All but the last have
            out_features that are multiples of 16 (else fuse the float layers before quantizing);
            all or none have a bias.

    Raises:
        ValueError: layers that do not go together.
    """
    if not layers:
        raise ValueError("fuse_linears: expected at least one layer, got none")
    first = layers[0]
    for layer in layers:
        for name in ("in_features", "format", "group_size", "activation"):
            if getattr(layer, name) != getattr(first, name):
                raise ValueError(
                    f"fuse_linears: expected layers of one {name}, got {getattr(first, name)} "
                    f"and {getattr(layer, name)}"
                )
        if not _same_order(layer.order, first.order):
            raise ValueError("fuse_linears: expected layers of one order of the inputs, got two")
        if (layer.bias is None) != (first.bias is None):
            raise ValueError("fuse_linears: expected all layers or none to have a bias")
    for layer in layers[:-1]:
        if layer.out_features % STRIP:
            raise ValueError(
                f"fuse_linears: expected out_features to be multiples of {STRIP} in all layers but "
                f"the last, got {layer.out_features}"
            )
    packed = torch.cat([layer.packed for layer in layers])
    shape = (sum(layer.out_features for layer in layers), first.in_features)
    weight = QuantizedTensor(packed, first.format, shape, first.group_size, first.activation)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat([b.detach() for b in biases]) if biases else None
    return QuantizedLinear(weight, bias, first.order).train(first.training)


def _same_order(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
