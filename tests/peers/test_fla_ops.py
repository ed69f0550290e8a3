"""fla's functions on our ops against fla's own naive references: values and gradients."""

import inspect
from importlib import import_module

import pytest
import torch
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product
from fla.ops.gated_delta_rule.gate import naive_gdn_gate
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.gdn2.naive import naive_recurrent_gdn2
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.hgrn.naive import naive_recurrent_hgrn
from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
from fla.ops.kda.naive import naive_recurrent_kda
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.retention.naive import naive_retention
from fla.ops.simple_gla.naive import naive_parallel_simple_gla, naive_recurrent_simple_gla

from fastweights.integrations.fla import ops, patching
from fastweights.testing import assert_close

B, T, H, K, V = 2, 70, 2, 8, 12
N, LENGTHS = 4, (0, 5, 64, 1)  # packed: an empty sequence, and one of a single token
TOLERANCE = 2e-4  # sums of T products in float32 on either side


def draw(*shape, seed, positive=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.abs() if positive else x


def offsets():
    return torch.tensor((0, *LENGTHS)).cumsum(0)


def leaves(packed=False, heads=H, value_heads=H, length=T, rows=1):
    """q, k, v and a state; `rows` of k and v for one of q."""
    b, n = (1, N) if packed else (B, B)
    return {
        "q": draw(b, length, heads, K, seed=1),
        "k": torch.nn.functional.normalize(draw(b, length * rows, heads, K, seed=2), dim=-1),
        "v": draw(b, length * rows, value_heads, V, seed=3),
        "initial_state": draw(n, value_heads, K, V, seed=4),
    }


def gate(*shape, seed=5):
    return -draw(*shape, seed=seed, positive=True)


def beta(*shape, seed=6):
    return draw(*shape, seed=seed).sigmoid()


def run(function, inputs):
    """o, the final state, and the gradients of every input through both."""
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o, state = function(**inputs)
    loss = (o * draw(*o.shape, seed=8)).sum()
    if state is not None:
        loss = loss + (state * draw(*state.shape, seed=9)).sum()
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {"o": o, "state": state} | dict(zip(inputs, grads, strict=True))


def check(ours, naive, inputs, tolerance=TOLERANCE):
    assert_close(run(ours, inputs), run(naive, inputs), tolerance=tolerance)


def by_sequence(naive, rows=None):
    """`naive` on each packed sequence; an empty one returns its initial state.

    `rows` says how many rows of an argument belong to one token, if not 1.
    """

    def call(initial_state, **inputs):
        outputs, states = [], []
        for n, (start, end) in enumerate(zip(offsets()[:-1], offsets()[1:], strict=True)):
            state = initial_state[n : n + 1]
            if start == end:
                states.append(state)
                continue
            each = {
                name: x[:, start * (rows or {}).get(name, 1) : end * (rows or {}).get(name, 1)]
                for name, x in inputs.items()
            }
            o, state = naive(**each, initial_state=state)
            outputs.append(o)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states)

    return call


def v_first(function):
    """`function` with its states transposed."""

    def call(initial_state, **inputs):
        o, state = function(initial_state=initial_state.mT, **inputs)
        return o, state.mT

    return call


def head_first(naive):
    def call(initial_state=None, **inputs):
        o, state = naive(
            **{name: x.transpose(1, 2) for name, x in inputs.items()}, initial_state=initial_state
        )
        return o.transpose(1, 2), state

    return call


def with_state(function, **options):
    return lambda **inputs: function(**inputs, output_final_state=True, **options)


def grouped(naive):
    """`naive` with q and k repeated for the value heads, as GVA means it."""

    def call(q, k, v, **inputs):
        groups = v.shape[2] // q.shape[2]
        return naive(
            q=q.repeat_interleave(groups, 2), k=k.repeat_interleave(groups, 2), v=v, **inputs
        )

    return call


