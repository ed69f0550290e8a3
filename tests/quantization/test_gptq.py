"""GPTQ against the numbers of its sheet, and on a model."""

import copy

import pytest
import torch

from fastweights import perplexity, quantize, quantize_
from fastweights.functional import dequantize
from fastweights.quantization import GPTQ
from fastweights.quantization.gptq import round_columns
from fastweights.quantization.round_to_nearest import minmax_grid, nearest_codes
from tiny_models import linear_model, softmax_model

X = torch.tensor(
    [[1, 0.5, 0, 0], [0, 1, 0.5, 0.25], [0.5, 0, 1, 0.5], [0, 0.25, 0.5, 2], [1, 1, 0, 0.5]]
)
W = torch.tensor([[0.9, -0.4, 0.3, 0.1], [-0.2, 0.7, -0.6, 0.5]])
H = 2 * X.T @ X / 5


def loss(w, q, hessian, damping=0.01):
    """½ tr((W − Q) H (W − Q)ᵀ) with the damped Hessian."""
    h = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    d = (w - q).double()
    return 0.5 * float((d @ h * d).sum())


def nearest(w, bits, group_size, symmetric=False):
    """Rounding to nearest on the grid of the official quantizer."""
    groups, extent = w.unflatten(1, (-1, group_size)), (0, 2**bits - 1)
    scale, minimum = minmax_grid(groups, extent, symmetric=symmetric)
    return (scale * nearest_codes(groups, scale, minimum, extent) + minimum).flatten(1)


def solve(w, hessian, bits, group_size=None, *, symmetric=False, block=128, drift=None, **options):
    """The rounded weight and the loss that the solver sums up, on that grid."""
    group_size = w.shape[1] if group_size is None else group_size
    solver = GPTQ(**({"act_order": False} | options))
    factor = solver.factor(hessian, group_size, drift)
    extent = (0, 2**bits - 1)

    def fit(now):
        return minmax_grid(now[:, None], extent, symmetric=symmetric)

    scale, minimum = minmax_grid(w.unflatten(1, (-1, group_size)), extent, symmetric=symmetric)
    scale, minimum = scale[..., 0], minimum[..., 0]
    refit = None if solver.static_groups else fit
    codes, total = round_columns(w, factor, scale, minimum, extent, refit=refit, block=block)
    q = scale[:, factor.groups] * codes + minimum[:, factor.groups]
    return q[:, factor.order.argsort()], total


