"""Damaged files of every format: read, or refused by a ValueError of one line. Nothing else."""

import json
import random
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

import checkpoint_layers as layers
import onnx_files
from fastweights._json import read_json
from fastweights.conversion.files import read_tensors
from fastweights.functional import dequantize, quantized_linear
from fastweights.integrations.gguf_config import config_of
from fastweights.ops.quantization.tensor import QuantizedTensor
from fastweights.quantization.formats import (
    GGUF,
    GGUFTensor,
    GGUFValue,
    MatMulNBits,
    read_gguf,
    write_gguf,
)
from fastweights.quantization.formats.gguf_blocks import TYPES
from fastweights.quantization.formats.onnx import quantized_layers, read_onnx
from fastweights.quantization.formats.registry import format_of
from mutations import EXTREMES, mutate

MUTATIONS = 2000  # of every format
SIZES = (0, 1, 2, 16, 31, 32, 64, 1000)


def damage(tensors, draw):
    """A file whose container is whole, one tensor of which is missing or not what it should be."""
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    raw = bytearray(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    kind = draw.randrange(6)
    if kind == 0:
        return {k: v for k, v in tensors.items() if k != name}
    if kind == 1:
        other = torch.tensor([]).new_empty(draw.choices(SIZES, k=draw.randrange(4)))
        return tensors | {draw.choice((name, "g_idx", "bias")): other.to(tensor.dtype)}
    if kind == 2:
        dtypes = (torch.int32, torch.float16, torch.float32, torch.int64, torch.uint8)
        return tensors | {name: tensor.to(draw.choice(dtypes))}
    if kind == 3:
        return tensors | {name: tensor.T.contiguous() if tensor.dim() == 2 else tensor[None]}
    for _ in range(draw.randint(1, 4)):
        raw[draw.randrange(len(raw))] = draw.choice((*EXTREMES, 0x7C, 0x7E, 0xFE, 0xFC))
    flat = torch.frombuffer(raw, dtype=torch.uint8).view(tensor.dtype)
    return tensors | {name: flat.view(tensor.shape)}


def use(weight):
    """What was accepted is decoded, and multiplied with both kinds of activations."""
    assert dequantize(weight).isfinite().all()
    x = torch.ones(2, weight.shape[1])
    for activation in ("int8", "float"):
        quantized_linear(x, replace(weight, activation=activation))


def read_folder(folder):
    """Every layer of a folder, as `fw.load` reads them."""
    form = format_of(read_json(folder / "config.json"))
    tensors = read_tensors(folder)
    return form, form.read(tensors, "layer", activation="int8")


FOLDERS = {
    "gptq": (
        layers.gptq(32, 64, act_order=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (
        layers.awq(32, 64),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    ),
    "compressed-tensors": (
        layers.compressed_tensors(16, 50, 3, symmetric=False, act_order=True),
        {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 3, "type": "int", "symmetric": False, "strategy": "group",
                "group_size": 32,
            }}},
        },
    ),
    "LLM.int8": (
        layers.llm_int8(16, 64), {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ),
    "NF4": (
        layers.bits_and_bytes(16, 64, nested=True),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(kind, tmp_path):
    tensors, config = FOLDERS[kind]
    weights, settings = save(tensors), json.dumps(config).encode()
    header = 8 + struct.unpack("<Q", weights[:8])[0]
    draw = random.Random(0)
    accepted = 0
    for _ in range(MUTATIONS):
        damaged, changed = weights, settings
        match draw.randrange(5):
            case 0:
                changed = mutate(settings, draw, len(settings))
            case 1 | 2:
                damaged = mutate(weights, draw, header)
            case _:
                damaged = save(damage(tensors, draw))
        (tmp_path / "model.safetensors").write_bytes(damaged)
        (tmp_path / "config.json").write_bytes(changed)
        try:
            form, layer = read_folder(tmp_path)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        accepted += 1
        use(layer.weight)
        assert layer.dequantize().isfinite().all()
        form.write(layer)
    assert 0 < accepted < MUTATIONS


def small_gguf(path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}

    def add(name, tensor, type_name):
        tensors[name] = GGUFTensor.of(name, tensor, type_name)

    for kind, type_ in TYPES.items():
        if type_.blocks is not None:
            data = torch.randint(0, 120, (16, type_.bytes), dtype=torch.uint8, generator=generator)
            shape = (16, type_.weights)
            tensors[type_.name] = GGUFTensor(type_.name, kind, shape, data.numpy())
    packed = tensors["Q4_1"].read()
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_up.weight"):
        add(name, packed, "Q4_1")
    add("output_norm.weight", torch.ones(32), "F32")
    numbers = {
        "block_count": 1, "embedding_length": 32, "context_length": 8, "feed_forward_length": 16,
        "attention.head_count": 2,
    }  # fmt: skip
    metadata = {
        "general.architecture": GGUFValue(8, "llama"),
        "llama.attention.layer_norm_rms_epsilon": GGUFValue(6, 1e-5),
        "tokenizer.ggml.tokens": GGUFValue(8, ["a", "é", "c"]),
        "tokenizer.ggml.scores": GGUFValue(6, [0.0, 1.0]),
        "general.alignment": GGUFValue(4, 32),
    } | {f"llama.{key}": GGUFValue(4, number) for key, number in numbers.items()}
    write_gguf(path, GGUF(metadata, tensors))


def test_gguf(tmp_path):
    path = tmp_path / "a.gguf"
    small_gguf(path)
    whole = path.read_bytes()
    header = whole.index(b"output_norm.weight") + 64
    draw = random.Random(0)
    accepted = configured = 0
    for _ in range(2 * MUTATIONS):
        path.write_bytes(mutate(whole, draw, header))
        try:
            file = read_gguf(path)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        accepted += 1
        try:
            config_of(file)
            configured += 1
        except ValueError as error:
            assert "\n" not in str(error)
        for tensor in file.tensors.values():
            try:
                value = tensor.read(activation="int8")
            except ValueError as error:
                assert "\n" not in str(error)
                continue
            if isinstance(value, QuantizedTensor):
                use(value)
    assert 0 < configured < accepted < 2 * MUTATIONS


def small_onnx():
    """Two layers, one of which has everything that a node may have, and a vector."""
    nodes, initializers = [], [onnx_files.tensor("norm", torch.ones(16))]
    g_idx = (torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32).int()
    for name, zero_points, more in (
        ("/a/MatMul_Q4", None, {}),
        ("/b/MatMul_Q4", "packed", {"g_idx": g_idx, "bias": torch.ones(16).half()}),
    ):
        form = MatMulNBits(64, 16, zero_points=zero_points)
        tensors = layers.onnx(16, 64, zero_points=zero_points) | more
        node, parts = onnx_files.matmul_nbits(name, form, tensors)
        nodes.append(node)
        initializers += parts
    return onnx_files.model(nodes, initializers)


def test_onnx(tmp_path):
    path = tmp_path / "a.onnx"
    whole = small_onnx()
    draw = random.Random(0)
    accepted = packed = 0
    for _ in range(2 * MUTATIONS):
        path.write_bytes(mutate(whole, draw, len(whole)))
        try:
            file = read_onnx(path)
            accepted += 1
            for name, form, tensors in quantized_layers(file):
                layer = form.read(tensors, name, activation="int8")
                use(layer.weight)
                form.write(layer)
                packed += 1
            for tensor in file.tensors.values():
                tensor.read()
        except ValueError as error:
            assert "\n" not in str(error)
    assert 0 < accepted < 2 * MUTATIONS
    assert packed > 0