def normalized(naive):
    def call(q, k, **inputs):
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        return naive(q=q, k=k, **inputs)

    return call


# ---- linear attention and its decays -----------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize(
    "name", ["chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn"]
)
def test_linear_attn(name, scale, packed):
    naive = with_state(naive_recurrent_linear_attn, scale=scale)
    options = {"scale": scale, "normalize": False}
    if packed:
        naive, options["cu_seqlens"] = by_sequence(naive), offsets()
    check(with_state(getattr(ops, name), **options), naive, leaves(packed))


@pytest.mark.parametrize("name", ["chunk_linear_attn", "fused_recurrent_linear_attn"])
def test_linear_attn_normalized(name):
    def with_z_in_o(function):
        def call(initial_state, z, **others):
            o, (S, last) = function(
                **others,
                initial_state=(initial_state, z),
                normalize=True,
                output_final_state=True,
            )
            return torch.cat([o.flatten(), last.flatten()]), S

        return call

    inputs = leaves() | {"z": draw(B, 1, H, K, seed=7, positive=True)}
    inputs |= {"q": inputs["q"].exp(), "k": inputs["k"].exp()}
    check(with_z_in_o(getattr(ops, name)), with_z_in_o(naive_recurrent_linear_attn), inputs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "name", ["chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla"]
)
def test_simple_gla(name, packed):
    naive, options = with_state(naive_recurrent_simple_gla), {}
    inputs = leaves(packed)
    inputs["g"] = gate(*inputs["q"].shape[:3])
    if packed:
        naive, options = by_sequence(naive), {"cu_seqlens": offsets()}
    check(with_state(getattr(ops, name), **options), naive, inputs)


@pytest.mark.parametrize("name", ["chunk_simple_gla", "fused_recurrent_simple_gla"])
def test_simple_gla_with_states_v_first(name):
    inputs = leaves() | {"g": gate(B, T, H)}
    inputs["initial_state"] = inputs["initial_state"].mT
    check(
        with_state(getattr(ops, name), state_v_first=True),
        v_first(with_state(naive_recurrent_simple_gla)),
        inputs,
    )


def test_parallel_simple_gla():
    inputs = leaves() | {"g": gate(B, T, H)}
    inputs.pop("initial_state")
    got = ops.parallel_simple_gla(**inputs, output_attentions=True)
    assert_close(got, naive_parallel_simple_gla(**inputs), tolerance=TOLERANCE)
    check(ops.parallel_simple_gla, lambda **x: (naive_parallel_simple_gla(**x)[0], None), inputs)


@pytest.mark.parametrize(
    "name",
    ["chunk_retention", "fused_chunk_retention", "fused_recurrent_retention", "parallel_retention"],
)
def test_retention(name):
    inputs = leaves()
    inputs.pop("initial_state")

    def naive(**x):
        return naive_retention(*(y.transpose(1, 2) for y in x.values())).transpose(1, 2), None

    check(getattr(ops, name), naive, inputs)


@pytest.mark.parametrize("name", ["chunk_lightning_attn", "fused_recurrent_lightning_attn"])
def test_lightning_attn(name):
    layer_idx, num_layers = 3, 12
    decay = -(8 / H * (1 - layer_idx / num_layers)) * torch.arange(H, dtype=torch.float)

    def naive(**x):
        return naive_recurrent_simple_gla(**x, g=decay.expand(B, T, H))

    check(
        with_state(getattr(ops, name), layer_idx=layer_idx, num_layers=num_layers), naive, leaves()
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["chunk_gla", "fused_recurrent_gla"])
def test_gla(name, packed):
    naive, options = with_state(naive_recurrent_gla), {}
    inputs = leaves(packed)
    inputs["gk"] = gate(*inputs["q"].shape)
    if packed:
        naive, options = by_sequence(naive), {"cu_seqlens": offsets()}
    function = with_state(getattr(ops, name), **options)

    def ours(gk, **x):
        return function(**x, **{"g" if name == "chunk_gla" else "gk": gk})

    check(ours, naive, inputs)


