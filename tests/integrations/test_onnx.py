"""ONNX exports opened as models: the names that exporters give to what they write."""

import re

import pytest
import torch
from torch import nn

import checkpoint_layers as layers
import fastweights as fw
import onnx_files
from fastweights.nn import QuantizedLinear
from fastweights.quantization.formats import MatMulNBits
from tiny_models import softmax_model, tokenizer

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def quantize(linear, seed):
    """Random tensors of a node for a layer, which gets the weight that they stand for."""
    n, k = linear.weight.shape
    form = MatMulNBits(k, n, zero_points="packed")
    tensors = layers.onnx(n, k, zero_points="packed", seed=seed)
    linear.weight.data = form.read(tensors).dequantize()
    return form, tensors


class Torch:
    """Names as torch's exporters give them: modules' paths; biases and norms as in state dicts."""

    @staticmethod
    def node(module, kind="MatMul_Q4"):
        return "/" + re.sub(r"\.(?!\d)", "/", module) + "/" + kind

    @staticmethod
    def tensor(name):
        return name


class GenAI:
    """Names of onnxruntime-genai's builder."""

    @staticmethod
    def node(module, kind="MatMulNBits"):
        return Torch.node(module.replace("self_attn", "attn"), kind)

    @staticmethod
    def tensor(name):
        name = name.replace("self_attn", "attn").replace("_proj.bias", "_proj.Add.bias")
        if name == "model.norm.weight":
            return "model.layers.2.final_norm_layernorm.weight"
        return name.replace("_norm.weight", "_norm.layernorm.weight") if "attn" in name else name


def export(folder, names, kind="llama", *, fused=False, head="float", file="model.onnx"):
    """A folder, and the float model of the weights that its tensors stand for."""
    twin = softmax_model(kind, tie_word_embeddings=head == "tied")
    nodes, tensors, done = [], [], set()
    for seed, (name, module) in enumerate(twin.named_modules()):
        if type(module) is not nn.Linear or (name == "lm_head" and head != "quantized"):
            continue
        form, parts = quantize(module, seed)
        done.add(f"{name}.weight")
        made, initializers = onnx_files.matmul_nbits(names.node(name), form, parts)
        nodes.append(made)
        tensors += initializers
    if fused:
        nodes, tensors = fuse(twin, names, done)
    for name, value in twin.state_dict().items():
        if name == "lm_head.weight" and head == "float":
            nodes.append(onnx_files.node("/lm_head/MatMul", "MatMul", ["x", "onnx::MatMul_7"]))
            tensors.append(onnx_files.tensor("onnx::MatMul_7", value.T))
        elif name not in done and name != "lm_head.weight":
            tensors.append(onnx_files.tensor(names.tensor(name), value))
    tensors.append(onnx_files.tensor("cos_cache", torch.ones(4, 4)))
    twin.config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(onnx_files.model(nodes, tensors))
    return twin


def fuse(twin, names, done):
    """q, k, v and gate, up as one node each; the biases of q, k, v as one tensor."""
    nodes, tensors = [], []
    for layer in range(2):
        for seed, (owner, child) in enumerate(
            (("self_attn", "qkv_proj"), ("self_attn", "o_proj"), ("mlp", "gate_up_proj"),
             ("mlp", "down_proj"))
        ):  # fmt: skip
            path = f"model.layers.{layer}.{owner}"
            parts = [twin.get_submodule(f"{path}.{p}") for p in FUSED.get(child, (child,))]
            whole = nn.Linear(parts[0].in_features, sum(p.out_features for p in parts), bias=False)
            form, made = quantize(whole, 10 * layer + seed)
            sizes = [p.out_features for p in parts]
            for part, rows in zip(parts, whole.weight.split(sizes), strict=True):
                part.weight.data = rows.detach()
            if parts[0].bias is not None:
                bias = torch.cat([p.bias for p in parts])
                tensors.append(onnx_files.tensor(names.tensor(f"{path}.{child}.bias"), bias))
                done |= {f"{path}.{p}.bias" for p in FUSED[child]}
            node, initializers = onnx_files.matmul_nbits(names.node(f"{path}.{child}"), form, made)
            nodes.append(node)
            tensors += initializers
    return nodes, tensors


def tokens(*shape):
    return torch.randint(2, 96, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("names", [Torch, GenAI])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_folder_is_opened_and_runs(names, kind, fused, tmp_path):
    twin = export(tmp_path, names, kind, fused=fused)
    model, words = fw.load(tmp_path)
    assert words("B")["input_ids"]
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 14
    x = tokens(2, 30)
    expected = twin(x).logits
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-3, atol=1e-3)
    floats, _ = fw.load(tmp_path, dequantize=True)
    assert torch.equal(floats(x).logits, expected)


@pytest.mark.parametrize("head", ["tied", "quantized"])
def test_output_layers(head, tmp_path):
    twin = export(tmp_path, Torch, head=head)
    model, words = fw.load(tmp_path, activation="float")
    assert isinstance(model.lm_head, QuantizedLinear) == (head == "quantized")
    x = tokens(2, 30)
    torch.testing.assert_close(model(x).logits, twin(x).logits, rtol=1e-3, atol=1e-3)
    fw.save(model, words, tmp_path / "again")
    assert torch.equal(fw.load(tmp_path / "again")[0](x).logits, model(x).logits)


def test_a_file_in_a_folder_of_its_own(tmp_path):
    twin = export(tmp_path, Torch, file="onnx/model_q4.onnx")
    model, _ = fw.load(tmp_path / "onnx" / "model_q4.onnx")
    x = tokens(1, 8)
    torch.testing.assert_close(model(x).logits, twin(x).logits, rtol=1e-3, atol=1e-3)


def test_damaged_exports(tmp_path):
    export(tmp_path, Torch)
    path = tmp_path / "model.onnx"
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:1000], "onnx: model: expected .* bytes at"),
        (whole.replace(b"MatMulNBits", b"MatMulNBitz"), "load: expected MatMulNBits nodes"),
        (whole.replace(b"/o_proj/MatMul", b"/z_proj/MatMul"), "has a layer .*z_proj, which the"),
        (whole.replace(b"model.norm.weight", b"model.norm.weighs"), "lacks 1 tensors, the first"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            fw.load(tmp_path)
