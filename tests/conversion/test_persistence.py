import json

import pytest
import torch

import fastweights as fw
from fastweights.adapters import LoRA
from fastweights.nn import QuantizedLinear

from .conftest import random_tokens, shake, tiny


@pytest.fixture(params=[("llama", "stable"), ("qwen3", "lolcats"), ("qwen2", "hedgehog")])
def folder(request, tmp_path, tokenizer):
    kind, recipe = request.param
    kept = (0,) if kind == "qwen3" else ()
    model = shake(
        fw.linearize(
            tiny(kind, tie_word_embeddings=kind == "llama"),
            recipe,
            feature_dim=6,
            keep_softmax=kept,
        )
    )
    fw.save(model, tokenizer, tmp_path / "model")
    return model, tmp_path / "model"


def test_what_was_saved_is_loaded(folder, tokenizer):
    model, path = folder
    again, words = fw.load(path)
    tokens = random_tokens(2, 100)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.config.fastweights == model.config.fastweights
    assert words.chat_template == tokenizer.chat_template
    if model.config.model_type == "llama":  # the others come with tokenizer classes of their own
        assert words("w5 w9")["input_ids"] == [5, 9]


def test_save_pretrained_suffices(tmp_path, tokenizer):
    model = shake(fw.linearize(tiny(), feature_dim=6))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    tokens = random_tokens(2, 100)
    assert torch.equal(fw.load(tmp_path)[0](tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("recipe", [None, "stable"])
def test_quantized_models_are_saved_packed(recipe, tmp_path, tokenizer):
    model = tiny(tie_word_embeddings=True, hidden_size=64, intermediate_size=96)
    if recipe:
        shake(fw.linearize(model, recipe, window=8, feature_dim=6))
    fw.quantize_(model, "int4", group_size=32, embedding_format="int8")
    fw.save(model, tokenizer, tmp_path)
    again, _ = fw.load(tmp_path)
    tokens = random_tokens(2, 30)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.lm_head.packed.data_ptr() == again.model.embed_tokens.packed.data_ptr()
    (tmp_path / "fastweights.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config["fastweights"]["quantized"][0]["format"] = "int7"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the entry quantized of config\.json is damaged"):
        fw.load(tmp_path)


def test_an_order_of_the_inputs_is_saved(tmp_path, tokenizer):
    model = tiny(hidden_size=64, intermediate_size=96)
    fw.quantize_(model, "int4", group_size=32)
    mlp = model.model.layers[0].mlp
    mlp.down_proj = QuantizedLinear(mlp.down_proj.weight, None, torch.randperm(96))
    fw.save(model, tokenizer, tmp_path)
    again, _ = fw.load(tmp_path)
    tokens = random_tokens(2, 30)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    (tmp_path / "fastweights.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    for entry in config["fastweights"]["quantized"]:
        entry["ordered"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the entry quantized of config\.json is damaged"):
        fw.load(tmp_path)


def test_a_softmax_model_is_loaded_as_it_is(tmp_path, tokenizer):
    model = tiny()
    fw.save(model, tokenizer, tmp_path)
    tokens = random_tokens(2, 20)
    torch.testing.assert_close(fw.load(tmp_path)[0](tokens).logits, model(tokens).logits)


def test_trained_adapters_must_be_merged_first(tmp_path, tokenizer):
    model = fw.linearize(tiny(), feature_dim=6)
    fw.adapt(model, LoRA(targets=["q_proj"]))
    with pytest.raises(ValueError, match="save: expected merged adapters"):
        fw.save(model, tokenizer, tmp_path)


def test_every_changed_bit_is_noticed(folder):
    _, path = folder
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for damaged in (
            whole[:-3],
            whole[: len(whole) // 2]
            + bytes([whole[len(whole) // 2] ^ 1])
            + whole[len(whole) // 2 + 1 :],
        ):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"^load: ") as error:
                fw.load(path)
            assert "\n" not in str(error.value)
        file.write_bytes(whole)
    fw.load(path)


def test_damage_without_checksums(folder):
    _, path = folder
    (path / "fastweights.json").unlink()
    weights, config = path / "model.safetensors", path / "config.json"
    whole, description = weights.read_bytes(), json.loads(config.read_text())

    def refused(message):
        with pytest.raises(ValueError, match=message):
            fw.load(path)

    for damaged in (
        b"",
        whole[:5],
        whole[: len(whole) // 2],
        b"\xff" * 8 + whole[8:],
        whole + b"x",
    ):
        weights.write_bytes(damaged)
        refused("missing, truncated or damaged")
    nan = torch.tensor([float("nan")]).numpy().tobytes()
    weights.write_bytes(whole[:-4] + nan)
    refused("values that are not finite")
    weights.write_bytes(whole)
    for key, value in (
        ("window", "64"),
        ("window", -1),
        ("layout", "spiral"),
        ("surplus", 1),
        ("feature_dim", True),
    ):
        entry = json.loads(json.dumps(description["fastweights"]))
        entry["recipe"][key] = value
        config.write_text(json.dumps(description | {"fastweights": entry}))
        refused("the entry fastweights of .* is damaged")
    config.write_text(json.dumps(description | {"fastweights": [1]}))
    refused("the entry fastweights of .* is damaged")
    entry = json.loads(json.dumps(description["fastweights"]))
    entry["recipe"]["feature_dim"] = 5
    config.write_text(json.dumps(description | {"fastweights": entry}))
    refused(r"expected .* of shape")
    config.write_text("{")
    refused("config.json is damaged")
    config.unlink()
    refused("expected a model folder with config.json or a GGUF file")


def test_no_pickle_is_read(tmp_path):
    model = tiny()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^load: "):
        fw.load(tmp_path)
