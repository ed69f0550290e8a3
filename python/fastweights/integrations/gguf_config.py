"""The config of a GGUF file's model, its numbers held against the tensors."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from fastweights.quantization.formats.gguf import GGUF

__all__ = ["ARCHITECTURES", "check_blocks", "config_of"]

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_INTEGERS, _FLOATS = (0, 1, 2, 3, 4, 5, 10, 11), (6, 12)  # types of metadata
_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_BLOCK = re.compile(r"blk\.([0-9]{1,9})\.")
ROPE_FREQS = "rope_freqs.weight"


def config_of(file: GGUF) -> Any:
    """A transformers config for a file of one of `ARCHITECTURES`.

    Every size is that of a tensor, so that a damaged number cannot ask for more than the file has.

    Raises:
        ValueError: another architecture, metadata that is missing or no match for the tensors, or
            rotary frequencies that are not supported.
    """
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    kinds: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    kind = _get(file, "general.architecture", (8,), None)
    if kind not in kinds:
        raise ValueError(
            f"general.architecture: expected one of {ARCHITECTURES}, got {kind!r:.80} "
            "(dequantize=True opens what transformers knows)"
        )
    blocks = {int(m[1]) for name in file.tensors if (m := _BLOCK.match(name))}
    vocabulary, hidden = _shape(file, "token_embd.weight")
    heads = _integer(file, f"{kind}.attention.head_count")
    kv_heads = _integer(file, f"{kind}.attention.head_count_kv", heads)
    queries = _shape(file, "blk.0.attn_q.weight")[0]
    intermediate = _shape(file, "blk.0.ffn_up.weight")[0]
    for key, expected in (
        (f"{kind}.block_count", max(blocks) + 1),
        (f"{kind}.embedding_length", hidden),
        (f"{kind}.feed_forward_length", intermediate),
        (f"{kind}.vocab_size", vocabulary),
        (f"{kind}.rope.dimension_count", queries // heads),
        (f"{kind}.attention.key_length", queries // heads),
        (f"{kind}.attention.value_length", queries // heads),
    ):
        if (got := _integer(file, key, expected)) != expected:
            raise ValueError(f"{key}: expected {expected} of the tensors, got {got}")
    if len(blocks) != max(blocks) + 1:
        raise ValueError(
            f"{kind}.block_count: expected blocks 0 to {max(blocks)}, some are missing"
        )
    if queries % heads or queries // heads % 2 or heads % kv_heads:
        raise ValueError(
            f"{kind}.attention.head_count: expected {queries} rows in heads of even size, "
            f"got {heads} heads and {kv_heads} of keys"
        )
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": queries // heads,
        "max_position_embeddings": _integer(file, f"{kind}.context_length"),
        "rms_norm_eps": _positive(file, f"{kind}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, kind, queries // heads),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{name: _token(file, key, vocabulary) for name, key in _IDS.items()},
    }
    if kind == "llama":
        settings["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
        settings["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    return kinds[kind](**settings)


def check_blocks(file: GGUF) -> None:
    """Raises where the metadata, of any architecture, has more blocks than there are tensors."""
    key = f"{_get(file, 'general.architecture', (8,), None)}.block_count"
    if (blocks := _integer(file, key, 1)) > len(file.tensors):
        raise ValueError(f"{key}: expected at most {len(file.tensors)}, got {blocks}")


def _rope(file: GGUF, kind: str, head_dim: int) -> dict[str, Any]:
    parameters = {"rope_theta": _positive(file, f"{kind}.rope.freq_base", 10000.0)}
    key = f"{kind}.rope.scaling.type"
    scaling = _get(file, key, (8,), "none")
    if ROPE_FREQS in file.tensors:
        return parameters | _llama3(file, parameters["rope_theta"], head_dim)
    if scaling == "none":
        return parameters | {"rope_type": "default"}
    if scaling not in ("linear", "yarn"):
        raise ValueError(f"{key}: expected none, linear or yarn, got {scaling!r:.80}")
    parameters |= {"factor": _positive(file, f"{kind}.rope.scaling.factor")}
    if scaling == "yarn":
        original = _integer(file, f"{kind}.rope.scaling.original_context_length")
        parameters |= {"original_max_position_embeddings": original}
    return parameters | {"rope_type": scaling}


def _llama3(file: GGUF, base: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's slowed frequencies, which a file has as one divisor each, from their largest."""
    divisors = file.tensors[ROPE_FREQS].read()
    if not isinstance(divisors, Tensor):
        raise ValueError(f"{ROPE_FREQS}: expected floats, got {divisors}")
    factor, original = float(divisors.max()), 8192
    waves = 2 * math.pi * base ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((original / waves - 1) / (4 - 1)).clamp(0, 1)  # low_freq_factor 1, high_freq_factor 4
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not torch.allclose(divisors.double(), expected, 1e-4):
        raise ValueError(f"{ROPE_FREQS}: expected the divisors of Llama 3, got others")
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def _get(file: GGUF, key: str, types: tuple[int, ...], default: Any) -> Any:
    value = file.metadata.get(key)
    if value is None:
        return default
    if value.type not in types or isinstance(value.value, list):
        raise ValueError(f"{key}: expected another type, got {value.value!r:.80}")
    return value.value


def _integer(file: GGUF, key: str, default: int | None = None) -> int:
    value = _get(file, key, _INTEGERS, default)
    if value is None or not 0 < value < 1 << 31:
        raise ValueError(f"{key}: expected a positive integer, got {value}")
    return int(value)


def _positive(file: GGUF, key: str, default: float | None = None) -> float:
    value = _get(file, key, _FLOATS, default)
    if value is None or not 0 < value < math.inf:
        raise ValueError(f"{key}: expected a positive number, got {value}")
    return float(value)


def _token(file: GGUF, key: str, vocabulary: int) -> int | None:
    value = _get(file, key, _INTEGERS, None)
    if value is not None and not 0 <= value < vocabulary:
        raise ValueError(f"{key}: expected a token below {vocabulary}, got {value}")
    return value  # type: ignore[no-any-return]


def _shape(file: GGUF, name: str) -> tuple[int, int]:
    shape = () if name not in file.tensors else file.tensors[name].shape
    if len(shape) != 2:
        raise ValueError(f"{name}: expected a matrix, got {list(shape)}")
    return shape
