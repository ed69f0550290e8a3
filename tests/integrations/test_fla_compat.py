"""fla's functions on our ops: what they refuse, how they are called, what they compute.

fla itself is not needed here; against its own references they are tested in tests/peers.
"""

import inspect
import warnings

import pytest
import torch
from torch.testing import assert_close

from fastweights import reference
from fastweights.integrations.fla import ops

B, T, H, K, V = 2, 9, 2, 4, 6
SIMPLE = ["chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla"]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(rows=B, value_heads=H, dtype=torch.float32):
    return (
        draw(rows, T, H, K, seed=1, dtype=dtype),
        draw(rows, T, H, K, seed=2, dtype=dtype),
        draw(rows, T, value_heads, V, seed=3, dtype=dtype),
    )


def gate(*shape, dtype=torch.float32):
    return -draw(*shape, seed=4, dtype=dtype).abs()


def beta(*shape, dtype=torch.float32):
    return draw(*shape, seed=5, dtype=dtype).sigmoid()


def call(name, rows=B, **options):
    """A call of `name` that works, with `options` changed."""
    function = getattr(ops, name)
    q, k, v = qkv(rows)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "g": gate(rows, T, H),
        "beta": beta(rows, T, H),
        "b": beta(rows, T, H, K),
        "w": beta(rows, T, H, V),
        "layer_idx": 1,
        "num_layers": 4,
        "num_householder": 1,
    }
    if any(family in name for family in ("chunk_gla", "kda", "gdn2")):
        arguments["g"] = gate(rows, T, H, K)
    if "hgrn" in name:
        arguments |= {"x": draw(rows, T, 8), "g": gate(rows, T, 8)}
    required = {
        parameter.name: arguments[parameter.name]
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD
    }
    return function(**(required | options))


REMOVED = {"fused_chunk_delta_rule", "fused_chunk_gla", "fused_kda_gate"}
PARALLEL = {"parallel_retention", "parallel_simple_gla"}
ALL = sorted(set(ops.__all__) - REMOVED)


@pytest.mark.parametrize("name", ALL)
def test_every_function_has_a_call_that_works(name):
    o, other = call(name)
    assert o.shape[:2] == (B, T)
    assert other is None or isinstance(other, tuple)


# ---- what is refused, in fla's words -----------------------------------------------------------

PACKED = [name for name in ALL if name not in ("chunk_hgrn",)]


@pytest.mark.parametrize("name", PACKED)
def test_packing_needs_one_row(name):
    with pytest.raises(
        ValueError, match=r"batch size is expected to be 1 rather than 2 when using `cu_seqlens`"
    ):
        call(name, cu_seqlens=torch.tensor([0, 4, T]))


@pytest.mark.parametrize("name", [name for name in PACKED if name not in PARALLEL])
def test_packing_needs_a_state_for_every_sequence(name):
    states = draw(3, 8) if "hgrn" in name else draw(3, H, K, V)
    with pytest.raises(
        ValueError, match=r"equal to the number of input sequences, i.e., 2 rather than 3"
    ):
        call(name, rows=1, cu_seqlens=torch.tensor([0, 4, T]), initial_state=states)


@pytest.mark.parametrize(
    "name",
    [
        "chunk_delta_rule",
        "chunk_gated_delta_rule",
        "chunk_lightning_attn",
        "chunk_retention",
        "chunk_simple_gla",
    ],
)
def test_head_first_raises_a_deprecation_warning_whatever_its_value(name):
    with pytest.raises(DeprecationWarning, match="head_first has been removed"):
        call(name, head_first=False)


@pytest.mark.parametrize(
    "name",
    [
        "chunk_gla",
        "chunk_hgrn",
        "chunk_linear_attn",
        "fused_chunk_retention",
        "fused_chunk_simple_gla",
        "fused_recurrent_delta_rule",
        "fused_recurrent_hgrn",
        "fused_recurrent_lightning_attn",
        "fused_recurrent_linear_attn",
        "parallel_retention",
        "parallel_simple_gla",
        "chunk_gated_delta_product",
    ],
)
def test_head_first_is_unknown_where_fla_takes_no_more_keywords(name):
    with pytest.raises(TypeError, match="head_first"):
        call(name, head_first=False)


SWALLOWING = [
    "chunk_gdn2",
    "chunk_kda",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn2",
    "fused_recurrent_gla",
    "fused_recurrent_kda",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
]


@pytest.mark.parametrize("name", SWALLOWING)
def test_the_rest_ignores_what_it_does_not_know(name):
    assert_close(call(name, head_first=False, nonsense=3), call(name))


