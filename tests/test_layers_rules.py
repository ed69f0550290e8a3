"""The rules of the source tree that a reader relies on (CONTRIBUTING.md, "Rules")."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
# family -> families whose kernel.h (and, in ops files, ops_*.h) it may include. Must stay acyclic.
FAMILY_INCLUDES = {
    "attention": {"linear_attention"},
    "decoding": {"quantization"},
}
CPP = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu"})
KERNELS = [
    p
    for p in CPP
    if p.suffix == ".cpp"
    and not p.name.startswith("ops")
    and (p.parent.name not in {"core", "python"} or p.name in {"probe.cpp", "sum_heads.cpp"})
]


def includes(path):
    return re.findall(r'^\s*#include\s+[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CPP, ids=relative)
def test_families_include_only_core_and_declared_families(path):
    family = path.parent.name
    for included in includes(path):
        root, _, rest = included.partition("/")
        if not (CSRC / root).is_dir() or root in {"core", family}:
            continue
        both_ops = path.name.startswith("ops") and rest.startswith("ops_")
        assert root in FAMILY_INCLUDES.get(family, set()), included
        assert rest == "kernel.h" or both_ops, included


def test_declared_includes_are_acyclic():
    done, active = set(), set()

    def visit(family):
        assert family not in active, f"{family} includes itself through others"
        if family in done:
            return
        active.add(family)
        for other in FAMILY_INCLUDES.get(family, ()):
            visit(other)
        active.remove(family)
        done.add(family)

    for family in FAMILY_INCLUDES:
        visit(family)


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_kernel_files_include_nothing_foreign(path):
    def reachable(file, seen):
        for included in includes(file):
            seen.append((file, included))
            inner = CSRC / included
            inner = inner if inner.exists() else file.parent / included
            if inner.exists() and inner not in {f for f, _ in seen}:
                reachable(inner, seen)
        return seen

    for file, included in reachable(path, []):
        own = (CSRC / included).exists() or (file.parent / included).exists()
        if not own:
            system = {"stddef.h", "stdint.h"} | (
                {"immintrin.h", "arm_neon.h"} if file.name == "vec.h" else set()
            )
            assert included in system, f"{relative(file)}: {included}"


def test_core_names_no_family():
    families = [p.name for p in CSRC.iterdir() if p.name not in {"core", "python"}]
    for path in (CSRC / "core").iterdir():
        code = re.sub(r"//.*", "", path.read_text())
        assert not [f for f in families if f in code], relative(path)


def tracked(*suffixes):
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return [ROOT / name for name in listed if name.endswith(suffixes) and (ROOT / name).exists()]


def test_long_files_say_why():
    for path in tracked(".py", ".h", ".cpp", ".cu", ".cmake"):
        lines = path.read_text().splitlines()
        if len(lines) > 500:
            assert "500 lines" in "\n".join(lines[:12]), f"{relative(path)}: {len(lines)} lines"


def test_names_and_leftovers():
    for path in tracked(".py", ".h", ".cpp", ".cu", ".cmake"):
        assert path.name != "utils.py", relative(path)
        if path != Path(__file__):
            assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text()), relative(path)


def test_each_family_has_one_name_everywhere():
    ops = ROOT / "python/fastweights/ops"
    python = {p.parent.name for p in ops.glob("*/spec.py")}
    native = {p.parent.name for p in CSRC.glob("*/ops*.cpp")}
    assert native <= python, f"C++ families without a spec: {sorted(native - python)}"


def test_every_notebook_is_run_by_a_test():
    tests = "\n".join(path.read_text() for path in tracked(".py") if "tests" in path.parts)
    missing = [path.name for path in tracked(".ipynb") if path.name not in tests]
    assert not missing, missing
