"""Tokens per second and resident memory by the length of the context, in a process of its own.

Run as `python -m fastweights.demo.speed DIR TEXT CONTEXT...`; prints one JSON object per context.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from fastweights.demo.model import Text, is_linear, prompt_chunk
from fastweights.generation.engine import Engine
from fastweights.generation.state import GenerationState

STEPS = 64
REPEATS = 3


def measure(
    model: Path, text: Path, contexts: tuple[int, ...], runner: str = "fastweights.demo.speed"
) -> dict[str, dict[str, float]]:
    """{context: {"tokens/s": decoding, "MB": resident memory, "prefill tokens/s": ...}}.

    Args:
        model: a model folder or GGUF file.
        text: tokens, as `Text.save` keeps them.
        runner: module that is run with these arguments.
        contexts: ascending lengths. A converted model is read into once and goes on from there.
    """
    command = [sys.executable, "-m", runner, str(model), str(text)]
    command += map(str, contexts)
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = (json.loads(line) for line in run.stdout.splitlines() if line.startswith("{"))
    return {str(line.pop("context")): line for line in lines}


def _main(path: str, tokens: Path, contexts: list[int]) -> None:
    from fastweights import load
    from fastweights.generation.compiled import engine_for

    model, _ = load(path)
    text = Text.load(tokens).train
    state: GenerationState | None = None
    read = 0
    with torch.inference_mode():
        for context in contexts:
            chunk = prompt_chunk(model, context - read)
            engine = engine_for(model, chunk=chunk, start=state)
            started = time.perf_counter()
            engine.read([text[read:context]])
            seconds = time.perf_counter() - started
            row = {"context": context, "prefill tokens/s": (context - read) / seconds}
            if is_linear(model):
                state, read = engine.state().select([0]), context
            best = min(_seconds_per_token(engine, text) for _ in range(REPEATS))
            row |= {"tokens/s": 1 / best, "MB": resident_megabytes()}
            print(json.dumps(row), flush=True)


def _seconds_per_token(engine: Engine, text: Tensor) -> float:
    started = time.perf_counter()
    for token in text[:STEPS]:
        engine.step(token[None])
    return (time.perf_counter() - started) / STEPS


def resident_megabytes() -> float:
    """Memory of this process that is in RAM now, on Linux; the most there was, elsewhere."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), [int(context) for context in sys.argv[3:]])