@pytest.mark.parametrize("name", [*SWALLOWING, "chunk_gated_delta_rule"])
def test_the_former_name_of_the_state_layout_warns(name):
    state = draw(B, H, V, K)
    with pytest.warns(DeprecationWarning, match="renamed to `state_v_first`"):
        got = call(name, initial_state=state, transpose_state_layout=True)
    assert_close(got, call(name, initial_state=state, state_v_first=True))
    with pytest.raises(ValueError, match="Cannot pass both `state_v_first` and the deprecated"):
        call(name, state_v_first=True, transpose_state_layout=True)


def test_chunk_simple_gla_ignores_the_former_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(
            call("chunk_simple_gla", transpose_state_layout=True), call("chunk_simple_gla")
        )


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("chunk_simple_gla", 48, "`chunk_size` must be a power of 2, got 48"),
        ("chunk_delta_rule", 128, "`chunk_size` must be 16, 32, or 64, got 128"),
        ("chunk_gated_delta_rule", 8, "`chunk_size` must be 16, 32, or 64 for Gated Delta Rule"),
        ("chunk_kda", 16, "`chunk_size` must be either 32 or 64 for KDA, got 16"),
        ("chunk_gdn2", 32, "`chunk_size` must be 64 for GDN-2, got 32"),
    ],
)
def test_chunk_sizes(name, size, message):
    with pytest.raises(ValueError, match=message):
        call(name, chunk_size=size)
    assert_close(call(name, chunk_size=64), call(name))


@pytest.mark.parametrize("name", ["chunk_gla", "chunk_kda", "chunk_gdn2"])
def test_states_in_float32_only(name):
    with pytest.raises(AssertionError, match="initial_state must be in float32"):
        call(name, initial_state=draw(B, H, K, V).bfloat16())


@pytest.mark.parametrize("name", [*SIMPLE, "chunk_delta_rule", "chunk_gated_delta_rule"])
def test_states_of_any_dtype_elsewhere(name):
    state = draw(B, H, K, V).bfloat16()
    got = call(name, initial_state=state, output_final_state=True)
    assert_close(got, call(name, initial_state=state.float(), output_final_state=True))
    assert got[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "changed", "error", "message"),
    [
        ("chunk_gla", {"g": gate(B, T, H)}, AssertionError, "q, k, g must have the same shape"),
        ("chunk_gla", {"v": draw(B, T, 1, V)}, AssertionError, "v must be of shape"),
        ("chunk_delta_rule", {"beta": beta(B, T, H, V)}, AssertionError, "beta must be of shape"),
        ("chunk_delta_rule", {"v": draw(B, T, H, V).half()}, AssertionError, "same dtype"),
        ("fused_recurrent_delta_rule", {"scale": -1.0}, AssertionError, "scale must be positive"),
        (
            "chunk_gated_delta_rule",
            {"k": draw(B, T, 1, K)},
            ValueError,
            r"q and k must have the same number of heads, but got q.shape\[2\]=2",
        ),
        (
            "chunk_gated_delta_rule",
            {"v": draw(B, T, 3, V)},
            ValueError,
            r"num_v_heads \(HV=3\) must be evenly divisible by num_heads \(H=2\)",
        ),
        (
            "chunk_gated_delta_rule",
            {"use_gate_in_kernel": True},
            AssertionError,
            "A_log must be provided when use_gate_in_kernel=True",
        ),
        (
            "fused_recurrent_gated_delta_rule",
            {"use_gate_in_kernel": True, "g": gate(B, T, H)},
            ValueError,
            "`A_log` must be provided when `use_gate_in_kernel=True`",
        ),
        (
            "fused_recurrent_gated_delta_rule",
            {"use_gate_in_kernel": True, "A_log": draw(H)},
            ValueError,
            r"`g` \(raw pre-activation\) must be provided",
        ),
        (
            "fused_recurrent_gated_delta_rule",
            {"gk": gate(B, T, H)},
            ValueError,
            r"`gk` must have shape \[2, 9, 2, 4\], got \[2, 9, 2\]",
        ),
        (
            "chunk_kda",
            {"use_gate_in_kernel": True},
            ValueError,
            "`A_log` must be provided when `use_gate_in_kernel=True` and `lower_bound` is not set",
        ),
        (
            "chunk_kda",
            {"use_gate_in_kernel": True, "safe_gate": True, "A_log": draw(H)},
            ValueError,
            "`lower_bound` must be specified when `safe_gate=True`",
        ),
        (
            "chunk_kda",
            {"use_gate_in_kernel": True, "safe_gate": True, "lower_bound": -6.0},
            ValueError,
            r"`lower_bound` must be in the safe range \[-5, 0\), got -6.0",
        ),
        ("chunk_kda", {"g": gate(B, T, H)}, AssertionError, r"g must have shape \[B, T, HV, K\]"),
        ("chunk_kda", {"beta": beta(B, T)}, AssertionError, r"beta must have shape \[B, T, HV\]"),
        ("chunk_gdn2", {"b": beta(B, T, H, V)}, AssertionError, "b must have shape"),
        ("chunk_gdn2", {"w": beta(B, T, H, K)}, AssertionError, "w must have shape"),
        (
            "chunk_gated_delta_product",
            {"num_householder": 2},
            AssertionError,
            r"k must have shape \[2, 18, 2, 4\], got \[2, 9, 2, 4\]",
        ),
        (
            "parallel_simple_gla",
            {"output_attentions": True, "cu_seqlens": torch.tensor([0, T]), "rows": 1},
            AssertionError,
            "output_attentions=True is not supported with variable-length sequences",
        ),
        (
            "fused_recurrent_hgrn",
            {"cu_seqlens": torch.tensor([0, 4]), "rows": 1},
            ValueError,
            r"`cu_seqlens` must rise from 0 to 9, got \[0, 4\]",
        ),
        (
            "fused_recurrent_linear_attn",
            {"initial_state": (draw(B, H, K, V), draw(B, 1, H, K))},
            TypeError,
            "`initial_state` must be a tensor without `normalize`",
        ),
    ],
)
def test_bad_arguments(name, changed, error, message):
    with pytest.raises(error, match=message):
        call(name, **changed)


