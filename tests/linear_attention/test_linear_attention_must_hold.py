"""What the papers claim of their mixers, with the numbers."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastweights as fw
import fastweights.nn as fnn
from fastweights.ops.linear_attention.decays import (
    alibi_slopes,
    lightning_log_decay,
    retention_log_decay,
)
from fastweights.ops.linear_attention.distillation import (
    linear_attention_weights,
    mimicry_loss,
    softmax_attention_weights,
)
from fastweights.ops.linear_attention.positions import LRPE, rotary
from fastweights.testing import assert_close


def heads(x: Tensor, projection: nn.Linear, number: int) -> Tensor:
    return projection(x).unflatten(-1, (number, -1))


def quadratic(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """Σ_{s≤t} exp(-slope·(t - s)) (q_t·k_s) v_s by its T×T matrix."""
    age = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    decay = torch.where(age >= 0, (-slopes[:, None, None] * age).exp(), 0.0)
    return torch.einsum("bhij,bjhv->bihv", torch.einsum("bihk,bjhk->bhij", q, k) * decay, v)


# RetNet


def test_retention_decays() -> None:
    expected = torch.tensor([0.96875, 0.984375, 0.9921875, 0.99609375])
    assert_close(retention_log_decay(4).exp(), expected, tolerance=1e-7)


def test_retention_impulse_decays_by_gamma_per_step() -> None:
    q = torch.ones(1, 12, 4, 1, dtype=torch.float64)
    k = torch.zeros_like(q)
    k[:, 2] = 1
    o, _ = fw.linear_attention(q, k, torch.ones_like(q), retention_log_decay(4).double())
    ratio = o[0, 3:, :, 0] / o[0, 2:-1, :, 0]
    gamma = torch.tensor([0.96875, 0.984375, 0.9921875, 0.99609375], dtype=torch.float64)
    assert_close(ratio, gamma.expand(9, 4), tolerance=1e-7)


def test_rotations_see_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 3, 8, dtype=torch.float64)
    lrpe = LRPE(8).double()
    for turn in (rotary, lrpe):

        def product(i: int, j: int, turn=turn) -> Tensor:
            return (turn(q, torch.tensor([[i]])) * turn(k, torch.tensor([[j]]))).sum(dim=-1)

        assert_close(product(9, 4), product(105, 100), tolerance=1e-9)
        assert not torch.allclose(product(9, 4), product(9, 5))


# GLA


def test_saturated_gate_is_plain_linear_attention() -> None:
    mixer = fnn.GatedLinearAttention(hidden_size=32, use_output_gate=False).double()
    nn.init.constant_(mixer.gk_proj[1].bias, 1e4)
    x = torch.randn(2, 21, 32, dtype=torch.float64)
    q, k, v = (heads(x, p, 4) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    o, _ = fw.linear_attention(q, k, v)
    assert_close(mixer(x)[0], mixer.o_proj(mixer.g_norm(o).flatten(2)), tolerance=1e-12)


def test_closed_gate_forgets_all_but_the_token() -> None:
    mixer = fnn.GatedLinearAttention(hidden_size=32)
    nn.init.constant_(mixer.gk_proj[1].bias, -1e5)
    x = torch.randn(2, 9, 32)
    alone = torch.stack([mixer(x[:, t : t + 1])[0][:, 0] for t in range(9)], dim=1)
    assert_close(mixer(x)[0], alone, tolerance=1e-5)


def test_very_strong_gates_are_finite() -> None:
    mixer = fnn.GatedLinearAttention(hidden_size=32)
    nn.init.constant_(mixer.gk_proj[1].bias, -30 * 16)
    x = torch.randn(2, 150, 32, requires_grad=True)
    y, state = mixer(x, output_final_state=True)
    (y.square().sum() + state.square().sum()).backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in (x, *mixer.parameters()))


# Lightning Attention-2


def test_slopes_for_a_power_of_two() -> None:
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


def test_slopes_for_other_head_counts_fill_from_the_next_power() -> None:
    assert alibi_slopes(12) == [*alibi_slopes(8), *(2 ** -(i + 0.5) for i in range(4))]


def test_deeper_layers_forget_less() -> None:
    first, last = (lightning_log_decay(8, layer, 6) for layer in (0, 5))
    slopes = torch.tensor(alibi_slopes(8))
    assert_close(first, -slopes * (1 + 1e-5), tolerance=1e-6)
    assert_close(last, -slopes * 1e-5, tolerance=1e-6)


def test_fla_rule_leaves_head_0_undecayed() -> None:
    expected = -torch.arange(4.0) * 2 * (1 - 1 / 3)
    assert_close(lightning_log_decay(4, 1, 3, "linear"), expected, tolerance=1e-6)


@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize("decay", ["alibi", "linear"])
def test_lightning_attention_is_the_masked_quadratic_form(decay: str, length: int) -> None:
    mixer = fnn.LightningAttention(32, 4, layer_idx=1, num_layers=3, decay=decay).double()
    x = torch.randn(2, length, 32, dtype=torch.float64)
    q, k, v = (F.silu(heads(x, p, 4)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    slopes = -lightning_log_decay(4, 1, 3, decay).double()
    o = mixer.scale * quadratic(q, k, v, slopes).flatten(2)
    expected = mixer.o_proj(mixer.norm(o) * mixer.output_gate(x).sigmoid())
    assert_close(mixer(x)[0], expected, tolerance=1e-10)


# Based


def test_based_attention_is_the_second_order_softmax() -> None:
    mixer = fnn.LinearAttention(
        hidden_size=32,
        num_heads=4,
        expand_k=0.5,
        feature_map="taylor",
        do_feature_map_norm=True,
        output_norm="identity",
    ).double()
    x = torch.randn(2, 19, 32, dtype=torch.float64)
    q, k, v = (heads(x, p, 4) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    s = torch.einsum("bihk,bjhk->bhij", q, k) / 2
    weights = (1 + s + s.square() / 2).tril()
    weights = weights / weights.sum(dim=-1, keepdim=True)
    o = torch.einsum("bhij,bjhv->bihv", weights, v).flatten(2)
    assert_close(mixer(x)[0], mixer.o_proj(o), tolerance=1e-8)


# TransNormer


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e6])
def test_srmsnorm_ignores_scale(scale: float) -> None:
    x = torch.randn(5, 64, dtype=torch.float64)
    norm = fnn.SRMSNorm()
    assert_close(norm(scale * x), norm(x), tolerance=1e-4)
    assert_close(norm(x).square().mean(dim=-1), torch.ones(5).double(), tolerance=1e-6)


@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("length", [1, 8, 29])
def test_block_attention_is_full_attention_under_a_block_diagonal_mask(
    variant: str, length: int
) -> None:
    mixer = fnn.DiagAttention(32, 4, variant=variant, block_size=8).double()
    x = torch.randn(2, length, 32, dtype=torch.float64)
    position = torch.arange(length)
    q, k = (mixer.urpe(heads(x, p, 4), position) for p in (mixer.q_proj, mixer.k_proj))
    v = heads(x, mixer.v_proj, 4)
    same_block = position[:, None] // 8 == position // 8
    visible = same_block & (position[:, None] >= position)
    logits = torch.einsum("bihk,bjhk->bhij", q, k) / math.sqrt(8)
    if variant == "t1":
        weights = logits.relu().masked_fill(~visible, 0)
    else:
        weights = logits.masked_fill(~visible, -math.inf).softmax(dim=-1)
    o = torch.einsum("bhij,bjhv->bihv", weights, v).flatten(2)
    expected = mixer.out_proj(fnn.SRMSNorm()(o) if variant == "t1" else o)
    assert_close(mixer(x)[0], expected, tolerance=1e-10)


def test_a_denominator_makes_gradients_unbounded_and_a_norm_bounds_them() -> None:
    """‖∂o/∂s‖ for s = φ(q)·φ(k), φ = elu, T = 64, K = V = 16, 2000 draws.

    The denominator's tail is heavy: over seeds its 99th percentile is between 600 and 2700.
    """
    q, k, v = (torch.randn(2000, n, 16, dtype=torch.float64) for n in (1, 64, 64))
    s = (F.elu(q) @ F.elu(k).mT).requires_grad_()

    def jacobian_norm(o: Tensor) -> Tensor:
        rows = [torch.autograd.grad(o[..., i].sum(), s, retain_graph=True)[0] for i in range(16)]
        return torch.stack(rows).square().sum(dim=(0, 2, 3)).sqrt()

    divided = jacobian_norm((s @ v) / s.sum(dim=-1, keepdim=True))
    normed = jacobian_norm(fnn.SRMSNorm()(s @ v))
    assert divided.median().item() == pytest.approx(1.2, abs=0.1)
    assert normed.median().item() == pytest.approx(1.6, abs=0.1)
    assert divided.quantile(0.99).item() > 500
    assert normed.quantile(0.99).item() == pytest.approx(3.1, abs=0.3)
    assert divided.max().item() > 1e5
    assert normed.max().item() < 10


def test_blocks_are_not_diluted() -> None:
    """Influence of the last 16 of 64 tokens on an output: all of it in blocks, part of it else."""
    x = torch.randn(1, 64, 32)

    def recent(mixer: nn.Module) -> float:
        jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x)[0][0, 32:].sum(dim=-1), x)
        mass = jacobian[:, 0].norm(dim=-1)
        row, column = torch.arange(32, 64)[:, None], torch.arange(64)
        near = (column <= row) & (column > row - 16)
        return ((mass * near).sum() / mass.sum()).item()

    linear = fnn.LinearAttention(
        hidden_size=32, num_heads=4, feature_map="elu", do_feature_map_norm=True
    )
    assert recent(fnn.DiagAttention(32, 4, block_size=16)) == 1.0
    assert recent(linear) < 0.6


# Hedgehog


@dataclass
class Mimicry:
    """A student before and after distillation, on sequences that it was not trained on."""

    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...]
    teacher: tuple[Tensor, ...]
    elu: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]


class CopyTransformer(nn.Module):
    """Two layers of softmax attention that learn to repeat what came 8 tokens ago."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16, 32)
        self.positions = nn.Parameter(torch.randn(32, 32) / 2)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.head = nn.Linear(32, 16)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x = self.tokens(tokens) + self.positions
        queries_and_keys = []
        for norm, qkv, out in zip(self.norms, self.qkv, self.out, strict=True):
            q, k, v = (y.unflatten(-1, (2, 16)) for y in qkv(norm(x)).chunk(3, dim=-1))
            queries_and_keys.append((q, k))
            p = softmax_attention_weights(q, k)
            x = x + out(torch.einsum("bhij,bjhv->bihv", p, v).flatten(2))
        return self.head(x), queries_and_keys


