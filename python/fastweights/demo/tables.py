"""The figures of a run as text and as a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastweights.demo.results import Results
from fastweights.testing.tables import markdown_table

_STAGES = ("original", "after transfer", "after LoRA", "after 4 bits")
_CONTROLS = (
    "swapped",
    "window only",
    "window only after LoRA",
    "original after LoRA",
    "published after transfer",
    "published after LoRA",
)
_MODEL = "SmolLM2-135M-Instruct"


def perplexity_table(results: Results, *, controls: bool = False) -> str:
    """Held-out perplexity, a row per model."""
    names = [*_STAGES, *(_CONTROLS if controls else ())]
    rows = [(name, results.get(name)) for name in names if results.get(name)]
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    cells = [[name, *(_number(row.get(c)) for c in columns)] for name, row in rows]
    return markdown_table(["held-out perplexity", *map(_position, columns)], cells)


def speed_table(results: Results) -> str:
    """Tokens per second and memory, a row per context."""
    ours, theirs = results.get("speed of ours"), results.get("speed of transformers")
    cells = [
        [
            _tokens(c),
            *(_number(s.get(c, {}).get(k)) for s in (ours, theirs) for k in ("tokens/s", "MB")),
        ]
        for c in ours
    ]
    header = ["context", "ours, tokens/s", "ours, MB", "transformers, tokens/s", "transformers, MB"]
    return markdown_table(header, cells)


def time_table(results: Results) -> str:
    """Minutes of every stage."""
    names = list(results.data["stages"])
    cells = [[name, f"{results.seconds(name) / 60:.1f}"] for name in names]
    total = sum(results.seconds(name) for name in names) / 60
    return markdown_table(["stage", "minutes"], [*cells, ["all", f"{total:.1f}"]])


def chart(results: Results, path: Path) -> None:
    """Two panels: decoding speed by context, perplexity by position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    for name, label in (("ours", "fastweights, linear, 4 bits"), ("transformers", "transformers")):
        speed = results.get(f"speed of {name}")
        left.plot(
            [int(c) for c in speed], [row["tokens/s"] for row in speed.values()], "o-", label=label
        )
    left.set(xscale="log", xlabel="tokens of context", ylabel="tokens/s", title="Decoding")
    left.set_ylim(bottom=0)
    left.legend()
    for name in _STAGES:
        row = {k: v for k, v in results.get(name).items() if "-" in k}
        right.plot([_position(k) for k in row], list(row.values()), "o-", label=name)
    right.set(xlabel="position", ylabel="perplexity", title="Held-out text")
    right.set_ylim(bottom=0)
    right.legend()
    machine = results.data["machine"]
    figure.suptitle(f"{_MODEL} on {machine['cpu']}, {machine['threads']} threads")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def insert(page: Path, marker: str, text: str) -> None:
    """Puts `text` between the lines `<!-- marker -->` and `<!-- end marker -->` of a page.

    Raises:
        ValueError: the page lacks them.
    """
    begin, end = f"<!-- {marker} -->", f"<!-- end {marker} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"expected the lines {begin} and {end} in {page}, found none")
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.1f}"


def _tokens(count: str) -> str:
    n = int(count)
    return f"{n // 1024}k" if n >= 1024 else str(n)


def _position(key: str) -> str:
    return "–".join(_tokens(part) for part in key.split("-")) if key[0].isdigit() else key