@pytest.mark.parametrize(
    "name",
    [
        "chunk_gated_delta_rule",
        "chunk_kda",
        "fused_recurrent_gated_delta_rule",
        "fused_recurrent_kda",
    ],
)
def test_negative_eigenvalues_need_the_sigmoid(name):
    with pytest.raises(ValueError, match="`allow_neg_eigval=True` requires"):
        call(name, allow_neg_eigval=True)


@pytest.mark.parametrize(
    "name", ["chunk_gated_delta_rule", "chunk_kda", "chunk_gdn2", "chunk_gated_delta_product"]
)
def test_context_parallelism_is_refused(name):
    with pytest.raises(NotImplementedError, match="cp_context"):
        call(name, cp_context=object())


@pytest.mark.parametrize("name", ["chunk_kda", "chunk_gdn2"])
def test_intermediate_states_are_refused(name):
    with pytest.raises(NotImplementedError, match="return_intermediate_states"):
        call(name, return_intermediate_states=True)


@pytest.mark.parametrize("name", ["fused_chunk_delta_rule", "fused_chunk_gla"])
def test_what_fla_removed(name):
    with pytest.raises(NotImplementedError, match=f"{name}.? is deprecated. Please use"):
        getattr(ops, name)(q=None)


# ---- how they are called -----------------------------------------------------------------------


def test_linear_attn_normalizes_by_default_in_chunks_only():
    q, k, v = (x.exp() for x in qkv())
    plain, _ = reference.linear_attention(q, k, v)
    normalized, _ = reference.linear_attention(q, k, v, normalize=True, eps=1e-10)
    assert_close(ops.chunk_linear_attn(q, k, v)[0], normalized)
    assert_close(ops.fused_chunk_linear_attn(q, k, v)[0], normalized)
    assert_close(ops.fused_recurrent_linear_attn(q, k, v)[0], plain)


def test_linear_attn_returns_the_sum_of_the_keys_whenever_it_normalizes():
    q, k, v = (x.exp() for x in qkv())
    _, (S, z) = ops.chunk_linear_attn(q, k, v)
    assert S is None
    assert_close(z, k.sum(1, keepdim=True))
    assert ops.fused_recurrent_linear_attn(q, k, v)[1] is None
    # A pair without S is what such a call returned: it continues from z alone.
    o, _ = ops.chunk_linear_attn(q, k, v, initial_state=(None, z))
    zeros = q.new_zeros(B, H, K, V)
    assert_close(o, ops.chunk_linear_attn(q, k, v, initial_state=(zeros, z))[0])


def test_linear_attn_continues_from_either_state():
    q, k, v = (x.exp() for x in qkv())
    whole, (S, z) = ops.chunk_linear_attn(q, k, v, output_final_state=True)
    first = [x[:, :4] for x in (q, k, v)]
    rest = [x[:, 4:] for x in (q, k, v)]
    _, state = ops.chunk_linear_attn(*first, output_final_state=True)
    o, (S2, z2) = ops.fused_recurrent_linear_attn(
        *rest, initial_state=state, output_final_state=True, normalize=True
    )
    assert_close(o, whole[:, 4:])
    assert_close((S2, z2), (S, z))
    bare, _ = ops.chunk_linear_attn(*rest, initial_state=state[0])
    paired, _ = ops.chunk_linear_attn(*rest, initial_state=(state[0], torch.zeros_like(z)))
    assert_close(bare, paired)


