"""MatMulNBits weights of onnxruntime's quantizer, and its own product with them."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import _pybind_state as native

from fastweights.quantization.formats import MatMulNBits
from fastweights.quantization.formats.onnx import quantized_layers, read_onnx


def export(folder, bits, block, symmetric, k, n=48):
    """A file with one product, quantized as the package's MatMulNBitsQuantizer does."""
    w = torch.randn(k, n, generator=torch.Generator().manual_seed(0)).numpy()
    blocks, each = -(-k // block), 8 // bits
    packed = np.zeros((n, blocks, block // each), np.uint8)
    zeros = np.zeros((n, -(-blocks // each)), np.uint8)
    scales = np.zeros((n, blocks), np.float32)
    padded = np.pad(w, ((0, blocks * block - k), (0, 0)))
    quantize = getattr(native, f"quantize_matmul_{bits}bits")
    quantize(packed, padded, scales, zeros, block, n, k, symmetric)
    arrays = {f"w_Q{bits}": packed, "w_scales": scales}
    if not symmetric:
        arrays["w_zero_points"] = zeros
    node = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], f"/layer/MatMul_Q{bits}", domain="com.microsoft",
        K=k, N=n, bits=bits, block_size=block, accuracy_level=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [96, 100, 256])
def test_its_files(bits, block, symmetric, k, tmp_path):
    path = export(tmp_path, bits, block, symmetric, k)
    ((name, form, tensors),) = quantized_layers(read_onnx(path))
    assert name == f"/layer/MatMul_Q{bits}"
    assert form == MatMulNBits(k, 48, bits, block, None if symmetric else "packed")
    layer = form.read(tensors)
    again = form.write(layer)
    assert again.keys() == tensors.keys()
    for key in tensors:
        assert torch.equal(again[key], tensors[key]), key
    x = torch.randn(3, k)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": x.numpy()})
    ours = layer.module()(x)
    largest = (x.abs() @ layer.dequantize().abs().T).max()
    # The weights are the same; the sums are in another order.
    assert np.abs(ours.numpy() - theirs).max() <= 1e-6 * float(largest)
