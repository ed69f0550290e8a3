"""What one step is, beyond the generic tests of its spec: exact claims, and what a seed does."""

import pytest
import torch

from fastweights import reference
from fastweights.functional import dequantize_blockwise, dynamic_map, optimizer_step
from fastweights.ops.optim.spec import STATES, example
from fastweights.testing import assert_close, available_cpu_levels, cpu_level

LEVELS = pytest.mark.parametrize("level", available_cpu_levels())
RULES = pytest.mark.parametrize("rule", list(STATES))
SHAPES = [(5,), (3, 7, 11), (257,), (4100,)]


def zero_state(shape, signed):
    numel = torch.Size(shape).numel()
    codes = torch.full(shape, 127 if signed else 0, dtype=torch.uint8)
    return codes, torch.zeros(-(-numel // 256))


@LEVELS
@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_follow_the_reference(rule, dtype, level):
    call = example(rule, SHAPES, dtype)
    expected, got = call.map_tensors(torch.clone), call.map_tensors(torch.clone)
    reference.optimizer_step(*expected.args, **expected.kwargs)
    with cpu_level(level):
        optimizer_step(*got.args, **got.kwargs)
    # A few roundings of float32, and one to the dtype.
    tolerance = max(2e-6, torch.finfo(dtype).eps)
    assert_close(got.args[0], expected.args[0], tolerance=tolerance, what="parameters")


@LEVELS
@RULES
def test_states_are_next_to_those_of_the_reference(rule, level):
    call = example(rule, SHAPES)
    expected, got = call.map_tensors(torch.clone), call.map_tensors(torch.clone)
    reference.optimizer_step(*expected.args, **expected.kwargs)
    with cpu_level(level):
        optimizer_step(*got.args, **got.kwargs)
    for s in range(len(STATES[rule])):
        for a, b in zip(got.args[4 + s], expected.args[4 + s], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
        differences = torch.cat(
            [
                (a.int() - b.int()).abs().flatten()
                for a, b in zip(got.args[2 + s], expected.args[2 + s], strict=True)
            ]
        )
        # Another code only where rounding decides between two that are equally near.
        assert differences.max() <= 1 and differences.sum() <= 2


@LEVELS
@RULES
def test_a_first_step_is_that_of_32_bits(rule, level):
    coded = example(rule, SHAPES, step=1)
    params, grads, *_ = coded.args
    states, absmax = zip(
        *(
            zip(*(zero_state(p.shape, signed) for p in params), strict=True)
            for signed in STATES[rule]
        ),
        strict=True,
    )
    wide = [[torch.zeros(p.shape) for p in params] for _ in STATES[rule]]
    second = [()] * (2 - len(STATES[rule]))
    expected = [p.clone() for p in params]
    with cpu_level(level):
        optimizer_step(params, grads, *states, *second, *absmax, *second, **coded.kwargs)
        optimizer_step(expected, grads, *wide, *second, **coded.kwargs)
    for got, exact in zip(params, expected, strict=True):
        assert torch.equal(got, exact)


@RULES
def test_a_zero_gradient_leaves_zero_states(rule):
    p, g = torch.randn(700), torch.zeros(700)
    before = p.clone()
    states, absmax = zip(*(zero_state((700,), s) for s in STATES[rule]), strict=True)
    second = [()] * (2 - len(states))
    lists = [*([s] for s in states), *second, *([a] for a in absmax), *second]
    optimizer_step([p], [g], *lists, rule=rule, step=1, lr=0.1)
    assert torch.equal(p, before)
    for state, signed in zip(states, STATES[rule], strict=True):
        assert (state == (127 if signed else 0)).all()
    assert all((a == 0).all() for a in absmax)


@LEVELS
def test_states_keep_their_sign(level):
    # Down to a hundred-millionth of the largest, far below half of the smallest level.
    g = torch.randn(4096) * 10 ** torch.empty(4096).uniform_(-8, 0)
    g[::7] = 0
    state, absmax = zero_state((4096,), True)
    with cpu_level(level):
        optimizer_step(
            [torch.zeros(4096)], [g], [state], absmax1=[absmax], rule="momentum", step=1, lr=0.1
        )
    decoded = dequantize_blockwise(state, absmax)
    assert torch.equal(decoded.sign(), g.sign())
    smallest = dynamic_map()[128] * absmax.repeat_interleave(256)
    assert (decoded.abs()[g != 0] >= 0.999 * smallest[g != 0]).all()


def outcome(call):
    fresh = call.map_tensors(torch.clone)
    optimizer_step(*fresh.args, **fresh.kwargs)
    return fresh


def states_as_numbers(call):
    lists = call.args
    return [
        dequantize_blockwise(codes, absmax, signed=signed)
        for s, signed in enumerate(STATES[call.kwargs["rule"]])
        for codes, absmax in zip(lists[2 + s], lists[4 + s], strict=True)
    ]


@RULES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_gradients_that_are_no_numbers_change_nothing(rule, bad):
    clean = example(rule, [(1000,)])
    spoiled = clean.map_tensors(torch.clone)
    where = torch.arange(1000) % 3 == 0
    where[256:512] = True  # a whole block
    spoiled.args[1][0][where] = bad
    before, after, other = clean.map_tensors(torch.clone), outcome(spoiled), outcome(clean)
    assert torch.equal(after.args[0][0][where], before.args[0][0][where])
    assert torch.equal(after.args[0][0][~where], other.args[0][0][~where])
    for s in range(len(STATES[rule])):
        assert torch.equal(after.args[2 + s][0][256:512], before.args[2 + s][0][256:512])
        assert after.args[4 + s][0][1] == before.args[4 + s][0][1]
    for old, new in zip(states_as_numbers(before), states_as_numbers(after), strict=True):
        scale = torch.nn.functional.pad(new.abs(), (0, 24)).view(4, 256).amax(1)
        scale = scale.repeat_interleave(256)[:1000]
        # What a state is coded with again is another absmax: half the widest spacing of levels.
        assert ((new - old).abs() <= scale * 0.9 / 64 / 2 * 1.01)[where].all()


@RULES
def test_a_last_block_without_a_number_is_not_touched(rule):
    call = example(rule, [(259,)])
    call.args[1][0][256:] = torch.nan
    before, after = call.map_tensors(torch.clone), outcome(call)
    assert torch.equal(after.args[0][0][256:], before.args[0][0][256:])
    for s in range(len(STATES[rule])):
        assert torch.equal(after.args[2 + s][0][256:], before.args[2 + s][0][256:])
        assert after.args[4 + s][0][1] == before.args[4 + s][0][1]


def test_a_square_that_overflows_changes_nothing():
    call = example("adam", [(300,)])
    call.args[1][0][7] = 1e25
    before, after = call.map_tensors(torch.clone), outcome(call)
    assert after.args[0][0][7] == before.args[0][0][7]
    assert all(a.isfinite().all() for lists in after.args[4:] for a in lists)


@RULES
def test_every_tensor_counts_for_itself(rule):
    call = example(rule, SHAPES)
    together = outcome(call)
    for i in range(len(SHAPES)):
        alone = call._replace(args=tuple(lists[i : i + 1] for lists in call.args))
        alone = outcome(alone)
        for a, b in zip(alone.args, together.args, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b[i : i + 1], strict=True))


def test_gradients_may_have_any_strides():
    call = example("adam", [(40, 30)])
    strided = call.map_tensors(torch.clone)
    strided.args[1][0] = strided.args[1][0].T.contiguous().T
    assert torch.equal(outcome(strided).args[0][0], outcome(call).args[0][0])


def small_update(seed, value=1.0, numel=100_000):
    """An update of a hundredth of the spacing of bfloat16 at 1."""
    p = torch.full((numel,), value, dtype=torch.bfloat16)
    g = torch.full_like(p, 2**-7 / 100)
    optimizer_step([p], [g], [torch.zeros(numel)], rule="momentum", step=1, lr=1.0, seed=seed)
    return p


def test_stochastic_rounding_has_the_right_mean():
    assert (small_update(None) == 1).all()
    p = small_update(torch.tensor(5)).double()
    assert set(p.tolist()) == {1.0, 1 - 2**-8}
    # Below 1 the spacing is 2^-8: an update of 2^-7 / 100 goes down with probability 0.02.
    assert float((p < 1).double().mean()) == pytest.approx(0.02, abs=4 * (0.02 / 1e5) ** 0.5)


def test_stochastic_rounding_keeps_what_needs_none():
    for value in (1.5, -0.0, torch.inf, -torch.inf):
        p = torch.full((5000,), value, dtype=torch.bfloat16)
        before = p.clone()
        optimizer_step(
            [p], [torch.zeros_like(p)], [torch.zeros(5000)], rule="momentum", step=1, lr=1.0,
            seed=torch.tensor(1),
        )  # fmt: skip
        assert torch.equal(p, before)


def test_a_seed_says_which_way():
    one, same, other = (small_update(torch.tensor(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    # Neither blocks nor tasks repeat each other.
    rows = (one[: 4096 * 24].view(24, 4096) < 1).float()
    overlap = rows @ rows.T / 4096
    assert (overlap - overlap.diag().diag()).max() < 0.005


@LEVELS
def test_random_bits_are_those_of_the_reference(level):
    calls = [
        example("momentum", [(5000,), (9,)], torch.bfloat16, bits=32, seed=torch.tensor(-3))
        for _ in range(2)
    ]
    reference.optimizer_step(*calls[0].args, **calls[0].kwargs)
    with cpu_level(level):
        optimizer_step(*calls[1].args, **calls[1].kwargs)
    for expected, got in zip(calls[0].args[0], calls[1].args[0], strict=True):
        # Rounding before the random bits are added decides once in 2^16 times.
        assert (got != expected).float().mean() < 1e-3
