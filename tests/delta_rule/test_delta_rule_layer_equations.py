"""Each layer is the composition of its parts, and some layers are others with equal weights."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastweights.nn as fnn
from fastweights import reference
from fastweights.testing import assert_close

WIDTH = 32
HEADS = {"hidden_size": WIDTH, "num_heads": 2, "head_dim": 8}


def tokens() -> Tensor:
    return torch.randn(2, 13, WIDTH, dtype=torch.float64)


def convolved(layer: nn.Module, x: Tensor, name: str, heads: int) -> Tensor:
    """silu of the short convolution of W x, `[B, T, heads, ·]`, by torch alone."""
    y = x @ getattr(layer, f"{name}_proj").weight.T
    if layer.use_short_conv:
        convolution = getattr(layer, f"{name}_conv1d")
        y = F.pad(y.mT, (convolution.weight.shape[-1] - 1, 0))
        y = F.conv1d(y, convolution.weight, convolution.bias, groups=y.shape[1]).mT
    return F.silu(y).unflatten(-1, (heads, -1))


def qkv(layer: nn.Module, x: Tensor, writes: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return (
        convolved(layer, x, "q", layer.num_heads),
        convolved(layer, x, "k", layer.num_heads * writes),
        convolved(layer, x, "v", layer.num_v_heads * writes),
    )


def normed(layer: nn.Module, o: Tensor) -> Tensor:
    return F.rms_norm(o, o.shape[-1:], layer.o_norm.weight, 1e-5).flatten(2)


def low_rank(x: Tensor, projection: nn.Sequential) -> Tensor:
    first, second = projection
    y = x @ first.weight.T @ second.weight.T
    return y if second.bias is None else y + second.bias


def test_delta_net_is_its_composition() -> None:
    layer = fnn.DeltaNet(hidden_size=WIDTH, num_heads=2, allow_neg_eigval=True).double()
    x = tokens()
    beta = 2 * (x @ layer.b_proj.weight.T).sigmoid()
    o, _ = reference.delta_rule(*qkv(layer, x), beta=beta, qk_l2norm=True)
    assert_close(layer(x)[0], normed(layer, o) @ layer.o_proj.weight.T, tolerance=1e-12)


@pytest.mark.parametrize(
    ("activation", "function"),
    [("relu", F.relu), ("elu", lambda x: F.elu(x) + 1), ("identity", lambda x: x)],
)
@pytest.mark.parametrize("norm", ["l2", "sum"])
def test_delta_net_with_other_features_is_its_composition(
    activation: str, function: Callable[[Tensor], Tensor], norm: str
) -> None:
    layer = fnn.DeltaNet(
        hidden_size=WIDTH,
        num_heads=2,
        use_beta=False,
        use_short_conv=False,
        use_gate=True,
        qk_activation=activation,
        qk_norm=norm,
    ).double()
    x = tokens()
    q, k, v = (
        (x @ p.weight.T).unflatten(-1, (2, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q, k, v = function(q), function(k), F.silu(v)
    if norm == "sum":
        q, k = (y / y.abs().sum(-1, keepdim=True).clamp(min=1e-6) for y in (q, k))
    o, _ = reference.delta_rule(q, k, v, qk_l2norm=norm == "l2")
    gated = normed(layer, o) * F.silu(x @ layer.g_proj.weight.T)
    assert_close(layer(x)[0], gated @ layer.o_proj.weight.T, tolerance=1e-12)


@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize(("activation", "function"), [("swish", F.silu), ("sigmoid", F.sigmoid)])
def test_gated_delta_net_is_its_composition(
    activation: str, function: Callable[[Tensor], Tensor], convolutions: bool
) -> None:
    layer = fnn.GatedDeltaNet(
        **HEADS,
        num_v_heads=4,
        use_short_conv=convolutions,
        conv_bias=True,
        output_gate_activation=activation,
    ).double()
    x = tokens()
    g = -layer.A_log.exp() * F.softplus(x @ layer.a_proj.weight.T + layer.dt_bias)
    beta = (x @ layer.b_proj.weight.T).sigmoid()
    o, _ = reference.delta_rule(*qkv(layer, x), g=g, beta=beta, qk_l2norm=True)
    gated = normed(layer, o) * function(x @ layer.g_proj.weight.T)
    assert_close(layer(x)[0], gated @ layer.o_proj.weight.T, tolerance=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_gated_delta_product_is_its_composition(n: int) -> None:
    """The recurrence is written out: one decay, n corrections, one read."""
    layer = fnn.GatedDeltaProduct(**HEADS, num_v_heads=4, num_householder=n).double()
    x = tokens()
    q, k, v = qkv(layer, x, writes=n)
    q, k = (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
    q, k = q.repeat_interleave(2, 2), k.unflatten(2, (n, 2)).repeat_interleave(2, 3)
    v = v.unflatten(2, (n, 4))
    beta = 2 * (x @ layer.b_proj.weight.T).sigmoid().unflatten(2, (n, 4))
    g = -layer.A_log.exp() * F.softplus(x @ layer.a_proj.weight.T + layer.dt_bias)
    S, outputs = x.new_zeros(2, 4, 8, 16), []
    for t in range(x.shape[1]):
        S = g[:, t].exp()[..., None, None] * S
        for i in range(n):
            d = v[:, t, i] - torch.einsum("bhk,bhkv->bhv", k[:, t, i], S)
            S = S + beta[:, t, i, :, None, None] * k[:, t, i, :, :, None] * d[:, :, None, :]
        outputs.append(8**-0.5 * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    gated = normed(layer, torch.stack(outputs, 1)) * F.silu(x @ layer.g_proj.weight.T)
    y, state = layer(x, output_final_state=True)
    assert_close(y, gated @ layer.o_proj.weight.T, tolerance=1e-12)
    assert_close(state.memory, S, tolerance=1e-12)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_kimi_delta_attention_is_its_composition(lower_bound: float | None) -> None:
    layer = fnn.KimiDeltaAttention(**HEADS, num_v_heads=4, lower_bound=lower_bound).double()
    x = tokens()
    raw = (low_rank(x, layer.f_proj) + layer.dt_bias).unflatten(-1, (4, 8))
    rate = layer.A_log.exp()[:, None]
    g = -rate * F.softplus(raw) if lower_bound is None else lower_bound * (rate * raw).sigmoid()
    beta = (x @ layer.b_proj.weight.T).sigmoid()
    o, _ = reference.delta_rule(*qkv(layer, x), g=g, beta=beta, qk_l2norm=True)
    gated = normed(layer, o) * low_rank(x, layer.g_proj).sigmoid()
    assert_close(layer(x)[0], gated @ layer.o_proj.weight.T, tolerance=1e-12)


def test_gated_delta_net_2_is_its_composition() -> None:
    layer = fnn.GatedDeltaNet2(**HEADS, num_v_heads=4, allow_neg_eigval=True).double()
    x = tokens()
    raw = (low_rank(x, layer.f_proj) + layer.dt_bias).unflatten(-1, (2, 8))
    g = -layer.A_log.exp()[:, None] * F.softplus(raw)
    erase = 2 * (x @ layer.b_proj.weight.T).sigmoid().unflatten(-1, (2, 8))
    write = (x @ layer.w_proj.weight.T).sigmoid().unflatten(-1, (4, 8))
    g, erase = g.repeat_interleave(2, 2), erase.repeat_interleave(2, 2)
    o, _ = reference.delta_rule(*qkv(layer, x), g=g, erase=erase, write=write, qk_l2norm=True)
    gated = normed(layer, o) * low_rank(x, layer.g_proj).sigmoid()
    assert_close(layer(x)[0], gated @ layer.o_proj.weight.T, tolerance=1e-12)


def test_one_householder_is_gated_delta_net() -> None:
    product = fnn.GatedDeltaProduct(**HEADS, num_v_heads=4, num_householder=1).double()
    gated = fnn.GatedDeltaNet(**HEADS, num_v_heads=4, allow_neg_eigval=True).double()
    gated.load_state_dict(product.state_dict())
    x = tokens()
    assert torch.equal(product(x)[0], gated(x)[0])


def test_without_decay_gated_delta_net_is_delta_net() -> None:
    gated = fnn.GatedDeltaNet(hidden_size=WIDTH, num_heads=2, head_dim=16, expand_v=1).double()
    delta = fnn.DeltaNet(hidden_size=WIDTH, num_heads=2, use_gate=True).double()
    gated.load_state_dict(delta.state_dict(), strict=False)
    nn.init.constant_(gated.A_log, -math.inf)
    x = tokens()
    assert_close(gated(x)[0], delta(x)[0], tolerance=1e-12)


def test_one_decay_for_all_channels_is_gated_delta_net() -> None:
    kimi = fnn.KimiDeltaAttention(**HEADS).double()
    gated = fnn.GatedDeltaNet(**HEADS, expand_v=1, output_gate_activation="sigmoid").double()
    weights = gated.state_dict()
    shared = {k: v for k, v in weights.items() if k in kimi.state_dict() and k != "dt_bias"}
    kimi.load_state_dict(shared, strict=False)
    with torch.no_grad():
        kimi.dt_bias.copy_(gated.dt_bias.repeat_interleave(8))
        kimi.f_proj[0].weight.zero_()[:2] = gated.a_proj.weight
        kimi.f_proj[1].weight.zero_()
        for head in range(2):
            kimi.f_proj[1].weight[8 * head : 8 * head + 8, head] = 1
        kimi.g_proj[1].weight.zero_()
        kimi.g_proj[1].bias.fill_(0.3)
    x = tokens()
    gated.g_proj = nn.Linear(WIDTH, 16).double()
    nn.init.zeros_(gated.g_proj.weight)
    nn.init.constant_(gated.g_proj.bias, 0.3)
    assert_close(kimi(x)[0], gated(x)[0], tolerance=1e-12)


def test_equal_gates_make_gated_delta_net_2_kimi_delta_attention() -> None:
    kimi = fnn.KimiDeltaAttention(**HEADS).double()
    second = fnn.GatedDeltaNet2(**HEADS).double()
    weights = kimi.state_dict()
    beta = weights["b_proj.weight"]
    weights["b_proj.weight"] = weights["w_proj.weight"] = beta.repeat_interleave(8, 0)
    second.load_state_dict(weights)
    x = tokens()
    assert_close(second(x)[0], kimi(x)[0], tolerance=1e-12)


PER_GROUP = {
    fnn.GatedDeltaNet: {"q": 1, "k": 1},
    fnn.GatedDeltaProduct: {"q": 1, "k": 2},
    fnn.KimiDeltaAttention: {"q": 1, "k": 1},
    fnn.GatedDeltaNet2: {"q": 1, "k": 1, "b_proj.weight": 1, "f_proj.1": 1, "A_log": 1, "dt": 1},
}


@pytest.mark.parametrize("kind", PER_GROUP)
def test_groups_equal_repeated_heads(kind: type[nn.Module]) -> None:
    grouped = kind(**HEADS, num_v_heads=6).double()
    full = kind(**HEADS | {"num_heads": 6}).double()
    weights = grouped.state_dict()
    for name in weights:
        for prefix, writes in PER_GROUP[kind].items():
            if name.startswith(prefix):
                heads = weights[name].unflatten(0, (writes, 2, -1))
                weights[name] = heads.repeat_interleave(3, dim=1).flatten(0, 2)
    full.load_state_dict(weights)
    x = tokens()
    assert_close(grouped(x)[0], full(x)[0], tolerance=1e-12)
