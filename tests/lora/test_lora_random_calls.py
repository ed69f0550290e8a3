"""Random calls against the reference: each of the ways that an update can go, at its edges."""

import random

import pytest
import torch

import fastweights as fw

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def draw(seed):
    """Arguments of `lora_linear`."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype):
        t = torch.randn(shape[::-1] if choose.random() < 0.3 else shape, generator=generator)
        return (t if t.shape == shape else t.mT).to(dtype)

    dtype = choose.choice(list(TOLERANCE))
    rows = choose.choice([0, 1, 2, 4, 15, 16, 17, 32, 33, 40, 100, 300])
    columns = choose.choice([0, 1, 16, 33, 100, 257, 600])
    sizes = [
        choose.choice([0, 1, 17, 64, 65, 130, 200]) for _ in range(choose.choice([1, 1, 2, 3]))
    ]
    adapters = choose.choice([0, 1, 1, 2, 5])
    kept = choose.choice([torch.float32, dtype])
    lora_a, lora_b = [], []
    for size in sizes * adapters:
        rank = choose.choice([0, 1, 3, 8, 9, 16, 20, 64])
        lora_a.append(normal(rank, columns, dtype=kept) / max(1, columns) ** 0.5)
        lora_b.append(normal(size, rank, dtype=kept) / max(1, rank) ** 0.5)
    x = normal(rows, columns + 5, dtype=dtype)[:, :columns] if columns else torch.zeros(rows, 0)
    weight = normal(sum(sizes), columns, dtype=dtype) / max(1, columns) ** 0.5
    scale = torch.rand(len(lora_a), generator=generator)
    options = {"split": sizes} if len(sizes) > 1 else {}
    route = choose.choice(["all", "indices", "segments"]) if adapters else "all"
    if route == "indices":
        options["indices"] = torch.randint(-1, adapters, (rows,), generator=generator)
    elif route == "segments":
        marks = torch.randint(0, rows + 1, (adapters + 1,), generator=generator)
        options["segments"] = marks.sort()[0]
    if choose.random() < 0.3:
        options |= {"dropout": 0.3, "seed": torch.tensor(seed)}
    return x.to(dtype), weight, lora_a, lora_b, scale, options


def near(ours, exact, tolerance):
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", range(300))
def test_any_call_is_that_of_the_reference(seed):
    x, weight, lora_a, lora_b, scale, options = draw(seed)
    leaves = [x, *lora_a, *lora_b]
    exact_leaves = [t.double().requires_grad_() for t in leaves]
    exact_x, *exact = exact_leaves
    half = len(lora_a)
    z = fw.reference.lora_linear(
        exact_x, weight.double(), None, exact[:half], exact[half:], scale.double(), **options
    )
    tolerance = TOLERANCE[x.dtype]
    with torch.inference_mode():
        y = fw.lora_linear(x, weight, None, lora_a, lora_b, scale, **options)
    near(y, z.detach(), tolerance)
    if seed % 2 == 0:
        return
    for leaf in leaves:
        leaf.requires_grad_()
    y = fw.lora_linear(x, weight, None, lora_a, lora_b, scale, **options)
    near(y.detach(), z.detach(), tolerance)
    grads = torch.autograd.grad(y.sum(), leaves)
    exact_grads = torch.autograd.grad(z.sum(), exact_leaves, materialize_grads=True)
    for ours, theirs in zip(grads, exact_grads, strict=True):
        size = 1 + float(theirs.abs().max()) if theirs.numel() else 1.0
        near(ours / size, theirs / size, max(tolerance, TOLERANCE[ours.dtype]))
