"""Layers of checkpoints with random bits throughout, and bit streams read one code at a time."""

import json

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastweights.functional import dynamic_map
from fastweights.ops.quantization.formats import FORMATS


def int32(*values):
    """Words above 2^31 too."""
    return torch.tensor(values, dtype=torch.int64).to(torch.int32)


def random_words(generator, *shape):
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def bit_stream(words, bits):
    """Codes of a little-endian stream of 32-bit words."""
    number = sum((int(w) & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(words))
    return [(number >> (bits * i)) & ((1 << bits) - 1) for i in range(len(words) * 32 // bits)]


def same(a, b):
    """To the bit, NaN among bytes that are stored as floats too."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        ours, theirs = (
            t[name].flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
            for t in (a, b)
        )
        assert torch.equal(ours, theirs), name


def check_values(layer, expected, steps, bits):
    """Float16 parameters are exact; of float32 ones, ``scale * zero`` is rounded once."""
    change = (layer.dequantize(torch.float64) - expected).abs() / steps
    exact = layer.weight.format.endswith("_zp")
    assert change.max() <= (0 if exact else 2.0 ** (bits - 24))


def gptq(n=64, k=128, bits=4, group=32, act_order=False, bias=True, seed=0, dtype=torch.float16):
    g = torch.Generator().manual_seed(seed)
    groups = -(-k // group)
    g_idx = (torch.arange(k) // group).to(torch.int32)
    return {
        "qweight": random_words(g, k * bits // 32, n),
        "qzeros": random_words(g, groups, n * bits // 32),
        "scales": (torch.rand(groups, n, generator=g) * 0.01 + 0.001).to(dtype),
        "g_idx": g_idx[torch.randperm(k, generator=g)] if act_order else g_idx,
    } | ({"bias": torch.randn(n, generator=g).half()} if bias else {})


def awq(n=64, k=128, group=32, bias=True, seed=0, dtype=torch.float16):
    g = torch.Generator().manual_seed(seed)
    groups = -(-k // group)
    return {
        "qweight": random_words(g, k, n // 8),
        "qzeros": random_words(g, groups, n // 8),
        "scales": (torch.rand(groups, n, generator=g) * 0.01 + 0.001).to(dtype),
    } | ({"bias": torch.randn(n, generator=g).half()} if bias else {})


def compressed_tensors(
    n=48, k=100, bits=4, group=32, symmetric=True, dense=True, act_order=False, seed=0,
    dtype=torch.bfloat16,
):  # fmt: skip
    """Bits beyond the last code are 0, as in files."""
    g = torch.Generator().manual_seed(seed)
    groups = -(-k // group)

    def stream(rows, count):
        if dense:
            words = random_words(g, rows, -(-count * bits // 32))
            used = count * bits - 32 * (words.shape[1] - 1)
            words[:, -1] &= int32((1 << used) - 1)
        else:
            each = 32 // bits
            words = random_words(g, rows, -(-count // each)) & int32((1 << each * bits) - 1)
            used = (count - each * (words.shape[1] - 1)) * bits
            words[:, -1] &= int32((1 << used) - 1)
        return words

    tensors = {
        "weight_packed": stream(n, k),
        "weight_shape": torch.tensor([n, k]),
        "weight_scale": (torch.rand(n, groups, generator=g) * 0.01 + 0.001).to(dtype),
    }
    if not symmetric:
        tensors["weight_zero_point"] = stream(groups, n).T.contiguous()
    if act_order:
        g_idx = (torch.arange(k) // group).to(torch.int32)
        tensors["weight_g_idx"] = g_idx[torch.randperm(k, generator=g)]
    return tensors


def llm_int8(n=48, k=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randint(-127, 128, (n, k), generator=g).to(torch.int8),
        "SCB": torch.rand(n, generator=g) + 0.01,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def bits_and_bytes(n=48, k=96, kind="nf4", block=64, *, nested=False, storage=torch.uint8, seed=0):
    g = torch.Generator().manual_seed(seed)
    blocks = -(-n * k // block)
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [n, k]}
    weight = torch.randint(256, (n * k // 2, 1), generator=g).to(torch.uint8)
    tensors = {
        "weight": weight.view(-1, storage.itemsize).view(storage),
        "weight.absmax": torch.rand(blocks, generator=g) + 0.01,
        "weight.quant_map": torch.tensor(FORMATS[kind].levels),
    }
    if nested:
        nbs = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0625}
        state |= nbs
        tensors["weight.absmax"] = torch.randint(256, (blocks,), generator=g).to(torch.uint8)
        tensors["weight.nested_absmax"] = torch.rand(-(-blocks // 256), generator=g)
        tensors["weight.nested_quant_map"] = dynamic_map(True)
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {f"weight.quant_state.bitsandbytes__{kind}": text}


def onnx(n=24, k=100, bits=4, block=32, zero_points=None, flat=False, dtype=torch.float16, seed=0):
    """Inputs of a MatMulNBits node, filled up as by onnxruntime's quantizer."""
    g = torch.Generator().manual_seed(seed)
    blocks = -(-k // block)
    each = 8 // bits

    def pack(codes, fill=0):
        padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each), value=fill)
        words = padded.unflatten(1, (-1, each)) << torch.arange(0, 8, bits)
        return words.sum(-1).to(torch.uint8)

    zeros = torch.randint(1 << bits, (n, blocks), generator=g)
    if zero_points is None:
        zeros[:] = 1 << (bits - 1)
    codes = torch.randint(1 << bits, (n, blocks * block), generator=g)
    floats = zeros + 0.5
    codes[:, k:] = 0
    shape = (-1,) if flat else (n, -1)
    scales = (torch.rand(n, blocks, generator=g) * 0.01 + 0.001).to(dtype)
    tensors = {"B": pack(codes).view(n, blocks, -1), "scales": scales.view(shape)}
    if zero_points == "packed":
        tensors["zero_points"] = pack(zeros, 1 << (bits - 1)).view(shape)
    if zero_points == "float":
        tensors["zero_points"] = floats.to(dtype).view(shape)
    return tensors


class LargestFloat(TorchDispatchMode):
    """Elements of the largest floating-point result of any operation."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.is_floating_point() and not result.is_meta:
            self.elements = max(self.elements, result.numel())
        return result
