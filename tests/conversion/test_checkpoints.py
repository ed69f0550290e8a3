"""Folders of other programs' quantized models, opened by `fw.load`."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint_layers as layers
import fastweights as fw
from fastweights.nn import QuantizedLinear
from fastweights.quantization.formats import (
    AWQ,
    GPTQ,
    BitsAndBytes4Bit,
    CompressedTensors,
    LLMInt8,
)

from .conftest import random_tokens, tiny

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16}


def compressed_config(bits, symmetric):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | {"group_size": 32}}}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups,
    }  # fmt: skip


# name: (format, maker of a layer's tensors, quantization_config)
KINDS = {
    "gptq": (
        GPTQ(4, 32),
        lambda n, k, seed: layers.gptq(n, k, bias=False, seed=seed),
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
    ),
    "gptq act-order": (
        GPTQ(8, 32, 2),
        lambda n, k, seed: layers.gptq(n, k, 8, bias=False, act_order=True, seed=seed),
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (
        AWQ(32),
        lambda n, k, seed: layers.awq(n, k, bias=False, seed=seed),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    ),
    "compressed-tensors": (
        CompressedTensors(4, 32, symmetric=False),
        lambda n, k, seed: layers.compressed_tensors(n, k, symmetric=False, seed=seed),
        compressed_config(4, symmetric=False),
    ),
    "LLM.int8": (
        LLMInt8(),
        lambda n, k, seed: layers.llm_int8(n, k, seed),
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ),
    "NF4": (
        BitsAndBytes4Bit("nf4"),
        lambda n, k, seed: layers.bits_and_bytes(n, k, nested=True, seed=seed),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
}


def write(folder, kind, tokenizer, architecture="llama", **changes):
    """A folder, and the float model of the weights that its tensors stand for."""
    form, make, config = KINDS[kind]
    twin = tiny(architecture, **SIZES | changes)
    for parameter in twin.parameters():
        parameter.data = parameter.data.half().float()
    tensors = {k: v.half() for k, v in twin.state_dict().items()}
    if twin.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for seed, (name, module) in enumerate(twin.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            layer = make(module.out_features, module.in_features, seed)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": tensor for part, tensor in layer.items()}
            module.weight.data = form.read(layer).dequantize()
    twin.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return twin


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_folder_is_opened_and_runs(kind, architecture, tmp_path, tokenizer):
    twin = write(tmp_path, kind, tokenizer, architecture)
    model, words = fw.load(tmp_path)
    quantized = [n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert len(quantized) == 7
    tokens = random_tokens(2, 40)
    with torch.no_grad():
        expected = twin(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-3, atol=1e-3)
        floats, _ = fw.load(tmp_path, dequantize=True)
        torch.testing.assert_close(floats(tokens).logits, expected, rtol=0, atol=0)
    assert not [n for n, m in floats.named_modules() if isinstance(m, QuantizedLinear)]
    if architecture == "llama":  # the others come with tokenizer classes of their own
        assert words("w5 w9")["input_ids"] == [5, 9]
        assert fw.generate(model, ["w5 w9"], tokenizer=words, max_new_tokens=4)


@pytest.mark.parametrize("kind", ["gptq act-order", "awq", "NF4"])
def test_it_is_saved_and_opened_again(kind, tmp_path, tokenizer):
    write(tmp_path / "a", kind, tokenizer, tie_word_embeddings=True)
    model, words = fw.load(tmp_path / "a", activation="float")
    fw.save(model, words, tmp_path / "a")  # over the files that it was read from
    again, _ = fw.load(tmp_path / "a")
    tokens = random_tokens(2, 40)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("dequantize", [False, True])
def test_an_output_layer_quantized_apart_from_a_tied_embedding(dequantize, tmp_path, tokenizer):
    twin = write(tmp_path, "gptq", tokenizer, tie_word_embeddings=True, vocab_size=64)
    weights = tmp_path / "model.safetensors"
    head = layers.gptq(64, 64, bias=False, seed=99)
    save_file(load_file(weights) | {f"lm_head.{k}": v for k, v in head.items()}, weights)
    twin.lm_head.weight = nn.Parameter(GPTQ(4, 32).read(head).dequantize())
    model, words = fw.load(tmp_path, dequantize=dequantize)
    tokens = torch.randint(64, (1, 8))
    logits = model(tokens).logits
    torch.testing.assert_close(logits, twin(tokens).logits, rtol=1e-4, atol=1e-4)
    fw.save(model, words, tmp_path / "again")
    assert torch.equal(fw.load(tmp_path / "again")[0](tokens).logits, logits)


@pytest.mark.parametrize("dequantize", [False, True])
def test_biases_that_the_model_has_not(dequantize, tmp_path, tokenizer):
    """AutoGPTQ gives every layer one; zeros change nothing and need no place in what is saved."""
    write(tmp_path, "gptq", tokenizer)
    weights = tmp_path / "model.safetensors"
    whole = load_file(weights)
    biases = {
        name.replace("qweight", "bias"): torch.zeros(tensor.shape[1], dtype=torch.float16)
        for name, tensor in whole.items()
        if name.endswith("qweight")
    }
    save_file(whole | biases, weights)
    model, words = fw.load(tmp_path, dequantize=dequantize)
    fw.save(model, words, tmp_path / "again")
    tokens = random_tokens(1, 8)
    assert torch.equal(fw.load(tmp_path / "again")[0](tokens).logits, model(tokens).logits)
    biases["model.layers.0.mlp.up_proj.bias"][5] = 1
    save_file(whole | biases, weights)
    with pytest.raises(ValueError, match=r"up_proj has a bias that is not zero where the model"):
        fw.load(tmp_path, dequantize=dequantize)


def test_settings(tmp_path, tokenizer):
    write(tmp_path, "awq", tokenizer)
    model, _ = fw.load(tmp_path, dtype=torch.bfloat16, activation="int8")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.activation == "int8"
    assert model(random_tokens(1, 8)).logits.isfinite().all()
    with pytest.raises(ValueError, match="load: expected activation in"):
        fw.load(tmp_path, activation="int4")


def test_linear_attention_over_packed_projections(tmp_path, tokenizer):
    write(tmp_path, "gptq", tokenizer)
    model = fw.linearize(fw.load(tmp_path)[0], window=8, feature_dim=6)
    assert model(random_tokens(2, 40)).logits.isfinite().all()


def test_the_old_place_of_gptq_settings(tmp_path, tokenizer):
    twin = write(tmp_path, "gptq", tokenizer)
    change_config(tmp_path, quantization_config=None)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    tokens = random_tokens(1, 8)
    torch.testing.assert_close(
        fw.load(tmp_path)[0](tokens).logits, twin(tokens).logits, rtol=1e-3, atol=1e-3
    )


def test_no_float_copy_is_made(tmp_path, tokenizer):
    twin = write(tmp_path, "gptq", tokenizer, intermediate_size=512)
    with layers.LargestFloat() as watch:
        fw.load(tmp_path)
    assert watch.elements == twin.lm_head.weight.numel()
    assert twin.model.layers[0].mlp.up_proj.weight.numel() > 5 * watch.elements
    with layers.LargestFloat() as watch:
        fw.load(tmp_path, dequantize=True)
    assert watch.elements == twin.model.layers[0].mlp.up_proj.weight.numel()


def test_damaged_folders(tmp_path, tokenizer):
    write(tmp_path, "gptq", tokenizer, "qwen2")
    weights = tmp_path / "model.safetensors"
    whole = load_file(weights)
    name = "model.layers.0.self_attn.q_proj"

    def refused(message, **changes):
        save_file({k: v for k, v in (whole | changes).items() if v is not None}, weights)
        with pytest.raises(ValueError, match=message):
            fw.load(tmp_path)

    refused(rf"gptq: {name}\.scales: expected .*got none", **{f"{name}.scales": None})
    smaller = {f"{name}.{k}": v for k, v in layers.gptq(32, 64).items()}
    refused(rf"load: expected {name} of shape \[64, 64\], got \[32, 64\]", **smaller)
    refused(f"load: {name} has no bias where the model has one", **{f"{name}.bias": None})
    refused("has an unknown tensor model.surplus", **{"model.surplus": torch.zeros(1)})
    refused("lacks 1 tensors, the first is model.norm", **{"model.norm.weight": None})
    nan = torch.full((64,), torch.nan)
    refused("model.norm.weight in .* has values that are not finite", **{"model.norm.weight": nan})
    save_file(whole, weights)
    for config, message in (
        ({"quant_method": "quip"}, "quantization_config: expected quant_method one of"),
        ([1], "quantization_config: expected quant_method one of"),
        ({"quant_method": "gptq", "bits": 4}, "gptq: group_size: expected an integer, got none"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, r"awq: .*qweight|qzeros"),
        (compressed_config(4, True), "load: expected layers with weight_packed"),
    ):
        change_config(tmp_path, quantization_config=config)
        with pytest.raises(ValueError, match=message):
            fw.load(tmp_path)


def test_a_config_of_layers_without_end(tmp_path, tokenizer):
    write(tmp_path, "gptq", tokenizer)
    change_config(tmp_path, num_hidden_layers=10**9)
    with pytest.raises(ValueError, match="load: expected num_hidden_layers of at most"):
        fw.load(tmp_path)
