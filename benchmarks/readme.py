"""Fill the generated sections of README.md and docs/linearize.md: python benchmarks/readme.py

support: from the specs. chart: from benchmarks/results/linear_attention.json, which `fastweights
bench linear_attention --out benchmarks/results` writes. demo, perplexity, speed, time: from
benchmarks/results/demo.json, which `make report` writes.
"""

import json
from pathlib import Path

from fastweights._tables import filled_section, markdown_table
from fastweights.demo import tables
from fastweights.demo.results import Results
from fastweights.testing.support import HEADER, support_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CHART_DATA = RESULTS / "linear_attention.json"
CHART = ROOT / "docs" / "images" / "linear_attention.svg"
CASE = "B1 H8 T4096 D64"
DEMO_DATA = RESULTS / "demo.json"
DEMO_CHART = ROOT / "docs" / "images" / "demo.svg"


def support():
    return markdown_table(HEADER, support_rows())


def demo():
    results = Results(DEMO_DATA)
    return (
        f"{tables.summary_table(results)}\n\n"
        f"SmolLM2-135M-Instruct on {tables.machine(results)}: tokens per second of decoding at a"
        " context of 128 to 32k, resident memory of the process at the longest, held-out perplexity"
        " of 512 tokens. All of it, training included, is `make demo`,"
        f" {results.minutes(tables.DEMO_STAGES):.0f} minutes; more in"
        " [docs/linearize.md](docs/linearize.md).\n\n"
        f"![Tokens per second by context, perplexity by position](docs/images/{DEMO_CHART.name})"
    )


def perplexity():
    return tables.perplexity_table(Results(DEMO_DATA))


def speed():
    results = Results(DEMO_DATA)
    return f"{tables.speed_table(results)}\n\nOn {tables.machine(results)}."


def time():
    return tables.time_table(Results(DEMO_DATA))


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


def overhead():
    result = json.loads((RESULTS / "lora.json").read_text())["lora_linear"]
    times = {(r["case"], r["dtype"], r["contender"]): r for r in result["rows"]}
    cases = dict.fromkeys(r["case"] for r in result["rows"] if r["case"].startswith("float M"))
    cells = []
    for case in cases:
        if "adapters" in case:
            continue
        m, d, r = (int(word[1:]) for word in case.split()[1:])
        row, steps = [str(m), str(d), str(r), f"{200 * r / d:.0f}"], []
        for dtype, end in (("float32", ", highest"), ("bfloat16", "")):
            names = ("the bare base" + end, "fastweights", "peft" + end)
            bare, ours, peft = (times[case, dtype, name] for name in names)
            row += [str(round(100 * (t["forward"] / bare["forward"] - 1))) for t in (ours, peft)]
            steps.append(f"{peft['both'] / ours['both']:.2f}" if ours["both"] else "")
        cells.append([*row, *steps])
    header = ["rows", "D", "r", "2r/D, %"]
    for dtype in ("float32", "bfloat16"):
        header += [f"{dtype}: ours, %", "PEFT, %"]
    header += ["step, float32: PEFT / ours", "bfloat16"]
    machine = result["machine"]
    return (
        f"{markdown_table(header, cells)}\n\n"
        f"On {machine['threads']} threads of {machine['cpu']} ({machine['cpu level'].split()[0]})."
    )


PAGES = {
    "docs/lora.md": (overhead,),
    "README.md": (demo, chart, support),
    "docs/linearize.md": (perplexity, speed, time),
}


def filled(page):
    """The text of a page with its generated sections made anew."""
    text = (ROOT / page).read_text()
    for section in PAGES[page]:
        text = filled_section(text, section.__name__, section())
    return text


if __name__ == "__main__":
    if CHART_DATA.exists():
        draw(chart_rows())
    tables.chart(Results(DEMO_DATA), DEMO_CHART)
    for page in PAGES:
        (ROOT / page).write_text(filled(page))
