"""Tokens per second and resident memory by the length of the context, in a process of its own.

Run as `python -m fastweights.demo.speed DIR TEXT DTYPE CONTEXT...`; prints one JSON object per
context.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fastweights.demo.model import Text, is_linear, prompt_chunk
from fastweights.generation.engine import Engine
from fastweights.generation.state import GenerationState

STEPS = 64
REPEATS = 3


def measure(
    model: Path,
    text: Path,
    contexts: tuple[int, ...],
    *,
    dtype: str = "float32",
    runner: str = "fastweights.demo.speed",
) -> dict[str, dict[str, float]]:
    """{context: {"tokens/s": decoding, "MB": resident memory, "prefill tokens/s": ...}}.

    Args:
        model: a model folder or GGUF file.
        text: tokens, as `Text.save` keeps them.
        dtype: of the weights and activations that are not quantized.
        runner: module that is run with these arguments.
        contexts: ascending lengths. A converted model is read into once and goes on from there.
    """
    command = [sys.executable, "-m", runner, str(model), str(text), dtype, *map(str, contexts)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = (json.loads(line) for line in run.stdout.splitlines() if line.startswith("{"))
    return {str(line.pop("context")): line for line in lines}


def _main(path: str, tokens: Path, dtype: torch.dtype, contexts: list[int]) -> None:
    from fastweights import load
    from fastweights.generation.compiled import engine_for

    model = load(path)[0].to(dtype)
    text = Text.load(tokens).train
    rows: list[dict[str, float]] = []
    pasts: list[Engine | Path] = []
    state: GenerationState | None = None
    read = 0
    with torch.inference_mode(), TemporaryDirectory() as folder:
        for context in contexts:
            engine = engine_for(model, chunk=prompt_chunk(model, context - read), start=state)
            started = time.perf_counter()
            engine.read([text[read:context]])
            seconds = time.perf_counter() - started
            row = {"context": context, "prefill tokens/s": (context - read) / seconds}
            if is_linear(model):
                # On disk, so that the memory of one context does not hold the states of others.
                file = Path(folder, str(context))
                state, read = engine.state().select([0]), context
                state.save(file)
                pasts.append(file)
            else:
                pasts.append(engine)
            engine.step(text[:1])
            rows.append(row | {"MB": resident_megabytes(), "tokens/s": 0.0})
        # In turn: what else the machine does meets every context alike.
        for row, past in [*zip(rows, pasts, strict=True)] * REPEATS:
            again: Engine
            if isinstance(past, Path):
                assert state is not None
                again = engine_for(model, chunk=1, start=state.restore(past))
                again.read([text[:0]])
            else:
                again = past
            row["tokens/s"] = max(row["tokens/s"], _tokens_per_second(again, text))
    print(*map(json.dumps, rows), sep="\n")


def _tokens_per_second(engine: Engine, text: Tensor) -> float:
    started = time.perf_counter()
    for token in text[:STEPS]:
        engine.step(token[None])
    return STEPS / (time.perf_counter() - started)


def resident_megabytes() -> float:
    """Memory of this process that is in RAM now, on Linux; the most there was, elsewhere."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    model, text, dtype, *contexts = sys.argv[1:]
    _main(model, Path(text), getattr(torch, dtype), [int(context) for context in contexts])
