"""Specs of the quantization family."""

from __future__ import annotations

import torch
from torch import Tensor

from fastweights.ops.quantization import functional, gptq_block_spec, reference
from fastweights.ops.quantization.formats import FORMATS
from fastweights.ops.quantization.tensor import QuantizedTensor
from fastweights.testing.opspec import BadInput, BenchCase, OpSpec, Sample, Tolerance, sample
from fastweights.testing.peers import quantized_linear as peers

EXACT = Tolerance(output=2e-6, gradient=2e-6)
TOLERANCES = {
    torch.float32: EXACT,
    torch.bfloat16: Tolerance(output=1e-2, gradient=1e-2),  # AMX: the weight is rounded, too
    torch.float16: Tolerance(output=7e-4, gradient=7e-4),
    torch.float64: Tolerance(output=1e-12, gradient=1e-12),
}


KINDS = [name for name in FORMATS if "_zp" not in name] + ["int4_zp", "int3_zp", "int8_zp32"]
"""Every way to read codes and every way to read parameters, if not all their combinations."""

# N, K, format, group size, rows of x: each format by one row, a few and many, with odd sizes.
OTHERS = [
    (n, k, name, FORMATS[name].group_size, rows)
    for name in KINDS
    if name not in ("int4", "int8")
    for n, k, rows in ((37, 129, (1,)), (20, 150, (2, 2)), (33, 70, (61,)))
] + [
    (20, 150, name, 16, rows)
    for name in ("int2", "int4", "int6", "int8")
    for rows in ((1,), (2, 2), (61,))
]


def _weight(
    n: int, k: int, format: str, group_size: int, activation: str = "float", seed: int = 0
) -> QuantizedTensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return functional.quantize(w, format, group_size=group_size, activation=activation)


