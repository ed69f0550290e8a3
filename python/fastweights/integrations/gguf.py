"""llama.cpp's model files as Hugging Face models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastweights.conversion.checkpoints import empty_model, fill_model, put_embedding, put_layer
from fastweights.integrations.gguf_config import ROPE_FREQS, check_blocks, config_of
from fastweights.ops.quantization.tensor import QuantizedTensor
from fastweights.quantization.formats.check import broken
from fastweights.quantization.formats.gguf import GGUF, read_gguf
from fastweights.quantization.formats.layer import Layer

T = TypeVar("T")

# Architectures whose rows of q and k lie in llama.cpp's order, in which the two numbers of a
# rotated pair are neighbours.
_PAIRED = ("llama",)
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.([a-z_]+)\.(weight|bias)")


def load_gguf(path: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Opens a GGUF file as a Hugging Face model with dequantized weights, and its tokenizer.

    Args:
        path: the file.
        dtype: of the weights.

    Returns:
        (model, tokenizer), the model in evaluation mode; it can be saved and converted like any
        other.

    Raises:
        ValueError: the file is truncated, damaged or of an architecture that transformers does not
            read.
    """
    source = Path(path)
    file = _open(source)
    try:
        check_blocks(file)
    except ValueError as error:
        raise ValueError(f"load_gguf: {source}: {error}") from error
    from transformers import AutoModelForCausalLM

    model, found = _by_transformers(
        source,
        lambda: AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=dtype, output_loading_info=True
        ),
    )
    if missing := sorted(found["missing_keys"]):  # transformers makes random ones
        raise ValueError(
            f"load_gguf: {source} lacks {len(missing)} tensors, the first is {missing[0]}"
        )
    tokenizer = _tokenizer(source)
    bad = next((name for name, p in model.named_parameters() if not bool(p.isfinite().all())), None)
    if bad is not None:
        raise ValueError(f"load_gguf: {bad} in {source} has values that are not finite")
    # The weights are plain now; left as they are, these marks make transformers refuse to save or
    # train the model.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    return model.eval(), tokenizer


def load_packed_gguf(
    path: str | Path, *, dtype: torch.dtype = torch.float32, activation: str = "float"
) -> tuple[Any, Any]:
    """Opens a GGUF file as a Hugging Face model whose quantized weights stay as they are, packed.

    Linear layers become `fastweights.nn.QuantizedLinear`, a quantized embedding
    `fastweights.nn.QuantizedEmbedding`; no weight is rounded.

    Args:
        path: the file, of the architecture llama (Mistral and SmolLM among them), qwen2 or qwen3,
            its weights in types that docs/checkpoints.md lists.
        dtype: of the other weights.
        activation: see `fastweights.quantize`.

    Returns:
        (model, tokenizer), the model in evaluation mode.

    Raises:
        ValueError: the file is truncated, damaged or not supported.
    """
    source = Path(path)
    file = _open(source)
    try:
        model = empty_model(config_of(file), dtype, len(file.tensors))
        _fill(source, file, model, dtype, activation)
    except ValueError as error:
        raise ValueError(f"load_gguf: {source}: {error}") from error
    return model.eval(), _tokenizer(source)


def _fill(source: Path, file: GGUF, model: Any, dtype: torch.dtype, activation: str) -> None:
    paired = model.config.model_type in _PAIRED
    heads = {
        "self_attn.q_proj": model.config.num_attention_heads,
        "self_attn.k_proj": model.config.num_key_value_heads,
    }
    plain: dict[str, Tensor] = {}
    packed: dict[str, QuantizedTensor] = {}
    for name, tensor in file.tensors.items():
        if name == ROPE_FREQS:  # in the config
            continue
        target = _name(name)
        count = heads.get(".".join(target.split(".")[-3:-1])) if paired else None
        rows = None if count is None else _unpaired(name, tensor.shape, count)
        value = tensor.read(rows=rows, activation=activation)
        if isinstance(value, Tensor):
            plain[target] = value
        else:
            packed[target] = value
    done: set[str] = set()
    modules = dict(model.named_modules())
    for target, weight in packed.items():
        name, _, part = target.rpartition(".")
        kind = type(modules.get(name)) if part == "weight" else None
        if kind is nn.Linear:
            layer = Layer(weight, bias=plain.pop(f"{name}.bias", None))
            done |= put_layer(model, name, layer, dtype, dequantize=False)
        elif kind is nn.Embedding:
            done |= put_embedding(model, name, weight, dtype)
        else:
            raise ValueError(f"{target}: expected no quantized tensor, got {weight}")
    fill_model(source, model, plain, dtype, done)


def _name(name: str) -> str:
    """The state-dict name of a tensor."""
    if name in _OUTER:
        return _OUTER[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _INNER:
        raise broken("gguf", name, "a tensor of the architecture", "another")
    return f"model.layers.{int(match[1])}.{_INNER[match[2]]}.{match[3]}"


def _unpaired(name: str, shape: tuple[int, ...], heads: int) -> Tensor:
    """Where the rows of a head come from: all first numbers of rotated pairs, then all second."""
    if shape[0] % (2 * heads):
        raise ValueError(f"{name}: expected rows in multiples of {2 * heads}, got {shape[0]}")
    return torch.arange(shape[0]).view(heads, -1, 2).transpose(1, 2).flatten()


def _open(source: Path) -> GGUF:
    try:
        return read_gguf(source)
    except ValueError as error:
        raise ValueError(f"load_gguf: {source} is truncated or damaged: {error}") from error


def _tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    return _by_transformers(
        source, lambda: AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    )


def _by_transformers(source: Path, call: Callable[[], T]) -> T:
    """What transformers makes of a file; its errors as ours."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # no common type; a panic of the tokenizer is no Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"load_gguf: {source} is damaged or not supported: {reason}") from error