def test_the_order_of_the_gates():
    q, k, v = qkv()
    g, b = gate(B, T, H), beta(B, T, H)
    expected, _ = reference.delta_rule(q, k, v, g=g, beta=b)
    assert_close(ops.chunk_gated_delta_rule(q, k, v, g, b)[0], expected)
    # g, gk, gv, beta: a beta in fifth place is refused, not taken for a gate.
    assert_close(ops.fused_recurrent_gated_delta_rule(q, k, v, g, None, None, b)[0], expected)
    with pytest.raises(ValueError, match="`gk` must have shape"):
        ops.fused_recurrent_gated_delta_rule(q, k, v, g, b)


@pytest.mark.parametrize("value_heads", [H, 2 * H])
def test_no_beta_is_one_for_every_value_head(value_heads):
    q, k, v = qkv(value_heads=value_heads)
    k = torch.nn.functional.normalize(k, dim=-1)
    got, _ = ops.fused_recurrent_gated_delta_rule(q, k, v)
    assert_close(got, reference.delta_rule(q, k, v)[0])
    raw, _ = ops.fused_recurrent_gated_delta_rule(q, k, v, use_beta_sigmoid_in_kernel=True)
    ones = q.new_ones(B, T, value_heads)
    assert_close(raw, reference.delta_rule(q, k, v, beta=ones, beta_sigmoid=True)[0])


def test_a_gate_that_is_not_raw_ignores_the_parameters_of_a_raw_one():
    q, k, v = qkv()
    g, b = gate(B, T, H, K), beta(B, T, H)
    expected, _ = reference.delta_rule(q, k, v, g=g, beta=b)
    got, _ = ops.chunk_kda(q, k, v, g, b, A_log=draw(H), dt_bias=draw(H * K), lower_bound=-5.0)
    assert_close(got, expected)


def test_aliases():
    assert ops.chunk_gdn is ops.chunk_gated_delta_rule
    assert ops.fused_recurrent_gdn is ops.fused_recurrent_gated_delta_rule


def test_gamma_has_no_gradient_and_adds_to_a_gate():
    q, k, v = qkv()
    gamma = gate(H).requires_grad_()
    g = gate(B, T, H).requires_grad_()
    o, _ = ops.chunk_simple_gla(q, k, v, g, gamma)
    assert_close(o, reference.linear_attention(q, k, v, g + gamma)[0])
    o.sum().backward()
    assert gamma.grad is None
    assert g.grad is not None


def test_lightning_decays():
    q, k, v = qkv()
    decay = torch.tensor([0.0, -(8 / H) * (1 - 3 / 12)])
    expected, _ = reference.linear_attention(q, k, v, decay)
    assert_close(ops.chunk_lightning_attn(q, k, v, 3, 12)[0], expected)


def test_retention_decays():
    q, k, v = qkv()
    expected, _ = reference.linear_attention(q, k, v, torch.tensor([1 - 1 / 32, 1 - 1 / 64]).log())
    assert_close(ops.chunk_retention(q, k, v)[0], expected)


@pytest.mark.parametrize(
    "name",
    [
        "fused_recurrent_gla",
        "fused_recurrent_lightning_attn",
        "fused_recurrent_linear_attn",
        "fused_recurrent_retention",
        "fused_recurrent_simple_gla",
    ],
)
def test_reverse_is_the_flipped_sequence(name):
    q, k, v = qkv()
    extra = {"layer_idx": 1, "num_layers": 4} if "lightning" in name else {}
    function = getattr(ops, name)
    o, state = function(q, k, v, **extra, reverse=True, output_final_state=True)
    flipped, last = function(*(x.flip(1) for x in (q, k, v)), **extra, output_final_state=True)
    assert_close(o, flipped.flip(1))
    assert_close(state, last)


def test_parallel_weights_are_those_of_the_output():
    q, k, v = qkv()
    g = gate(B, T, H).requires_grad_()
    o, weights = ops.parallel_simple_gla(q, k, v, g, output_attentions=True)
    assert_close(o, torch.einsum("bhij,bjhv->bihv", weights, v))
    assert not weights.requires_grad
    assert ops.parallel_simple_gla(q, k, v, g)[1] is None
    assert_close(ops.parallel_retention(q, k, v)[0], ops.chunk_retention(q, k, v)[0])


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_gated_delta_product_is_one_decay_and_several_updates(rows):
    q, _, _ = qkv()
    k, v = draw(B, T * rows, H, K, seed=2) / 3, draw(B, T * rows, H, V, seed=3)
    g, b = gate(B, T, H), beta(B, T * rows, H)
    queries, decay = q.new_zeros(B, T, rows, H, K), g.new_zeros(B, T, rows, H)
    queries[:, :, -1], decay[:, :, 0] = q, g
    expected, state = reference.delta_rule(
        queries.flatten(1, 2), k, v, g=decay.flatten(1, 2), beta=b, output_final_state=True
    )
    got = ops.chunk_gated_delta_product(q, k, v, g, b, rows, output_final_state=True)
    assert_close(got, (expected[:, rows - 1 :: rows], state))