def _x(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _linear_samples(activation: str, dtype: torch.dtype) -> list[Sample]:
    calls = []
    for n, k, format, group, rows in (
        (37, 129, "int4", 32, (1,)),
        (48, 100, "int4", 64, (2, 3)),
        (16, 64, "int8", 64, (5,)),
        (33, 300, "int8", 128, (1,)),
        (1, 1, "int4", 32, (7,)),
        (20, 150, "int4", 64, (61,)),
        (20, 70, "int8", 32, (61,)),
        (20, 64, "int4", 64, (0, 3)),
        *OTHERS,
    ):
        if activation not in FORMATS[format].activations:
            continue
        weight = _weight(n, k, format, group, activation)
        bias = _x(n, dtype=dtype, seed=2) if n != 16 else None
        calls.append(sample(_x(*rows, k, dtype=dtype), weight, bias))
    return calls


def _samples(dtype: torch.dtype) -> list[Sample]:
    """Both activation modes, but for float64: int8 sums in float32 whatever the dtype of x."""
    vector = sample(_x(40, dtype=dtype), _weight(0, 40, "int4", 32))
    int8 = _linear_samples("int8", dtype) if dtype != torch.float64 else []
    return [*_linear_samples("float", dtype), vector, *int8]


def _gradcheck_calls() -> list[Sample]:
    """Both first formats, and every other one with a few rows."""
    calls = _linear_samples("float", torch.float64)
    return calls[:6] + [call for call in calls[8:] if call.args[0].dim() == 3]


def _raw(**changed: object) -> Tensor:
    """`torch.ops.fastweights.quantized_linear` of a weight [48, 100] with some arguments wrong."""
    call: dict[str, object] = {
        "x": torch.zeros(3, 100),
        "packed": _weight(48, 100, "int4", 64).packed,
        "bias": None,
        "format": "int4",
        "out_features": 48,
        "in_features": 100,
        "group_size": 64,
        "activation": "int8",
    }
    result: Tensor = torch.ops.fastweights.quantized_linear(**(call | changed))
    return result


def _public(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.quantized_linear(x, _weight(48, 100, "int4", 64), bias)


LINEAR_BAD = [
    BadInput(
        lambda: _public(torch.zeros(3, 99)),
        RuntimeError,
        r"quantized_linear: expected x of shape \[\.\.\., in_features\] = \[\.\.\., 100\], got \[3",
    ),
    BadInput(
        lambda: _public(torch.zeros(3, 100), torch.zeros(47)),
        RuntimeError,
        r"quantized_linear: expected bias of shape \[out_features\] = \[48\]",
    ),
    BadInput(lambda: _public(torch.zeros(3, 100).int()), RuntimeError, r"expected x of dtype"),
    BadInput(lambda: _public(torch.zeros(())), RuntimeError, r"expected x of shape"),
    BadInput(
        lambda: _raw(out_features=49),
        RuntimeError,
        r"quantized_linear: expected packed of shape \[strips, bytes\] = \[4, 1152\]",
    ),
    BadInput(lambda: _raw(in_features=129), RuntimeError, r"expected packed of shape"),
    BadInput(lambda: _raw(format="int8"), RuntimeError, r"expected packed of shape"),
    BadInput(
        lambda: _raw(format="int7"), RuntimeError, r"expected format in int4, int8, .* got 'int7'"
    ),
    BadInput(
        lambda: _raw(format="mxfp4"),
        RuntimeError,
        r"expected group_size 32 for format mxfp4, got 64",
    ),
    BadInput(
        lambda: _raw(group_size=-64), RuntimeError, r"expected group_size a positive multiple"
    ),
    BadInput(lambda: _raw(group_size=48), RuntimeError, r"expected group_size a positive multiple"),
    BadInput(lambda: _raw(out_features=2**62), RuntimeError, r"expected 0 <= out_features < 2\^31"),
    BadInput(lambda: _raw(in_features=-1), RuntimeError, r"expected 0 <= in_features < 2\^31"),
    BadInput(lambda: _raw(activation="int4"), RuntimeError, r"expected activation int8 or float"),
    BadInput(
        lambda: _raw(format="fp8_e4m3", packed=_weight(48, 100, "fp8_e4m3", 64).packed),
        RuntimeError,
        r"expected activation float for format fp8_e4m3, got int8",
    ),
    BadInput(
        lambda: _raw(packed=torch.zeros(3, 1152)), RuntimeError, r"expected packed of dtype uint8"
    ),
]


def _bench(
    n: int, k: int, m: int, activation: str, format: str = "int4", *dtypes: torch.dtype
) -> BenchCase:
    bits = FORMATS[format].bundle_bytes(64) * 8 / (16 * 64 * FORMATS[format].bundle)
    return BenchCase(
        f"{format} {activation} M{m} N{n} K{k}",
        make=lambda dtype: sample(_x(m, k, dtype=dtype), _weight(n, k, format, 64, activation)),
        flops=2.0 * m * n * k,
        bytes=n * k * bits / 8 + 4 * m * (n + k),
        reference=m * n * k < 1 << 31,
        # 256 MiB of weights, as much as the bandwidth is measured on.
        copies=(1 << 29) // (n * k) if m == 1 else 1,
        dtypes=dtypes or (torch.float32,),
    )


BENCH = [
    _bench(n, k, m, activation)
    for n, k in ((4096, 4096), (1536, 576))
    for m in (1, 16, 512)
    for activation in ("int8", "float")
]
# A frozen base under adapters (QLoRA): the exact path, both directions.
BENCH += [
    _bench(4096, 4096, m, "float", "nf4", torch.float32, torch.bfloat16) for m in (1, 16, 512)
]

SPECS = [
    OpSpec(
        name="quantized_linear",
        family="quantization",
        function=functional.quantized_linear,
        reference=reference.quantized_linear,
        samples=_samples,
        tolerances=TOLERANCES,
        differentiable=("x", "bias"),
        gradcheck=_gradcheck_calls,
        bad_inputs=LINEAR_BAD,
        bench=BENCH,
        peers=(peers.DENSE, peers.INT4PACK, peers.ONNXRUNTIME, peers.BITSANDBYTES),
    ),
    gptq_block_spec.SPEC,
]
