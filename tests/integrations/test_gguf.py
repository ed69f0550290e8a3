"""GGUF files opened as models: packed, and dequantized by transformers."""

import gguf
import numpy as np
import pytest
import torch

import fastweights as fw
from checkpoint_layers import LargestFloat
from fastweights.demo.model import smollm2
from fastweights.integrations.gguf import load_gguf, load_packed_gguf
from fastweights.nn import QuantizedEmbedding, QuantizedLinear
from fastweights.quantization.formats import GGUF, GGUFTensor, GGUFValue, read_gguf, write_gguf

HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCABULARY = 64, 96, 4, 2, 16, 60


def shapes(dim):
    return {
        "attn_q": (HEADS * dim, HIDDEN), "attn_k": (KV_HEADS * dim, HIDDEN),
        "attn_v": (KV_HEADS * dim, HIDDEN), "attn_output": (HIDDEN, HEADS * dim),
        "ffn_up": (INNER, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
    }  # fmt: skip


MIXED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "MXFP4")


def write(path, architecture="llama", types=("Q8_0",), *, tied=False, embedding="Q8_0", dim=DIM):
    """A model of two layers and a byte-level tokenizer, as llama.cpp writes them."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(dim)
    tokens = [chr(ord("!") + i) for i in range(VOCABULARY - 1)] + ['"#']
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([f"{tokens[1]} {tokens[2]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    rng = np.random.default_rng(0)

    def add(name, shape, type_name):
        w = (0.3 * rng.standard_normal(shape)).astype(np.float32)
        kind = gguf.GGMLQuantizationType[type_name]
        writer.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)

    add("token_embd.weight", (VOCABULARY, HIDDEN), embedding)
    if not tied:
        add("output.weight", (VOCABULARY, HIDDEN), embedding)
    add("output_norm.weight", (HIDDEN,), "F32")
    for layer in range(2):
        for i, (name, shape) in enumerate(shapes(dim).items()):
            add(f"blk.{layer}.{name}.weight", shape, types[(layer + i) % len(types)])
            if architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                add(f"blk.{layer}.{name}.bias", shape[:1], "F32")
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", (HIDDEN,), "F32")
        if architecture == "qwen3":
            for name in ("attn_q_norm", "attn_k_norm"):
                add(f"blk.{layer}.{name}.weight", (dim,), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokens(*shape):
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(2))


def float_weights(model):
    """State dict with packed weights dequantized."""
    state = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            state[f"{name}.weight"] = fw.dequantize(module.weight)
    return state | {k: v for k, v in model.state_dict().items() if not k.endswith("packed")}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_model_as_transformers_makes_of_it(architecture, tied, tmp_path):
    dim = 128 if architecture == "qwen3" else DIM  # transformers takes no other from a file
    path = write(tmp_path / "a.gguf", architecture, MIXED, tied=tied, dim=dim)
    model, words = fw.load(path)
    twin, their_words = load_gguf(path)
    ours, theirs = float_weights(model), twin.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    x = tokens(2, 30)
    torch.testing.assert_close(model(x).logits, twin(x).logits, rtol=1e-4, atol=1e-4)
    assert words("B")["input_ids"] == their_words("B")["input_ids"]
    config = model.config.to_dict()
    for key, value in twin.config.to_dict().items():
        if key not in ("_name_or_path", "unk_token_id", "pad_token_id", "dtype"):
            assert config.get(key) == value, key
    quantized = sum(isinstance(m, QuantizedLinear | QuantizedEmbedding) for m in model.modules())
    assert quantized == 2 + 10  # of 14 linear layers, 4 are float


@pytest.mark.parametrize("embedding", ["Q8_0", "F16"])
def test_saved_and_opened_again(embedding, tmp_path):
    model, words = fw.load(write(tmp_path / "a.gguf", tied=True, embedding=embedding))
    fw.save(model, words, tmp_path / "b")
    again, _ = fw.load(tmp_path / "b")
    x = tokens(2, 30)
    assert torch.equal(again(x).logits, model(x).logits)


def test_no_float_copy_is_made(tmp_path):
    path = write(tmp_path / "a.gguf", types=("Q4_0",))
    with LargestFloat() as watch:
        fw.load(path)
    assert 0 < watch.elements <= VOCABULARY * HIDDEN // 8
    with LargestFloat() as watch:
        fw.load(path, dequantize=True)
    assert watch.elements >= INNER * HIDDEN


@pytest.mark.parametrize("config", [False, True])
def test_a_folder_with_a_file(config, tmp_path):
    """Some have the config.json of the model that the file was made of."""
    path = write(tmp_path / "a.gguf")
    model, _ = fw.load(path)
    if config:
        model.config.save_pretrained(tmp_path)
    again, _ = fw.load(tmp_path)
    assert torch.equal(again(tokens(1, 8)).logits, model(tokens(1, 8)).logits)


def test_settings(tmp_path):
    path = write(tmp_path / "a.gguf", types=("Q4_0", "F16"), embedding="F16")
    model, _ = fw.load(path, dtype=torch.bfloat16, activation="int8")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.q_proj.activation == "int8"
    assert model(tokens(1, 8)).logits.isfinite().all()


def test_the_models_greedy_tokens():
    """SmolLM2 as it lies in its package: the packed weights, and transformers' float ones."""
    model, words = load_packed_gguf(smollm2())
    twin, _ = load_gguf(smollm2())
    ours, theirs = float_weights(model), twin.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    for prompt in ("The capital of France is", "def fibonacci(n):", "Once upon a time there was"):
        ids = words(prompt, return_tensors="pt")
        settings = {"max_new_tokens": 16, "do_sample": False}
        assert torch.equal(model.generate(**ids, **settings), twin.generate(**ids, **settings))


