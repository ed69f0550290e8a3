"""The bare base, and LoRA as PEFT does it, over float and over bitsandbytes' 4-bit layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastweights.ops.quantization.functional import dequantize, quantized_linear
from fastweights.ops.quantization.tensor import QuantizedTensor
from fastweights.testing.opspec import Peer, Sample, sample

__all__ = ["BASE", "PEFT", "PEFT_BITSANDBYTES"]


def _base(x: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None) -> Tensor:
    if isinstance(weight, QuantizedTensor):
        return quantized_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _base_call(call: Sample) -> Sample:
    return sample(*call.args[:3])


def _load_peft() -> Callable[..., Any]:
    import peft  # noqa: F401

    return _run_peft


def _load_bitsandbytes() -> Callable[..., Any]:
    import bitsandbytes  # noqa: F401

    return _load_peft()


def _run_peft(layer: nn.Module, x: Tensor, parameters: list[Tensor], **options: Any) -> Any:
    return layer(x, **options)


def _peft_call(call: Sample) -> Sample | None:
    weight = call.args[1]
    if isinstance(weight, QuantizedTensor):
        return None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight
    return _adapted(call, linear)


def _peft_bitsandbytes_call(call: Sample) -> Sample | None:
    import bitsandbytes

    weight = call.args[1]
    if not isinstance(weight, QuantizedTensor):
        return None
    linear = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=call.args[0].dtype,
        quant_type="nf4",
    )  # fmt: skip
    linear.weight = bitsandbytes.nn.Params4bit(
        dequantize(weight), requires_grad=False, quant_type="nf4"
    )
    return _adapted(call, linear.to("cpu"))


def _adapted(call: Sample, linear: nn.Module) -> Sample:
    """The layer that PEFT puts around a linear, with the adapters of our call."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    x, _, _, lora_a, lora_b, scale = call.args
    model: Any = nn.ModuleDict({"layer": linear.requires_grad_(False)})
    for i, (a, s) in enumerate(zip(lora_a, scale.tolist(), strict=True)):
        config = LoraConfig(r=len(a), lora_alpha=len(a) * s, target_modules=["layer"])
        if i == 0:
            tuner = LoraModel(model, config, "0")
        else:
            tuner.peft_config[str(i)] = config
            tuner.inject_adapter(model, str(i))
    layer: Any = model["layer"]
    layer.set_adapter([str(i) for i in range(len(lora_a))])
    parameters = []
    for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        for module, value in ((layer.lora_A[str(i)], a), (layer.lora_B[str(i)], b)):
            module.weight = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
            parameters.append(module.weight)
    options = {}
    indices = call.kwargs.get("indices")
    if indices is not None:
        names = ["__base__" if i < 0 else str(i) for i in indices.tolist()]
        options["adapter_names"] = names
        layer.eval()
    return sample(layer, x, parameters, **options)


BASE = Peer("the bare base", load=lambda: _base, adapt=_base_call, matmul=True)
PEFT = Peer("peft", load=_load_peft, adapt=_peft_call, matmul=True)
PEFT_BITSANDBYTES = Peer(
    "peft + bitsandbytes NF4", load=_load_bitsandbytes, adapt=_peft_bitsandbytes_call
)