def correlated(rows, width, seed=0):
    """A weight and the Hessian of ill-conditioned inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    mixing = mixing * torch.logspace(0, -2, width)
    x = torch.randn(4 * width, width, generator=generator) @ mixing.T
    return torch.randn(rows, width, generator=generator), x.T @ x / len(x)


def test_the_worked_example():
    plain = nearest(W, 2, 4)
    torch.testing.assert_close(
        plain, torch.tensor([[2, -1, 1, 0], [0, 2, -1, 1.0]]) * 0.433333, atol=1e-5, rtol=0
    )
    assert loss(W, plain, H) == pytest.approx(0.06889896, rel=1e-5)

    q, total = solve(W, H, 2)
    assert q[0].tolist() == pytest.approx(plain[0].tolist())
    assert q[1].tolist() == pytest.approx([0, 0.433333, -0.433333, 0.433333], abs=1e-6)
    assert loss(W, q, H) == pytest.approx(total) == pytest.approx(0.03355972, rel=1e-5)

    q, total = solve(W, H, 2, act_order=True)
    assert q[1].tolist() == pytest.approx([-0.433333, 0.866667, -0.433333, 0.433333], abs=1e-6)
    assert loss(W, q, H) == pytest.approx(total) == pytest.approx(0.02636458, rel=1e-5)


def test_the_worked_example_on_a_symmetric_grid():
    assert loss(W, nearest(W, 2, 4, symmetric=True), H) == pytest.approx(0.22253229, rel=1e-5)
    q, total = solve(W, H, 2, symmetric=True)
    expected = torch.tensor([[0.6, 0, 0, 0], [0, 0.466667, -0.466667, 0.466667]])
    torch.testing.assert_close(q, expected, atol=1e-6, rtol=0)
    assert total == pytest.approx(0.09566979, rel=1e-5)


SETTINGS = [
    {"act_order": False},
    {"act_order": True},
    {"act_order": False, "static_groups": False},
    {"act_order": True, "static_groups": False},
    {"act_order": True, "group_aware": True},
    {"act_order": True, "group_aware": True, "static_groups": False},
]


@pytest.mark.parametrize("options", SETTINGS)
def test_the_loss_is_that_of_the_result_for_any_block(options):
    w, h = correlated(8, 192)
    q, total = solve(w, h, 4, 32, **options)
    assert loss(w, q, h) == pytest.approx(total, rel=1e-3)
    for block in (1, 50, 192):
        again, _ = solve(w, h, 4, 32, block=block, **options)
        torch.testing.assert_close(again, q)


def test_uncorrelated_inputs_give_nearest_rounding():
    w, _ = correlated(8, 64)
    q, _ = solve(w, 3 * torch.eye(64), 3)
    torch.testing.assert_close(q, nearest(w, 3, 64))


@pytest.mark.parametrize(
    ("bits", "shares"),
    [(4, (0.60, 0.27, 0.43, 0.19)), (3, (0.60, 0.28, 0.50, 0.21)), (2, (0.62, 0.36, 1.07, 0.27))],
)
def test_correlated_inputs_lose_less(bits, shares):
    """The sheet's shares of the error of nearest rounding, which depend on the problem.

    One grid per row, with act-order, groups of 64, those with act-order and static.
    """
    w, h = correlated(128, 256)
    settings = (
        (256, {"act_order": False}),
        (256, {"act_order": True}),
        (64, {"act_order": False, "static_groups": False}),
        (64, {"act_order": True}),
    )
    for share, (group_size, options) in zip(shares, settings, strict=True):
        q, _ = solve(w, h, bits, group_size, **options)
        assert loss(w, q, h) < (share + 0.1) * loss(w, nearest(w, bits, group_size), h)


def packed(w, hessian, format="int4", group_size=32, **options):
    solver = GPTQ(**options)
    weight, order = solver.quantize(
        w, solver.factor(hessian, group_size), format, group_size=group_size
    )
    q = dequantize(weight)
    return q if order is None else q[:, order.argsort()]


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("rule", ["search", "minmax", "mse"])
def test_packed_weight(options, rule):
    w, h = correlated(48, 200)
    plain = dequantize(quantize(w, "int4", group_size=64))
    q = packed(w, h, group_size=64, rule=rule, **options)
    assert loss(w, q, h) < 0.8 * loss(w, plain, h)


def test_groups_of_the_rounding_order_need_an_order():
    """Only act-order without static groups mixes inputs of several groups."""
    w, h = correlated(16, 96)
    for options in SETTINGS:
        solver = GPTQ(**options)
        weight, order = solver.quantize(w, solver.factor(h, 32), group_size=32)
        gathered = options == {"act_order": True, "static_groups": False}
        assert (order is not None) == gathered
        assert weight.shape == (16, 96)


def test_groups_that_stay_together():
    solver = GPTQ(group_aware=True)
    factor = solver.factor(torch.diag(torch.tensor([1.0, 9, 2, 8, 5, 5, 10, 3])), 2)
    assert factor.order.tolist() == [6, 7, 1, 0, 3, 2, 4, 5]
    assert factor.groups.tolist() == [3, 3, 0, 0, 1, 1, 2, 2]


def test_a_weight_on_the_grid_stays():
    w, h = correlated(32, 96)
    w = dequantize(quantize(w, "int4", group_size=32))
    assert torch.equal(packed(w, h), w)


def test_asymmetric_calibration_makes_up_for_changed_inputs():
    """GPTAQ: what matters is that W X₀ of the float model is met on inputs X that have drifted."""
    w, _ = correlated(32, 64)
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(0, -1, 64)
    x0 = torch.randn(512, 64, generator=generator) @ mixing.T
    x = x0 @ (torch.eye(64) + 0.05 * torch.randn(64, 64, generator=generator))
    h, drift = x.T @ x, (x - x0).T @ x
    target = x0 @ w.T
    errors = [
        float((x @ solve(w, h, 4, drift=drift, asymmetric=alpha)[0].T - target).square().sum())
        for alpha in (0.0, 0.25, 1.0)
    ]
    assert errors[2] < errors[1] < errors[0]
    q, _ = solve(w, h, 4, drift=torch.zeros_like(h), asymmetric=1.0)
    torch.testing.assert_close(q, solve(w, h, 4)[0])


def test_asymmetric_correction_without_rounding_is_least_squares():
    """On a fine grid the last column takes up all that its predecessors' drift asks of it."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 2, generator=generator)
    x0 = torch.randn(50, 2, generator=generator)
    x = x0.clone()
    x[:, 0] += 0.3 * torch.randn(50, generator=generator) + 0.2 * x0[:, 1]
    h, drift = x.T @ x, (x - x0).T @ x
    factor = GPTQ(asymmetric=1.0, act_order=False, damping=1e-9).factor(h, 2, drift)
    scale, minimum = torch.full((3, 1), 1e-4), torch.full((3, 1), -10.0)
    codes, _ = round_columns(w, factor, scale, minimum, (0, 200_000))
    q = scale * codes + minimum
    left = x0 @ w.T - x[:, :1] @ w[:, :1].T
    best = torch.linalg.lstsq(x[:, 1:], left).solution.T
    torch.testing.assert_close(q, torch.cat([w[:, :1], best], 1), atol=1e-3, rtol=0)


