"""Fill the generated sections of README.md: python benchmarks/readme.py

support: from the specs. chart: from benchmarks/results/linear_attention.json, which `fastweights
bench linear_attention --out benchmarks/results` writes. demo: from benchmarks/results/demo.json,
which `make demo` writes: {"caption": text, "header": [...], "rows": [[...]]}.
"""

import json
import re
from pathlib import Path

from fastweights.testing.support import HEADER, support_rows
from fastweights.testing.tables import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CHART_DATA = RESULTS / "linear_attention.json"
CHART = ROOT / "docs" / "images" / "linear_attention.svg"
CASE = "B1 H8 T4096 D64"


def support():
    return markdown_table(HEADER, support_rows())


def demo():
    path = RESULTS / "demo.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    return f"{markdown_table(found['header'], found['rows'])}\n\n{found['caption']}"


def chart_rows():
    result = json.loads(CHART_DATA.read_text())["linear_attention"]
    return [r for r in result["rows"] if r["case"].startswith(CASE) and r["dtype"] == "float32"]


def chart():
    if not CHART_DATA.exists():
        return ""
    machine = json.loads(CHART_DATA.read_text())["linear_attention"]["machine"]
    ours, *others = chart_rows()
    rival = min((r for r in others if "SDPA" in r["contender"]), key=lambda r: r["forward"])
    forward, both = (rival[key] / ours[key] for key in ("forward", "both"))
    level = machine["cpu level"].split()[0]
    return (
        f"![Time of linear attention and of its rivals](docs/images/{CHART.name})\n\n"
        "Causal attention over 4096 tokens, 8 heads of 64, float32, on"
        f" {machine['threads']} threads of {machine['cpu']} ({level}): {forward:.0f}× faster than"
        f" torch's softmax attention forward, {both:.0f}× forward and backward, at the faster of"
        " torch's matmul settings. Measured by `fastweights bench linear_attention`."
    )


def draw(rows):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fastweights"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 0.55 * len(rows) + 1.1), layout="constrained")
    names = [r["contender"] for r in rows]
    for offset, key, label, colour in (
        (-0.2, "forward", "forward", "#4878a8"),
        (0.2, "both", "forward and backward", "#c8a048"),
    ):
        times = [1e3 * (r[key] or 0) for r in rows]
        bars = axes.barh([i + offset for i in range(len(rows))], times, 0.36, color=colour)
        bars.set_label(label)
        axes.bar_label(bars, [f" {t:.1f}" if t else "" for t in times], fontsize=8)
    axes.set(xscale="log", xlabel="milliseconds (log scale, less is better)")
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    CHART.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(CHART, metadata={"Date": None})


def filled(text):
    """The README with its generated sections made anew."""
    for name, made in (("demo", demo), ("chart", chart), ("support", support)):
        section = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        head, old, tail = text.partition(m[0]) if (m := section.search(text)) else (text, "", "")
        assert old, f"README.md has no section {name}"
        body = made()
        text = head + m[1] + (f"\n{body}\n\n" if body else "") + m[2] + tail
    return text


if __name__ == "__main__":
    if CHART_DATA.exists():
        draw(chart_rows())
    page = ROOT / "README.md"
    page.write_text(filled(page.read_text()))
