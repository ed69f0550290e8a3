"""A `PeftModel` with and without `fastweights.integrations.peft.patch`.

    python benchmarks/peft_patch.py

Layers of D x D with LoRA of rank 16, one after the other; microseconds a layer, the smallest of
many readings, both in turn.
"""

import time

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fastweights._tables import print_table
from fastweights.integrations.peft import patch, unpatch


def model(features, layers, dtype):
    stack = nn.Sequential(
        *[nn.Linear(features, features, bias=False, dtype=dtype) for _ in range(layers)]
    )
    config = LoraConfig(r=16, target_modules=[str(i) for i in range(layers)])
    return get_peft_model(stack, config)


def seconds(call, readings):
    """PEFT's and ours."""
    best = {unpatch: float("inf"), patch: float("inf")}
    for _ in range(6):
        for use in best:
            use()
            call()
            for _ in range(readings):
                start = time.perf_counter()
                call()
                best[use] = min(best[use], time.perf_counter() - start)
    unpatch()
    return best.values()


def main():
    rows = []
    for features, layers in ((768, 28), (2048, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            stack = model(features, layers, dtype)
            for m in (1, 16, 512):
                x = torch.randn(m, features, dtype=dtype)

                def infer(stack=stack, x=x):
                    with torch.inference_mode():
                        stack(x)

                def train(stack=stack, x=x):
                    stack(x).float().sum().backward()
                    stack.zero_grad()

                cells = [str(features), str(dtype).removeprefix("torch."), str(m)]
                for call in (infer, train):
                    times = seconds(call, max(3, int(30 / (1 + m * features / 4e4))))
                    cells += [f"{1e6 * t / layers:.0f}" for t in times]
                rows.append(cells)
    header = ["D", "dtype", "rows", "inference: PEFT, us", "patched", "step: PEFT, us", "patched"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
