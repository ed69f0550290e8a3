"""Tiny models and a tokenizer, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import fastweights as fw

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3,
    "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 1,
}  # fmt: skip
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),  # biases
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),  # norms of q and k
}


def softmax_model(kind: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    config, model = KINDS[kind]
    return model(config(**SIZES | changes)).eval()


def linear_model(recipe: str = "stable", kind: str = "llama", **changes: Any) -> Any:
    """A converted model whose new parameters are not what they start from."""
    model = fw.linearize(
        softmax_model(kind, **changes), recipe, window=None if recipe == "hedgehog" else 4
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("feature_", "gain", "mix", "sink_")):
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def quantized_model(
    recipe: str = "stable", kind: str = "llama", *, activation: str = "int8", **changes: Any
) -> Any:
    model = linear_model(recipe, kind, **changes)
    settings = {"activation": activation, "skip": (), "embedding_format": "int8"}
    return fw.quantize_(model, "int4", group_size=32, **settings)


def tokenizer() -> PreTrainedTokenizerFast:
    """Printable characters, one token each, `<end>` and a chat template."""
    letters = [chr(c) for c in range(32, 126)]
    vocabulary = {"?unknown?": 0, "<end>": 1} | {c: i + 2 for i, c in enumerate(letters)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?unknown?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="?unknown?")
    made.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    return made
