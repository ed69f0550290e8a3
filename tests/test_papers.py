"""papers.toml names things that exist, and docs/papers.md is made from it.

To write the page anew: python tests/test_papers.py
"""

import importlib
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "papers.md"
PAPERS = tomllib.loads((ROOT / "papers.toml").read_text()).get("paper", [])


def resolve(symbol):
    """The object that a dotted name such as fastweights.nn.LinearAttention stands for."""
    parts = symbol.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"{symbol} does not exist")


def as_list(value):
    return [value] if isinstance(value, str) else list(value)


def page():
    rows = sorted(PAPERS, key=lambda p: (p["year"], p["title"]))
    lines = [
        "# Papers",
        "",
        "Made from `papers.toml` by `tests/test_papers.py`, which also checks that every name below"
        " exists.",
        "",
        "| year | paper | implemented | names | tests | status |",
        "|---|---|---|---|---|---|",
    ]
    for p in rows:
        title = (
            f"[{p['title']}](https://arxiv.org/abs/{p['arxiv']})" if p.get("arxiv") else p["title"]
        )
        names = ", ".join(f"`{s.removeprefix('fastweights.')}`" for s in as_list(p["symbol"]))
        tests = ", ".join(f"`{t}`" for t in as_list(p["test"]))
        lines.append(
            f"| {p['year']} | {title} | {p['implements']} | {names} | {tests} | {p['status']} |"
        )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p["title"][:40])
def test_entry(paper):
    assert set(paper) <= {
        *("title", "year", "arxiv", "url", "implements", "symbol", "test", "notebook", "status")
    }
    assert re.fullmatch(r"works|partial: .+", paper["status"])
    if "arxiv" in paper:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", paper["arxiv"])
    for symbol in as_list(paper["symbol"]):
        resolve(symbol)
    for test in as_list(paper["test"]):
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), test
        assert not name or f"def {name}(" in (ROOT / file).read_text(), test
    for notebook in as_list(paper.get("notebook", [])):
        assert (ROOT / "notebooks" / notebook).is_file(), notebook


def test_titles_are_unique():
    titles = [p["title"] for p in PAPERS]
    assert len(titles) == len(set(titles))


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), __doc__


if __name__ == "__main__":
    PAGE.write_text(page())
