"""llama.cpp on the same file, where the package xllamacpp brings it: tokens per second by context.

Run as `python -m fastweights.demo.llama_cpp GGUF TEXT DTYPE CONTEXT...`, of which DTYPE is not
used; prints one JSON object per context.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastweights.demo.model import Text
from fastweights.demo.speed import REPEATS, STEPS, resident_megabytes


def _main(path: str, tokens: Path, contexts: list[int]) -> None:
    import xllamacpp

    params: Any = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel = 1
    params.n_ctx = max(contexts)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server: Any = xllamacpp.Server(params)
    text = Text.load(tokens).train.tolist()
    for context in contexts:
        # The answer has to fit the model's positions too.
        prompt = text[: min(context, params.n_ctx - STEPS)]
        request = {"prompt": prompt, "n_predict": STEPS, "ignore_eos": True}
        timings = [server.handle_completions(request)["timings"] for _ in range(REPEATS)]
        row = {
            "context": context,
            "prefill tokens/s": timings[0]["prompt_n"] / (timings[0]["prompt_ms"] / 1e3),
            "tokens/s": max(t["predicted_per_second"] for t in timings),
            "MB": resident_megabytes(),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    model, tokens, _, *contexts = sys.argv[1:]
    _main(model, Path(tokens), [int(context) for context in contexts])
