"""The layers under adapters: what is linear, and their weights in one layout, a few rows at a time.

`Conv1D` of transformers, which keeps its weight as ``[in_features, out_features]``, is told by
that, so that transformers need not be there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from fastweights.ops.quantization.functional import dequantize_rows, quantize
from fastweights.ops.quantization.layers import QuantizedLinear
from fastweights.ops.quantization.tensor import QuantizedTensor

__all__ = [
    "as_matrix",
    "bias_of",
    "changed",
    "device_of",
    "dtype_of",
    "fresh",
    "is_conv1d",
    "is_linear",
    "matrix_of",
    "order_of",
    "refuse_codes",
    "replaced",
    "row_tiles",
    "sizes",
]

_TILE = 1 << 19  # elements: 4 MiB of float64


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is `Conv1D` of transformers."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(weight, Tensor)
        and tuple(weight.shape) == (getattr(module, "nx", None), getattr(module, "nf", None))
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose computation is known.

    Subclasses with a forward of their own are not, nor is the output projection of
    `nn.MultiheadAttention`, which is never called.
    """
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward and not isinstance(
            module, nn.modules.linear.NonDynamicallyQuantizableLinear
        )
    return isinstance(module, QuantizedLinear) or is_conv1d(module)


def sizes(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)."""
    if is_conv1d(module):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight of a layer as ``[out_features, in_features]``, sharing memory.

    Embeddings are matrices that meet one-hot rows; convolutions meet patches.
    """
    if isinstance(module, nn.Linear):
        return weight
    if is_conv1d(module) or isinstance(module, nn.Embedding):
        return weight.t()
    return weight.flatten(1)


def matrix_of(module: nn.Module) -> Tensor | QuantizedTensor:
    """The same of a layer's own weight, which may be quantized."""
    weight = module.weight
    assert isinstance(weight, (Tensor, QuantizedTensor))
    return as_matrix(module, weight) if isinstance(weight, Tensor) else weight


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of the weight; of a quantized one, what it is computed in."""
    weight = getattr(module, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) else torch.float32


def bias_of(module: nn.Module) -> Tensor | None:
    """``[out_features]`` or None."""
    bias = getattr(module, "bias", None)
    assert bias is None or isinstance(bias, Tensor)
    return bias


def order_of(module: nn.Module) -> Tensor | None:
    """Which input each column of the weight meets, where they come in another order."""
    return module.order if isinstance(module, QuantizedLinear) else None


def device_of(module: nn.Module) -> torch.device:
    """Of the first parameter or buffer; a module may have none."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def row_tiles(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of ``[out_features, in_features]`` at a time, converted to a dtype.

    They may share memory with the weight where it has that dtype.
    """
    weight = matrix_of(module)
    rows, columns = weight.shape
    step = max(1, _TILE // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        if isinstance(weight, Tensor):
            yield part, weight[part].to(dtype)
        else:
            index = torch.arange(part.start, part.stop, device=weight.packed.device)
            tile = dequantize_rows(weight, index, torch.float32).to(dtype)
            order = order_of(module)
            yield part, tile if order is None else tile[:, order.argsort()]


def fresh(module: nn.Module, dtype: torch.dtype | None) -> Tensor:
    """An empty tensor on a module's device, of the dtype that its adapters have."""
    base = dtype_of(module)
    chosen = dtype or (base if base == torch.float64 else torch.float32)
    return torch.empty(0, dtype=chosen, device=device_of(module))


def replaced(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer like another one with another float weight and bias; codes are found anew."""
    if not isinstance(module, QuantizedLinear):
        return changed(module, weight=weight, **({} if bias is None else {"bias": bias}))
    columns = weight if module.order is None else weight[:, module.order]
    packed = quantize(
        columns, module.format, group_size=module.group_size, activation=module.activation
    )
    return QuantizedLinear(packed, bias, module.order).train(module.training)


def refuse_codes(module: nn.Module, quantized: bool) -> None:
    """Codes are not rounded again unasked."""
    if isinstance(module, QuantizedLinear) and not quantized:
        raise ValueError(
            f"merge: expected quantized=True to round {module.format} weights again, "
            "which loses of the update what the format cannot hold"
        )


def changed(module: nn.Module, **parameters: Tensor | None) -> nn.Module:
    """A module like another one but for some parameters; the others are shared."""
    new = copy.copy(module)
    new._parameters = dict(module._parameters)
    for name, value in parameters.items():
        old = module._parameters[name]
        frozen = old is None or not old.requires_grad
        new._parameters[name] = None if value is None else nn.Parameter(value, not frozen)
    return new
