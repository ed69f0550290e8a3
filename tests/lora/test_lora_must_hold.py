"""What LoRA and its fused operators promise."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

import fastweights as fw
from fastweights.ops.lora.reference import dropout_mask
from fastweights.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def layer(dtype=torch.float32, rows=37, in_features=70, out_features=45, ranks=(4,)):
    torch.manual_seed(0)
    x = torch.randn(rows, in_features).to(dtype)
    weight = torch.randn(out_features, in_features).to(dtype)
    lora_a = [torch.randn(r, in_features) for r in ranks]
    lora_b = [torch.randn(out_features, r) for r in ranks]
    return x, weight, lora_a, lora_b, torch.linspace(0.5, 2, len(ranks))


def bases(weight):
    return [weight, fw.quantize(weight.float(), "int4"), fw.quantize(weight.float(), "int8")]


def base_of(x, weight):
    return (
        F.linear(x, weight) if isinstance(weight, torch.Tensor) else fw.quantized_linear(x, weight)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fresh_adapter_changes_no_bit(dtype):
    x, weight, lora_a, lora_b, scale = layer(dtype)
    for base in bases(weight):
        y = fw.lora_linear(x, base, None, lora_a, [torch.zeros_like(b) for b in lora_b], scale)
        assert torch.equal(y, base_of(x, base))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_an_adapter_are_those_of_the_base(dtype):
    x, weight, lora_a, lora_b, scale = layer(dtype, ranks=(4, 2))
    indices = torch.randint(-1, 2, (len(x),))
    segments = torch.tensor([5, 20, 30])
    for base in bases(weight):
        y = fw.lora_linear(x, base, None, lora_a, lora_b, scale, indices=indices)
        assert torch.equal(y[indices == -1], base_of(x, base)[indices == -1])
        assert not torch.equal(y[indices >= 0], base_of(x, base)[indices >= 0])
        y = fw.lora_linear(x, base, None, lora_a, lora_b, scale, segments=segments)
        outside = torch.cat([torch.arange(5), torch.arange(30, 37)])
        assert torch.equal(y[outside], base_of(x, base)[outside])


def test_scaling_a_against_b_changes_nothing():
    x, weight, lora_a, lora_b, scale = layer()
    y = fw.lora_linear(x, weight, None, lora_a, lora_b, scale)
    other = fw.lora_linear(x, weight, None, [lora_a[0] * 8], [lora_b[0] / 8], scale)
    assert torch.equal(y, other)


def test_adapters_add_up_to_one_of_their_ranks():
    x, weight, lora_a, lora_b, scale = layer(ranks=(4, 3))
    y = fw.lora_linear(x, weight, None, lora_a, lora_b, scale)
    a, b = torch.cat(lora_a), torch.cat([s * b for s, b in zip(scale, lora_b, strict=True)], 1)
    assert torch.equal(y, fw.lora_linear(x, weight, None, [a], [b], torch.ones(1)))


def test_one_adapter_for_all_rows_is_the_plain_call():
    x, weight, lora_a, lora_b, scale = layer(ranks=(4, 2))
    plain = fw.lora_linear(x, weight, None, lora_a[1:], lora_b[1:], scale[1:])
    ones = torch.ones(len(x), dtype=torch.long)
    by_index = fw.lora_linear(x, weight, None, lora_a, lora_b, scale, indices=ones)
    by_segment = fw.lora_linear(
        x, weight, None, lora_a, lora_b, scale, segments=torch.tensor([0, 0, len(x)])
    )
    assert torch.equal(plain, by_index)
    assert torch.equal(plain, by_segment)


def test_rows_move_with_their_adapters():
    x, weight, lora_a, lora_b, scale = layer(ranks=(4, 2, 1))
    base = torch.zeros_like(weight)  # torch's product may depend on the place of a row
    indices = torch.randint(-1, 3, (len(x),))
    order = torch.randperm(len(x))
    y = fw.lora_linear(x, base, None, lora_a, lora_b, scale, indices=indices)
    moved = fw.lora_linear(x[order], base, None, lora_a, lora_b, scale, indices=indices[order])
    assert torch.equal(moved, y[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("few", [1, 5, 32])
def test_few_rows_get_the_bits_that_they_get_among_many(few, dtype):
    x, weight, lora_a, lora_b, scale = layer(dtype, rows=70, ranks=(4, 19))
    options = {"dropout": 0.3, "seed": torch.tensor(1)}
    nothing = torch.zeros_like(weight)  # torch's own product goes by the number of rows
    many = fw.lora_linear(x, nothing, None, lora_a, lora_b, scale, **options)
    y = fw.lora_linear(x[:few], nothing, None, lora_a, lora_b, scale, **options)
    assert torch.equal(y, many[:few])


def test_ranks_may_be_filled_up_with_zeros():
    x, weight, lora_a, lora_b, scale = layer(ranks=(4, 2))
    y = fw.lora_linear(x, weight, None, lora_a, lora_b, scale)
    lora_a[1] = torch.cat([lora_a[1], torch.randn(2, 70)])
    lora_b[1] = torch.cat([lora_b[1], torch.zeros(45, 2)], 1)
    assert torch.equal(y, fw.lora_linear(x, weight, None, lora_a, lora_b, scale))


def test_the_error_is_that_of_two_products():
    x, weight, lora_a, lora_b, scale = layer(
        rows=64, in_features=768, out_features=256, ranks=(16,)
    )
    zero = torch.zeros_like(weight)
    exact = fw.reference.lora_linear(
        *(t.double() for t in (x, zero)), None,
        [lora_a[0].double()], [lora_b[0].double()], scale.double(),
    )  # fmt: skip
    ours = fw.lora_linear(x, zero, None, lora_a, lora_b, scale)
    torchs = scale * F.linear(F.linear(x, lora_a[0]), lora_b[0])
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max()


def test_low_precision_rounds_the_update_once():
    # Beside a base of zero what is left is the update alone, in float32 until it is stored.
    x, weight, lora_a, lora_b, scale = layer(torch.bfloat16, ranks=(16,))
    y = fw.lora_linear(x, torch.zeros_like(weight), None, lora_a, lora_b, scale)
    exact = scale * F.linear(F.linear(x.double(), lora_a[0].double()), lora_b[0].double())
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


def test_neither_a_gradient_of_the_base_nor_anything_of_its_size():
    x, weight, lora_a, lora_b, scale = layer(rows=4, in_features=1024, out_features=1024)
    leaves = [x, weight, *lora_a, *lora_b]
    for leaf in leaves:
        leaf.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        fw.lora_linear(x, weight, None, lora_a, lora_b, scale).sum().backward()
    assert weight.grad is None
    assert all(leaf.grad is not None for leaf in leaves if leaf is not weight)
    largest = max(event.self_cpu_memory_usage for event in events.events())
    assert 0 < largest < weight.nbytes / 4


@pytest.mark.parametrize("shape", [(4, 70), (70,), (0, 3, 70)])
def test_a_frozen_input_gets_no_gradient(shape):
    _, weight, lora_a, lora_b, scale = layer()
    x = torch.randn(shape)
    wanted = []
    for frozen in (False, True):
        leaves = [t.clone().requires_grad_() for t in (lora_a[0], lora_b[0])]
        x.requires_grad_(not frozen)
        fw.lora_linear(x, weight, None, leaves[:1], leaves[1:], scale).sum().backward()
        wanted.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*wanted, strict=True))


def test_forward_mode_is_refused_without_grad_mode_too():
    x, weight, lora_a, lora_b, scale = layer()
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="lora_linear: forward-mode"):
            fw.lora_linear(dual, weight, None, lora_a, lora_b, scale)


def test_adapters_that_no_row_asks_for_are_not_read():
    x, weight, lora_a, lora_b, scale = layer(ranks=(4, 4))
    indices = torch.zeros(len(x), dtype=torch.long)
    y = fw.lora_linear(x, weight, None, lora_a, lora_b, scale, indices=indices)
    lora_a[1], lora_b[1] = torch.full((4, 70), torch.nan), torch.full((45, 4), torch.nan)
    assert torch.equal(y, fw.lora_linear(x, weight, None, lora_a, lora_b, scale, indices=indices))


def test_dropout_is_a_function_of_the_seed():
    x = torch.ones(300, 200)
    eye, zero, one = torch.eye(200), torch.zeros(200, 200), torch.ones(1)

    def mask(seed, p=0.3):
        return fw.lora_linear(x, zero, None, [eye], [eye], one, dropout=p, seed=torch.tensor(seed))

    torch.testing.assert_close(mask(5), dropout_mask(x.shape, 0.3, 5).float(), rtol=1e-6, atol=0)
    assert torch.equal(mask(5), mask(5))
    for other in (6, 5 + 2**32, -5):
        assert 0.5 < (mask(5) == mask(other)).float().mean() < 0.66  # 0.58 if independent
    kept = mask(5).bool()
    assert abs(kept.float().mean() - 0.7) < 0.01  # 3.8 standard deviations
    for axis in (0, 1):
        assert (kept.float().mean(axis) - 0.7).abs().max() < 0.16
    neighbours = (kept[1:] & kept[:-1]).float().mean(), (kept[:, 1:] & kept[:, :-1]).float().mean()
    assert all(abs(n - 0.49) < 0.01 for n in neighbours)


def test_autocast_takes_the_base_to_bfloat16_and_leaves_the_adapters():
    x, weight, lora_a, lora_b, scale = layer()
    lora_a[0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = fw.lora_linear(x, weight, None, lora_a, lora_b, scale)
    want = fw.lora_linear(x.bfloat16(), weight.bfloat16(), None, lora_a, lora_b, scale)
    assert torch.equal(y, want)
    y.float().sum().backward()
    assert lora_a[0].grad.dtype == torch.float32


@pytest.mark.parametrize("routed", [False, True])
def test_projections_together_are_projections_apart(routed):
    sizes, ranks, adapters = [40, 8, 16], [4, 2, 3], 2
    x, weight = torch.randn(21, 50, requires_grad=True), torch.randn(64, 50)
    lora_a = [torch.randn(r, 50, requires_grad=True) for r in ranks * adapters]
    lora_b = [
        torch.randn(o, r, requires_grad=True)
        for o, r in zip(sizes * adapters, ranks * adapters, strict=True)
    ]
    scale = torch.rand(6)
    rows = {"indices": torch.arange(21) % 3 - 1} if routed else {}
    leaves = [x, *lora_a, *lora_b]
    together = fw.lora_linear(x, weight, None, lora_a, lora_b, scale, split=sizes, **rows)
    apart = torch.cat(
        [
            fw.lora_linear(x, w, None, lora_a[p::3], lora_b[p::3], scale[p::3], **rows)
            for p, w in enumerate(weight.split(sizes))
        ],
        -1,
    )
    assert_close(together, apart, tolerance=2e-6)
    dy = torch.randn_like(together)
    assert_close(
        torch.autograd.grad(together, leaves, dy),
        torch.autograd.grad(apart, leaves, dy),
        tolerance=4e-6,
    )
