"""`python -m fastweights.demo`: make a real model linear, recover it, quantize it, run it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fastweights._cli.terminal import fail, say, write_json
from fastweights.demo.stages import Interrupted, Pipeline
from fastweights.demo.tables import chart, perplexity_table, speed_table, time_table
from fastweights.testing import machine


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m fastweights.demo", description=__doc__)
    p.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="default: demo")
    p.add_argument("--report", action="store_true", help="also the controls; about an hour")
    return p


def main() -> int:
    """Run what has not been run yet, then print everything."""
    options = _parser().parse_args()
    pipeline = Pipeline(options.out)
    results = pipeline.results
    results.data["machine"] = {**machine.facts(), "threads": torch.get_num_threads()}
    try:
        pipeline.report() if options.report else pipeline.demo()
    except (KeyboardInterrupt, Interrupted):
        say("interrupted: the same command goes on from here")
        return 130
    except (ValueError, OSError) as error:
        return fail("demo", error)
    write_json(options.out / "results.json", results.data)
    chart(results, options.out / "chart.png")
    tables = (perplexity_table(results), speed_table(results), time_table(results))
    sample = results.get("sample")
    print(*tables, f"> {sample['question']}\n\n{sample['answer']}", sep="\n\n")
    print(f"\nwrote {options.out / 'results.json'} and {options.out / 'chart.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