# ---- the delta rules ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["chunk_delta_rule", "fused_recurrent_delta_rule"])
def test_delta_rule(name, packed, norm):
    naive = head_first(delta_rule_recurrence)
    naive = normalized(naive) if norm else naive
    options = {"use_qk_l2norm_in_kernel": norm}
    inputs = leaves(packed)
    inputs["beta"] = beta(*inputs["q"].shape[:3])
    if packed:
        naive, options["cu_seqlens"] = by_sequence(naive), offsets()
    check(with_state(getattr(ops, name), **options), naive, inputs)


def test_delta_rule_with_a_beta_per_value_channel():
    inputs = leaves() | {"beta": beta(B, T, H, V)}
    check(with_state(ops.fused_recurrent_delta_rule), head_first(delta_rule_recurrence), inputs)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("value_heads", [H, 2 * H])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])
def test_gated_delta_rule(name, packed, value_heads, norm):
    naive = with_state(grouped(naive_recurrent_gated_delta_rule))
    naive = normalized(naive) if norm else naive
    options = {"use_qk_l2norm_in_kernel": norm}
    inputs = leaves(packed, value_heads=value_heads)
    inputs |= {"g": gate(*inputs["v"].shape[:3]), "beta": beta(*inputs["v"].shape[:3])}
    if packed:
        naive, options["cu_seqlens"] = by_sequence(naive), offsets()
    check(with_state(getattr(ops, name), **options), naive, inputs)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])
def test_gated_delta_rule_with_raw_gates_and_states_v_first(name, negative):
    def naive(g, A_log, dt_bias, beta, **x):
        return naive_recurrent_gated_delta_rule(
            **x,
            g=naive_gdn_gate(g, A_log, dt_bias),
            beta=(2 if negative else 1) * beta.sigmoid(),
            output_final_state=True,
        )

    inputs = leaves() | {"g": draw(B, T, H, seed=5), "beta": draw(B, T, H, seed=6)}
    inputs |= {"A_log": draw(H, seed=10), "dt_bias": draw(H, seed=11)}
    inputs["initial_state"] = inputs["initial_state"].mT
    options = {
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": negative,
        "state_v_first": True,
    }
    check(with_state(getattr(ops, name), **options), v_first(naive), inputs)


def test_gated_delta_rule_with_every_gate():
    """fla has no reference for gk and gv: the recurrence of its kernel, written out."""

    def naive(q, k, v, g, gk, gv, beta, initial_state):
        S, outputs = initial_state, []
        for t in range(T):
            decay = (g[:, t, :, None, None] + gk[:, t, :, :, None] + gv[:, t, :, None, :]).exp()
            S = decay * S
            d = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S))
            S = S + k[:, t, :, :, None] * d[:, :, None, :]
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * K**-0.5, S))
        return torch.stack(outputs, 1), S

    inputs = leaves() | {"g": gate(B, T, H), "beta": beta(B, T, H)}
    inputs |= {"gk": gate(B, T, H, K, seed=12), "gv": gate(B, T, H, V, seed=13)}
    check(with_state(ops.fused_recurrent_gated_delta_rule), naive, inputs)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("value_heads", [H, 2 * H])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_kda(name, packed, value_heads, norm):
    naive = with_state(naive_recurrent_kda)
    naive = normalized(naive) if norm else naive
    options = {"use_qk_l2norm_in_kernel": norm}
    inputs = leaves(packed, value_heads=value_heads)
    rows = inputs["v"].shape[:3]
    inputs |= {"g": gate(*rows, K), "beta": beta(*rows)}
    if packed:
        naive, options["cu_seqlens"] = by_sequence(naive), offsets()
    check(with_state(getattr(ops, name), **options), naive, inputs)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_kda_with_raw_gates_and_states_v_first(name, lower_bound):
    def naive(g, A_log, dt_bias, beta, **x):
        if lower_bound is None:
            g = naive_kda_gate(g, A_log, dt_bias)
        else:
            g = naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound)
        return naive_recurrent_kda(**x, g=g, beta=2 * beta.sigmoid(), output_final_state=True)

    inputs = leaves(value_heads=2 * H)
    inputs |= {"g": draw(B, T, 2 * H, K, seed=5), "beta": draw(B, T, 2 * H, seed=6)}
    inputs |= {"A_log": draw(2 * H, seed=10), "dt_bias": draw(2 * H * K, seed=11)}
    inputs["initial_state"] = inputs["initial_state"].mT
    options = {
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": True,
        "lower_bound": lower_bound,
        "state_v_first": True,
    }
    check(with_state(getattr(ops, name), **options), v_first(naive), inputs)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_kda_gate(lower_bound):
    def naive(g, A_log, dt_bias):
        if lower_bound is None:
            return naive_kda_gate(g, A_log, dt_bias), None
        return naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound), None

    def ours(**x):
        return ops.fused_kda_gate(**x, lower_bound=lower_bound), None

    inputs = {"g": draw(B, T, H, K, seed=5), "A_log": draw(H, seed=10)}
    check(ours, naive, inputs | {"dt_bias": draw(H * K, seed=11)}, tolerance=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["chunk_gdn2", "fused_recurrent_gdn2"])
