"""llama.cpp's model files as Hugging Face models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_MAGIC = b"GGUF"


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
    _check(source)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=dtype
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # no common type; a panic of the tokenizer is no Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"load_gguf: {source} is damaged or not supported: {reason}") from error
    bad = next((name for name, p in model.named_parameters() if not bool(p.isfinite().all())), None)
    if bad is not None:
        raise ValueError(f"load_gguf: {bad} in {source} has values that are not finite")
    # The weights are plain now; left as they are, these marks make transformers refuse to save or
    # train the model.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    return model.eval(), tokenizer


def _check(source: Path) -> None:
    """Refuses what is no GGUF file, and one whose tensors do not lie within it."""
    import gguf

    try:
        with source.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ValueError(f"load_gguf: {source} cannot be read: {error.strerror}") from error
    if magic != _MAGIC:
        raise ValueError(
            f"load_gguf: expected {source} to start with {_MAGIC!r}, it starts with {magic!r}"
        )
    size = source.stat().st_size
    try:
        tensors = gguf.GGUFReader(source).tensors
    except Exception as error:  # numpy, struct, unicode and key errors, by the place of the damage
        raise ValueError(
            f"load_gguf: {source} is truncated or damaged: {str(error).splitlines()[:1]}"
        ) from error
    for tensor in tensors:
        if int(tensor.data_offset) + int(tensor.n_bytes) > size:
            raise ValueError(
                f"load_gguf: {source} is truncated: {tensor.name} ends beyond its {size} bytes"
            )
