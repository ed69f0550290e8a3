"""What the compiled files may contain: no shared inline code between CPU levels, only old shims."""

import re
import subprocess
from pathlib import Path

from fastweights._load import _C

ROOT = Path(__file__).parents[2]
SHIMS = Path(__file__).with_name("torch_2_10_shims.txt")
LIBRARY = Path(_C.__file__).with_name("libfastweights.so")


def nm(path, *options):
    run = subprocess.run(
        ["nm", "--demangle", *options, str(path)], capture_output=True, text=True, check=True
    )
    return [line.split(maxsplit=2) for line in run.stdout.splitlines() if " " in line.strip()]


def kernel_objects():
    """Per-level objects of every plain build in the tree (sanitizers add symbols of their own)."""
    found = [
        path
        for path in ROOT.glob("build/**/kernels_*.dir/**/*.o")
        if not {"asan", "cross"} & set(path.relative_to(ROOT).parts)
    ]
    assert found, "expected a build in the source tree, such as `make build` leaves"
    return found


def test_kernel_objects_share_no_symbols():
    # Two levels must not define the same name: the linker merges weak symbols (inline functions,
    # templates) and might keep an AVX-512 copy for every machine; strong ones clash. What is in the
    # namespace of its level is the level's alone. The scope counts, not the arguments.
    shared = []
    for path in kernel_objects():
        level = re.search(r"kernels_(\w+)\.dir", str(path)).group(1)
        for address, kind, name in (s for s in nm(path, "--defined-only") if len(s) == 3):
            del address
            if (kind.isupper() or kind == "u") and f"::{level}::" not in name.split("(")[0]:
                shared.append(f"{path.relative_to(ROOT)}: {kind} {name}")
    assert not shared, "\n".join(shared)


def test_kernel_objects_need_only_libc_and_libm():
    allowed = re.compile(
        r"(malloc|calloc|free|abort|mem(cpy|move|set|cmp)|_GLOBAL_OFFSET_TABLE_|__stack_chk_fail"
        r"|(exp|log|log1p|expm1|tanh|sqrt|pow|fma|floor|ceil|rint|nearbyint|round|sin|cos|erf|ldexp)f?)$"
    )
    wrong = [
        f"{path.relative_to(ROOT)}: {symbol[-1]}"
        for path in kernel_objects()
        for symbol in nm(path, "--undefined-only")
        if not allowed.match(symbol[-1])
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_symbols_are_shims_of_2_10():
    undefined = {symbol[-1].split("@")[0] for symbol in nm(LIBRARY, "-D", "-u")}
    torch_symbols = {s for s in undefined if re.search(r"torch|c10|at::|aten", s)}
    assert torch_symbols, "expected the library to use torch"
    assert torch_symbols <= set(SHIMS.read_text().split())


def test_the_ops_know_nothing_of_python():
    undefined = {symbol[-1] for symbol in nm(LIBRARY, "-D", "-u")}
    assert not {s for s in undefined if s.startswith(("Py", "_Py"))}