class TestDequantized:
    def test_it_is_a_plain_model(self, tmp_path):
        path = write(tmp_path / "a.gguf")
        model, tokenizer = fw.load(path, dequantize=True)
        assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
        assert tokenizer("B")["input_ids"]
        fw.linearize(model, window=64, feature_dim=6)
        assert model(tokens(1, 12)).logits.isfinite().all()
        model.save_pretrained(tmp_path / "out")

    def test_tensors_that_are_missing(self, tmp_path):
        path = write(tmp_path / "a.gguf")
        file = read_gguf(path)
        write_gguf(path, GGUF(file.metadata, without("blk.1.ffn_gate.weight")(file.tensors)))
        message = r"^load_gguf: .* lacks 1 tensors, the first is model.layers.1.mlp.gate_proj"
        with pytest.raises(ValueError, match=message):
            fw.load(path, dequantize=True)

    def test_blocks_without_end(self, tmp_path):
        path = write(tmp_path / "a.gguf")
        file = read_gguf(path)
        endless = {"llama.block_count": GGUFValue(UINT32, 10**9)}
        write_gguf(path, GGUF(file.metadata | endless, file.tensors))
        message = r"^load_gguf: .*llama.block_count: expected at most 21, got 1000000000"
        with pytest.raises(ValueError, match=message):
            fw.load(path, dequantize=True)

    def test_a_type_that_is_not_packed(self, tmp_path):
        path = write(tmp_path / "a.gguf")
        file = read_gguf(path)
        name = "blk.0.attn_output.weight"
        odd = GGUFTensor(name, 27, (HIDDEN, HIDDEN), np.zeros((HIDDEN, 8 * HIDDEN), np.uint8))
        write_gguf(path, GGUF(file.metadata, file.tensors | {name: odd}))
        with pytest.raises(ValueError, match=r"load_gguf: .*attn_output.*read here .* got I64"):
            fw.load(path)


