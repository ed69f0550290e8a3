"""Every Python block of the README and of the documentation runs, in order, one session a file."""

import importlib.util
import re
from pathlib import Path

import pytest

import fastweights as fw
from tiny_models import quantized_model, tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PEERS = {"fla.md"}  # run in tests/peers: they need what this environment must not have
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_blocks(page):
    text = page.read_text()
    session = {"__name__": "__main__"}
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match.group(1), str(page), "exec"), session)


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if BLOCK.search(p.read_text()) and p.name not in PEERS],
    ids=lambda p: p.name,
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if (
        "linear-int4/" in page.read_text()
    ):  # what the page says the reader has: a converted model and a text
        fw.save(quantized_model(), tokenizer(), "linear-int4")
        Path("manual.txt").write_text("Hello world, " * 50)
    run_blocks(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        assert set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.MULTILINE)) <= targets


def test_generated_sections_are_up_to_date():
    """They show what benchmarks/results holds."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    for page in readme.PAGES:
        assert (ROOT / page).read_text() == readme.filled(page), readme.__doc__
