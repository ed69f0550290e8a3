"""Write torch_2_10_shims.txt: python tests/core/list_torch_2_10_shims.py

The C functions of torch's stable ABI that exist in every torch >= 2.10: those that the installed
torch's shim headers declare when they are preprocessed for TORCH_TARGET_VERSION 2.10, which removes
what later versions added.
"""

import re
import subprocess
from pathlib import Path

import torch

HEADERS = (
    "torch/csrc/inductor/aoti_torch/c/shim.h",
    "torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h",
    "torch/csrc/stable/c/shim.h",
)
LIST = Path(__file__).with_name("torch_2_10_shims.txt")


def declared():
    source = "".join(f"#include <{header}>\n" for header in HEADERS)
    include = Path(torch.__file__).parent / "include"
    command = ["c++", "-std=c++20", "-E", "-P", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    text = subprocess.run(
        [*command, f"-I{include}", "-x", "c++", "-"],
        input=source,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return sorted(set(re.findall(r"\b((?:aoti_)?torch_[a-z0-9_]+)\s*\(", text)))


if __name__ == "__main__":
    LIST.write_text("\n".join(declared()) + "\n")