@pytest.mark.parametrize("dequantize", [False, True])
def test_damaged_files_are_one_line(dequantize, tmp_path):
    path = write(tmp_path / "a.gguf")
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"GGML" + whole[4:],
        whole[:40],
        whole[: len(whole) // 2],
        whole[:-64],
        whole[:8] + b"\xff" * 8 + whole[16:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^load_gguf: ") as error:
            fw.load(path, dequantize=dequantize)
        assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    for load in (load_gguf, load_packed_gguf):
        with pytest.raises(ValueError, match="cannot be read"):
            load(tmp_path / "none.gguf")


UINT32, FLOAT32, STRING = 4, 6, 8
METADATA = {
    "general.architecture": (GGUFValue(STRING, "mamba"), "expected one of .*, got 'mamba'"),
    "llama.block_count": (GGUFValue(UINT32, 10**9), "expected 2 of the tensors, got 1000000000"),
    "llama.embedding_length": (GGUFValue(UINT32, 128), "expected 64 of the tensors, got 128"),
    "llama.feed_forward_length": (GGUFValue(UINT32, [96, 96]), "expected another type"),
    "llama.vocab_size": (GGUFValue(UINT32, 61), "expected 60 of the tensors, got 61"),
    "llama.attention.head_count": (GGUFValue(UINT32, 0), "expected a positive integer, got 0"),
    "llama.attention.head_count_kv": (GGUFValue(UINT32, 3), "expected 64 rows in heads"),
    "llama.attention.layer_norm_rms_epsilon": (
        GGUFValue(FLOAT32, float("nan")), "expected a positive number, got nan"
    ),
    "llama.rope.freq_base": (GGUFValue(FLOAT32, -1.0), "expected a positive number, got -1.0"),
    "llama.rope.scaling.type": (GGUFValue(STRING, "su"), "expected none, linear or yarn"),
    "llama.rope.dimension_count": (GGUFValue(UINT32, 8), "expected 16 of the tensors, got 8"),
    "tokenizer.ggml.bos_token_id": (GGUFValue(UINT32, 60), "expected a token below 60, got 60"),
}  # fmt: skip


@pytest.mark.parametrize("key", METADATA)
def test_metadata_that_the_tensors_contradict(key, tmp_path):
    value, message = METADATA[key]
    path = write(tmp_path / "a.gguf")
    file = read_gguf(path)
    write_gguf(path, GGUF(file.metadata | {key: value}, file.tensors))
    if key == "llama.attention.head_count_kv":
        key = "llama.attention.head_count"
    with pytest.raises(ValueError, match=f"load_gguf: .*{key}: {message}"):
        fw.load(path)


def renamed(old, new):
    return lambda tensors: {new if k == old else k: v for k, v in tensors.items()}


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def instead(name, tensor, type_name):
    return lambda tensors: tensors | {name: GGUFTensor.of(name, tensor, type_name)}


TENSORS = [
    (without("token_embd.weight"), "token_embd.weight: expected a matrix, got"),
    (without("output_norm.weight"), "lacks 1 tensors, the first is model.norm.weight"),
    (without("blk.1.ffn_gate.weight"), "lacks 1 tensors, the first is model.layers.1.mlp"),
    (renamed("blk.1.ffn_up.weight", "blk.7.ffn_up.weight"), "block_count: expected 8 of the"),
    (renamed("blk.1.ffn_up.weight", "blk.1.ffn_moe.weight"), "ffn_moe.weight: expected a tensor"),
    (renamed("blk.1.ffn_up.weight", "blk.1.attn_q_norm.weight"), "expected no quantized tensor"),
    (instead("rope_freqs.weight", torch.rand(8), "F32"), "rope_freqs.weight: expected the divis"),
    (
        instead("rope_freqs.weight", fw.quantize(torch.rand(8, 32), "q8_0"), "Q8_0"),
        "rope_freqs.weight: expected floats, got Quant",
    ),
    (renamed("blk.1.ffn_up.weight", "blk.01.ffn_up.weight"), "blk.01.ffn_up.weight: expected a"),
    (
        instead("blk.1.attn_norm.weight", torch.zeros(63), "F32"),
        r"expected model.layers.1.input_layernorm.weight of shape \[64\]",
    ),
    (
        instead("blk.1.ffn_up.weight", torch.zeros(95, 64), "F32"),
        r"mlp.up_proj.weight of shape \[96, 64\]",
    ),
]


def test_a_bias_of_another_size(tmp_path):
    path = write(tmp_path / "a.gguf", "qwen2")
    file = read_gguf(path)
    bias = GGUFTensor.of("blk.0.attn_v.bias", torch.zeros(7), "F32")
    write_gguf(tmp_path / "b.gguf", GGUF(file.metadata, file.tensors | {bias.name: bias}))
    with pytest.raises(ValueError, match=r"v_proj.bias of shape \[32\], got \[7\]"):
        fw.load(tmp_path / "b.gguf")


@pytest.mark.parametrize(("change", "message"), TENSORS, ids=[str(i) for i in range(len(TENSORS))])
def test_tensors_that_do_not_make_a_model(change, message, tmp_path):
    path = write(tmp_path / "a.gguf")
    file = read_gguf(path)
    with pytest.raises(ValueError, match="load_gguf: .*" + message):
        write_gguf(tmp_path / "b.gguf", GGUF(file.metadata, change(file.tensors)))
        fw.load(tmp_path / "b.gguf")


def rope(path, tmp_path, tensors=(), **metadata):
    file = read_gguf(path)
    changed = GGUF(file.metadata | metadata, file.tensors | dict(tensors))
    write_gguf(tmp_path / "b.gguf", changed)
    return fw.load(tmp_path / "b.gguf")[0]


def test_scaled_rotations(tmp_path):
    path = write(tmp_path / "a.gguf")
    scaling = "llama.rope.scaling"
    linear = {
        f"{scaling}.type": GGUFValue(STRING, "linear"),
        f"{scaling}.factor": GGUFValue(FLOAT32, 4.0),
    }
    plain, slow = fw.load(path)[0], rope(path, tmp_path, **linear)
    assert torch.equal(slow.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq / 4)
    yarn = linear | {
        f"{scaling}.type": GGUFValue(STRING, "yarn"),
        f"{scaling}.original_context_length": GGUFValue(UINT32, 32),
    }
    assert rope(path, tmp_path, **yarn).config.rope_parameters["rope_type"] == "yarn"


def test_rotations_of_llama_3(tmp_path):
    """The file has divisors; transformers' own scaling gives the same frequencies."""
    path = write(tmp_path / "a.gguf")
    base = 10000.0 ** (torch.arange(0, DIM, 2) / DIM)
    waves = 6.283185307179586 * base
    smooth = ((8192 / waves - 1) / 3).clamp(0, 1)
    divisors = 1 / ((1 - smooth) / 32 + smooth)
    tensor = GGUFTensor.of("rope_freqs.weight", divisors, "F32")
    model = rope(path, tmp_path, {tensor.name: tensor})
    assert model.config.rope_parameters["factor"] == divisors.max()
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, 1 / base / divisors)
