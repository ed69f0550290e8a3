"""The figures of a run as text and as a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastweights._tables import markdown_table
from fastweights.demo.results import Results

DEMO_STAGES = (
    "prepare",
    "original",
    "transfer",
    "after transfer",
    "recover",
    "after LoRA",
    "quantize",
    "after 4 bits",
    "speed of ours",
    "speed of transformers",
    "sample",
)
_MODELS = ("original", "after transfer", "after LoRA", "after 4 bits")
_CONTROLS = (
    "swapped",
    "window only",
    "window only after LoRA",
    "original after LoRA",
    "published after transfer",
    "published after LoRA",
    "drift",
)
_RUNNERS = ("ours", "transformers", "transformers, bfloat16", "llama.cpp")
_LABELS = {
    "ours": "fastweights, linear, 4 bits",
    "transformers": "transformers, float32",
    "llama.cpp": "llama.cpp, 4 bits",
}
_SPEEDS = {"tokens/s": "tokens/s", "prefill tokens/s": "prompt tokens/s", "MB": "MB"}
_MODEL = "SmolLM2-135M-Instruct"


def summary_table(results: Results) -> str:
    """What the demo reaches, in two rows."""
    rows = (
        ("transformers: softmax attention, float32", "original", "speed of transformers"),
        ("transformers: softmax attention, bfloat16", "", "speed of transformers, bfloat16"),
        ("llama.cpp: softmax attention, 4 bits", "", "speed of llama.cpp"),
        ("**fastweights: linear attention, 4 bits**", "after 4 bits", "speed of ours"),
    )
    contexts = list(results.get("speed of ours"))
    cells = []
    for name, model, speed in rows:
        if (measured := results.get(speed)) is None:
            continue
        speeds = [_number(measured.get(c, {}).get("tokens/s"), 0) for c in contexts]
        memory = max(row["MB"] for row in measured.values())
        quality = results.get(model) or {}
        cells.append([name, *speeds, f"{memory:.0f}", _number(quality.get("T=512"))])
    header = [f"tokens/s at {_tokens(c)}" for c in contexts]
    return markdown_table(["", *header, "MB", "perplexity"], cells)


def perplexity_table(results: Results) -> str:
    """Held-out perplexity, a row per model."""
    rows = [(n, results.get(n)) for n in (*_MODELS, *_CONTROLS) if results.get(n)]
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    cells = [[name, *(_number(row.get(c)) for c in columns)] for name, row in rows]
    return markdown_table(["held-out perplexity", *map(_position, columns)], cells)


def speed_table(results: Results) -> str:
    """Tokens per second and memory, a row per context."""
    runs = {who: results.get(f"speed of {who}") for who in _RUNNERS}
    runs = {who: run for who, run in runs.items() if run is not None}
    cells = [
        [_tokens(c), *(_number(run.get(c, {}).get(k), 0) for k in _SPEEDS for run in runs.values())]
        for c in runs["ours"]
    ]
    header = [f"{kind}: {who}" for kind in _SPEEDS.values() for who in runs]
    return markdown_table(["context", *header], cells)


def time_table(results: Results) -> str:
    """Minutes of every stage."""
    names = list(results.data["stages"])
    cells = [[name, f"{results.seconds(name) / 60:.1f}"] for name in names]
    rest = [name for name in names if name not in DEMO_STAGES]
    cells.append(["**the demo**", f"{results.minutes(DEMO_STAGES):.1f}"])
    if rest:
        cells.append(["**the controls**", f"{results.minutes(rest):.1f}"])
    return markdown_table(["stage", "minutes"], cells)


def machine(results: Results) -> str:
    """The machine of a run, in words."""
    facts = results.data["machine"]
    return f"{facts['threads']} threads of {facts['cpu']} ({str(facts['cpu level']).split()[0]})"


def chart(results: Results, path: Path) -> None:
    """Two panels: decoding speed by context, perplexity by position."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastweights"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    for name in _RUNNERS:
        if (speed := results.get(f"speed of {name}")) is not None:
            speeds = [row["tokens/s"] for row in speed.values()]
            left.plot([int(c) for c in speed], speeds, "o-", label=_LABELS.get(name, name))
    left.set(xscale="log", xlabel="tokens of context", ylabel="tokens/s", title="Decoding")
    left.set_ylim(bottom=0)
    left.legend()
    for name in _MODELS:
        row = {k: v for k, v in results.get(name).items() if "-" in k}
        right.plot([_position(k) for k in row], list(row.values()), "o-", label=name)
    right.set(xlabel="position", ylabel="perplexity", title="Held-out text")
    right.set_ylim(bottom=0)
    right.legend()
    figure.suptitle(f"{_MODEL} on {machine(results)}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _number(value: Any, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _tokens(count: str) -> str:
    n = int(count)
    return f"{n // 1024}k" if n >= 1024 else str(n)


def _position(key: str) -> str:
    """`0-512` becomes 0–512, `512-2048` 512–2k; other names stay."""
    words = key.split(" ")
    edges = words[-1].split("-")
    if all(edge.isdigit() for edge in edges):
        words[-1] = "–".join(map(_tokens, edges))
    return " ".join(words)
