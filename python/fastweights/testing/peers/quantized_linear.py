"""4-bit linear layers that people install today, on the weight of the case quantized their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastweights.ops.quantization.functional import dequantize
from fastweights.testing.opspec import Peer, Sample, sample

__all__ = ["BITSANDBYTES", "DENSE", "INT4PACK", "ONNXRUNTIME"]


def _input(call: Sample, dtype: torch.dtype) -> Tensor:
    x: Tensor = call.args[0]
    return x.detach().to(dtype).requires_grad_(x.requires_grad)


def _group_codes(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes 0..15 around 8 `[N, groups, group_size]` and scales `[N, groups, 1]`."""
    groups = w.unflatten(-1, (-1, group_size))
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7
    return (groups / scales).round().add(8).to(torch.uint8), scales


def _is_int4(call: Sample) -> bool:
    return bool(call.args[1].format == "int4")


# ---- torch ---------------------------------------------------------------------------------------


def _adapt_dense(call: Sample) -> Sample:
    x = _input(call, call.args[0].dtype)
    return sample(x, dequantize(call.args[1]).to(x.dtype))


def _int4pack(x: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales_and_zeros)
    return y


def _adapt_int4pack(call: Sample) -> Sample | None:
    """In bfloat16: the kernel is many times slower in float32."""
    if not _is_int4(call):
        return None
    weight = call.args[1]
    codes, scales = _group_codes(dequantize(weight), weight.group_size)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 1)
    scales = scales.squeeze(-1).T
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), -1)
    return sample(
        _input(call, torch.bfloat16), packed, weight.group_size, scales_and_zeros.bfloat16()
    )


# ---- onnxruntime ---------------------------------------------------------------------------------


def _load_onnxruntime() -> Callable[..., Any]:
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401

    return lambda session, x: session.run(None, {"x": x})[0]


def _adapt_onnxruntime(call: Sample) -> Sample | None:
    """MatMulNBits with accuracy_level 4: activations in int8, as ours."""
    if not _is_int4(call):
        return None
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    x, weight = call.args[:2]
    (N, K), group_size = weight.shape, weight.group_size
    codes, scales = _group_codes(dequantize(weight), group_size)
    blobs = (codes[..., 0::2] | codes[..., 1::2] << 4).numpy()
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "scales"],
        ["y"],
        domain="com.microsoft",
        K=K,
        N=N,
        bits=4,
        block_size=group_size,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", N])],
        [
            numpy_helper.from_array(blobs, "w"),
            numpy_helper.from_array(scales.flatten().numpy(), "scales"),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return sample(session, x.detach().float().numpy())


# ---- bitsandbytes --------------------------------------------------------------------------------


def _load_bitsandbytes() -> Callable[..., Any]:
    import bitsandbytes  # noqa: F401

    return lambda layer, x: layer(x)


def _adapt_bitsandbytes(call: Sample) -> Sample | None:
    """NF4 in its blocks of 64. In training it dequantizes the whole matrix, in both directions."""
    if call.args[1].format not in ("int4", "nf4"):
        return None
    import bitsandbytes as bnb

    w = dequantize(call.args[1])
    x = _input(call, call.args[0].dtype)
    layer = bnb.nn.Linear4bit(
        w.shape[1], w.shape[0], bias=False, compute_dtype=x.dtype, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4")
    return sample(layer.to("cpu").train(x.requires_grad), x)


DENSE = Peer("torch linear, dense", load=lambda: F.linear, adapt=_adapt_dense, matmul=True)
INT4PACK = Peer(
    "torch int4pack, bfloat16", load=lambda: _int4pack, adapt=_adapt_int4pack, backward=False
)
ONNXRUNTIME = Peer(
    "onnxruntime MatMulNBits", load=_load_onnxruntime, adapt=_adapt_onnxruntime, backward=False
)
BITSANDBYTES = Peer("bitsandbytes NF4", load=_load_bitsandbytes, adapt=_adapt_bitsandbytes)