def repeated(batch: int) -> Tensor:
    return torch.randint(0, 16, (batch, 8)).repeat(1, 5)[:, :33]


@pytest.fixture(scope="module")
def mimicry() -> Mimicry:
    torch.manual_seed(1)
    model = CopyTransformer()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        tokens = repeated(16)
        loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        train, held_out = (model(repeated(8)[:, :-1])[1] for _ in range(2))
    maps = nn.ModuleList(
        fnn.HedgehogFeatureMap(16, 64, num_heads=2, norm="separate") for _ in range(4)
    )

    def student(layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        return tuple(
            linear_attention_weights(maps[2 * i](q), maps[2 * i + 1](k))
            for i, (q, k) in enumerate(layers)
        )

    with torch.no_grad():
        before = student(held_out)
    teacher = [softmax_attention_weights(q, k) for q, k in train]
    optimizer = torch.optim.AdamW(maps.parameters(), lr=2e-2, weight_decay=0.0)
    for _ in range(200):
        loss = sum(mimicry_loss(p, a) for p, a in zip(teacher, student(train), strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = student(held_out)
    elu = fnn.EluFeatureMap()
    return Mimicry(
        before,
        after,
        tuple(softmax_attention_weights(q, k) for q, k in held_out),
        tuple(linear_attention_weights(elu(q), elu(k)) for q, k in held_out),
        tuple(torch.einsum("bihk,bjhk->bhij", q, k) for q, k in held_out),
    )


def entropy(weights: tuple[Tensor, ...]) -> float:
    return sum(mimicry_loss(a, a).item() for a in weights) / len(weights)


def divergence(teacher: tuple[Tensor, ...], student: tuple[Tensor, ...]) -> float:
    crossed = [mimicry_loss(p, a).item() for p, a in zip(teacher, student, strict=True)]
    return sum(crossed) / len(crossed) - entropy(teacher)


def rank_correlation(weights: tuple[Tensor, ...], logits: tuple[Tensor, ...]) -> float:
    """Spearman's ρ of a row's weights with its logits, averaged over rows of 9 tokens or more."""
    rows = []
    for a, s in zip(weights, logits, strict=True):
        for i in range(8, a.shape[-1]):
            x, y = (z[..., i, : i + 1].argsort(-1).argsort(-1).float() for z in (a, s))
            n = i + 1
            rows.append(1 - 6 * (x - y).square().sum(dim=-1) / (n * (n * n - 1)))
    return torch.stack(rows).mean().item()


def test_hedgehog_becomes_monotone(mimicry: Mimicry) -> None:
    assert rank_correlation(mimicry.before, mimicry.logits) < 0.3
    assert rank_correlation(mimicry.after, mimicry.logits) > 0.7


def test_hedgehog_becomes_spiky(mimicry: Mimicry) -> None:
    assert entropy(mimicry.after) < 0.5 * entropy(mimicry.elu)


def test_hedgehog_comes_close_to_softmax(mimicry: Mimicry) -> None:
    before = divergence(mimicry.teacher, mimicry.before)
    after = divergence(mimicry.teacher, mimicry.after)
    assert before > 5 * after
    assert divergence(mimicry.teacher, mimicry.elu) > 5 * after


def test_hedgehog_in_the_plane_is_not_monotone_before_training() -> None:
    """With the identity, the map of (x₁, x₂) sees x₁ - x₂ only."""
    phi = fnn.HedgehogFeatureMap(2, norm="separate")
    x = torch.randn(6, 2)
    assert_close(phi(x), phi(x + 3.0), tolerance=1e-5)