def test_dead_and_dependent_inputs():
    w, _ = correlated(16, 64)
    x = torch.zeros(128, 64)
    x[:, 1] = torch.randn(128, generator=torch.Generator().manual_seed(0))
    x[:, 2] = x[:, 1]
    q = packed(w, x.T @ x)
    assert torch.isfinite(q).all()
    assert loss(w, q, x.T @ x) <= loss(w, dequantize(quantize(w, "int4")), x.T @ x)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.eye(8), r"gptq: expected a hessian of shape \[64, 64\], got \[8, 8\]"),
        (torch.zeros(64, 8), r"gptq: expected a hessian of shape \[K, K\], got \[64, 8\]"),
        (
            torch.full((64, 64), torch.nan),
            "gptq: expected a finite hessian, got 4096 elements of 4096",
        ),
        (-torch.eye(64), "gptq: expected a positive semidefinite hessian"),
    ],
)
def test_bad_hessians(hessian, message):
    with pytest.raises(ValueError, match=message):
        packed(torch.randn(16, 64), hessian)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "GPTQ: expected damping > 0, got 0.0"),
        ({"asymmetric": 2.0}, r"GPTQ: expected asymmetric in \[0, 1\], got 2.0"),
        ({"group_aware": True, "act_order": False}, "GPTQ: expected act_order with group_aware"),
        ({"rule": "best"}, r"GPTQ: expected rule in \['search', 'minmax', 'mse'\], got 'best'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GPTQ(**options)


def test_a_format_without_a_grid_is_refused():
    w = torch.randn(16, 64)
    with pytest.raises(ValueError, match=r"gptq: expected format in .*'int4', .* got 'nf4'"):
        packed(w, torch.eye(64), "nf4")
    with pytest.raises(ValueError, match=r"gptq: expected format in \['int2', .* got 'int4_sym'"):
        packed(w, torch.eye(64), "int4_sym", static_groups=False)


@pytest.mark.parametrize(
    "format", ["int2", "int3", "int5", "int6", "int8", "int4_sym", "int4_zp", "q6_k", "q4_k"]
)
def test_every_grid(format):
    w, h = correlated(48, 200)
    group_size = {"q6_k": 16}.get(format, 32)
    plain = dequantize(quantize(w, format, group_size=group_size))
    assert loss(w, packed(w, h, format, group_size), h) < 0.8 * loss(w, plain, h)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (softmax_model, {}),
        (linear_model, {}),
        (softmax_model, {"static_groups": False}),
        (softmax_model, {"group_aware": True, "static_groups": False}),
        (softmax_model, {"asymmetric": 0.25}),
    ],
)
def test_a_model_loses_less_than_by_nearest_rounding(make, options):
    model = make()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (4, 64), generator=generator)
    with torch.no_grad():
        exact = model(tokens).logits
    errors = {}
    for solver in (None, GPTQ(**options)):
        changed = copy.deepcopy(model)
        quantize_(changed, "int4", group_size=32, solver=solver, calibration=tokens, progress=False)
        with torch.no_grad():
            errors[solver] = float((changed(tokens).logits - exact).square().mean())
        assert perplexity(changed, tokens[0]) > 0
    assert errors[GPTQ(**options)] < 0.8 * errors[None]