def test_gdn2(name, packed):
    naive, options = with_state(naive_recurrent_gdn2), {}
    inputs = leaves(packed)
    shape = inputs["q"].shape
    inputs |= {"g": gate(*shape), "b": beta(*shape), "w": beta(*inputs["v"].shape, seed=7)}
    if packed:
        naive, options = by_sequence(naive), {"cu_seqlens": offsets()}
    check(with_state(getattr(ops, name), **options), naive, inputs)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_gated_delta_product(rows, packed, gated):
    inputs = leaves(packed, rows=rows)
    inputs["beta"] = 2 * beta(*inputs["k"].shape[:3])
    if gated:
        inputs["g"] = gate(*inputs["q"].shape[:3])

    def naive(**x):
        return naive_recurrent_gated_delta_product(
            **({"g": None} | x), scale=K**-0.5, num_householder=rows, output_final_state=True
        )

    def ours(**x):
        return ops.chunk_gated_delta_product(
            **({"g": None} | x),
            num_householder=rows,
            output_final_state=True,
            cu_seqlens=offsets() if packed else None,
        )

    if packed:
        naive = by_sequence(naive, rows={"k": rows, "v": rows, "beta": rows})
    check(ours, naive, inputs)


# ---- the elementwise recurrence ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "packed"),
    [("chunk_hgrn", False), ("fused_recurrent_hgrn", False), ("fused_recurrent_hgrn", True)],
)
def test_hgrn(name, packed):
    b, n = (1, N) if packed else (B, B)
    inputs = {"x": draw(b, T, 24, seed=1), "g": gate(b, T, 24)}
    inputs["initial_state"] = draw(n, 24, seed=4)
    naive, options = with_state(naive_recurrent_hgrn), {}
    if packed:
        naive, options = by_sequence(naive), {"cu_seqlens": offsets()}
    check(with_state(getattr(ops, name), **options), naive, inputs)


# ---- signatures --------------------------------------------------------------------------------


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("target", patching._FUNCTIONS, ids=lambda target: target.name)
def test_names_order_and_defaults_are_those_of_fla(target):
    theirs = getattr(import_module(target.module), target.name)
    assert parameters(target.ours) == parameters(theirs)


def test_every_public_function_of_these_families_is_there():
    modules = [t.module for t in patching._FUNCTIONS if t.module.startswith("fla.ops.")]
    theirs = {
        name
        for module in modules
        for name in import_module(module.rpartition(".")[0]).__all__
        if not name.startswith("naive_")
    }
    assert theirs <= set(ops.__all__)
