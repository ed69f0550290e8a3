"""ONNX files, written field by field."""

import torch

_TYPES = {
    torch.float32: 1, torch.uint8: 2, torch.int32: 6, torch.int64: 7, torch.float16: 10,
    torch.bfloat16: 16,
}  # fmt: skip


def varint(number):
    number &= (1 << 64) - 1
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def number(field, value):
    return varint(field << 3) + varint(value)


def text(field, value):
    raw = value.encode() if isinstance(value, str) else bytes(value)
    return varint(field << 3 | 2) + varint(len(raw)) + raw


def raw_bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensor(name, value, external=None):
    """An initializer; with `external` (file, offset, length) its bytes lie elsewhere."""
    out = b"".join(number(1, size) for size in value.shape)
    out += number(2, _TYPES[value.dtype]) + text(8, name)
    if external is None:
        return out + text(9, raw_bytes(value))
    for key, entry in zip(("location", "offset", "length"), external, strict=True):
        out += text(13, text(1, key) + text(2, str(entry)))
    return out + number(14, 1)


def node(name, op_type, inputs, domain="", **integers):
    out = b"".join(text(1, one) for one in inputs) + text(2, f"{name}/output_0")
    out += text(3, name) + text(4, op_type)
    for key, value in integers.items():
        out += text(5, text(1, key) + number(3, value) + number(20, 2))
    return out + (text(7, domain) if domain else b"")


def matmul_nbits(name, form, tensors):
    """A node and its initializers, as onnxruntime's quantizer names them."""
    inputs, initializers = ["x"], []
    for key in ("B", "scales", "zero_points", "g_idx", "bias"):
        inputs.append(f"{name}_{key}" if key in tensors else "")
        if key in tensors:
            initializers.append(tensor(inputs[-1], tensors[key]))
    while not inputs[-1]:
        inputs.pop()
    settings = {"K": form.in_features, "N": form.out_features, "bits": form.bits}
    made = node(
        name, "MatMulNBits", inputs, "com.microsoft", **settings, block_size=form.block_size
    )
    return made, initializers


def model(nodes, initializers):
    graph = b"".join(text(1, one) for one in nodes) + text(2, "graph")
    graph += b"".join(text(5, one) for one in initializers)
    return number(1, 8) + text(2, "test") + text(7, graph)
