"""The mixers: one state for every way of reading, published keys, and that they train."""

import copy
import functools
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastweights.nn as fnn
from fastweights import reference
from fastweights.ops.linear_attention.decays import lightning_log_decay, retention_log_decay
from fastweights.ops.linear_attention.positions import rotary
from fastweights.testing import assert_close

WIDTH = 32

MIXERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: fnn.LinearAttention(hidden_size=WIDTH, num_heads=4),
    "linear, normalised": lambda: fnn.LinearAttention(
        hidden_size=WIDTH,
        num_heads=4,
        num_kv_heads=2,
        feature_map="elu",
        do_feature_map_norm=True,
        norm_q=True,
        norm_k=True,
    ),
    "hedgehog per head": lambda: fnn.LinearAttention(
        hidden_size=WIDTH,
        num_heads=4,
        feature_map=functools.partial(fnn.HedgehogFeatureMap, num_heads=4, norm="separate"),
        do_feature_map_norm=True,
        output_norm="identity",
    ),
    "taylor": lambda: fnn.LinearAttention(
        hidden_size=WIDTH,
        num_heads=4,
        expand_k=0.5,
        feature_map="taylor",
        do_feature_map_norm=True,
        output_norm="identity",
    ),
    "retention": lambda: fnn.MultiScaleRetention(hidden_size=WIDTH, num_heads=4, num_kv_heads=2),
    "gated": lambda: fnn.GatedLinearAttention(hidden_size=WIDTH, num_heads=4, num_kv_heads=2),
    "lightning": lambda: fnn.LightningAttention(WIDTH, 4, layer_idx=1, num_layers=3),
    "lightning, linear": lambda: fnn.LightningAttention(WIDTH, 4, 1, 3, decay="linear"),
    "norm t1": lambda: fnn.NormAttention(WIDTH, 4),
    "norm t2": lambda: fnn.NormAttention(WIDTH, 4, variant="t2", lrpe=False),
    "diag t1": lambda: fnn.DiagAttention(WIDTH, 4, block_size=5),
    "diag t2": lambda: fnn.DiagAttention(WIDTH, 4, variant="t2", block_size=5),
    "block": lambda: fnn.TransNormerBlock(WIDTH, 4, layer_idx=0, num_layers=2, block_size=5),
}


@pytest.fixture(params=MIXERS)
def mixer(request: pytest.FixtureRequest) -> nn.Module:
    return MIXERS[request.param]().double()


def tokens(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


def by_steps(mixer: nn.Module, x: Tensor, state: object) -> Tensor:
    with torch.no_grad():
        return torch.stack([mixer.step(x[:, t], state) for t in range(x.shape[1])], dim=1)


def weights_of(mixer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, `[B, T, H, ·]`, computed without the mixer's own code."""
    heads = mixer.num_heads
    return tuple(
        (x @ p.weight.T + (0 if p.bias is None else p.bias)).unflatten(-1, (heads, -1))
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )


def test_steps_equal_one_call(mixer: nn.Module) -> None:
    x = tokens()
    y, final = mixer(x, output_final_state=True)
    state = mixer.init_state(2)
    assert_close(by_steps(mixer, x, state), y, tolerance=1e-12, what="output")
    probe = tokens(length=7)
    assert_close(mixer(probe, state)[0], mixer(probe, final)[0], tolerance=1e-12, what="state")


def test_prompt_then_steps_equal_one_call(mixer: nn.Module) -> None:
    x = tokens(length=17)
    y, _ = mixer(x)
    _, state = mixer(x[:, :11], output_final_state=True)
    got = by_steps(mixer, x[:, 11:], pytree.tree_map(torch.clone, state))
    assert_close(got, y[:, 11:], tolerance=1e-12)


@pytest.mark.parametrize("split", [0, 1, 5, 12, 13])
def test_split_and_resumed_equals_one_call(mixer: nn.Module, split: int) -> None:
    x = tokens().requires_grad_()
    y, _ = mixer(x)
    direction = torch.randn_like(y)
    (expected,) = torch.autograd.grad((y * direction).sum(), x)

    first, state = mixer(x[:, :split], output_final_state=True)
    second, _ = mixer(x[:, split:], state)
    resumed = torch.cat([first, second], dim=1)
    (gradient,) = torch.autograd.grad((resumed * direction).sum(), x)
    assert_close(resumed, y, tolerance=1e-12)
    assert_close(gradient, expected, tolerance=1e-10, what="gradient")


def test_packed_equals_separate(mixer: nn.Module) -> None:
    x = tokens(batch=1, length=19)
    _, states = mixer(tokens(batch=4, length=3), output_final_state=True)
    ends = [0, 6, 6, 7, 19]
    packed, final = mixer(x, states, True, torch.tensor(ends))
    for n in range(4):
        own = pytree.tree_map(lambda s, n=n: s[n : n + 1], states)
        y, state = mixer(x[:, ends[n] : ends[n + 1]], own, output_final_state=True)
        assert_close(packed[:, ends[n] : ends[n + 1]], y, tolerance=1e-12, what=f"output {n}")
        probe = tokens(batch=1, length=6)
        resumed = pytree.tree_map(lambda s, n=n: s[n : n + 1], final)
        assert_close(
            mixer(probe, resumed)[0], mixer(probe, state)[0], tolerance=1e-12, what=f"state {n}"
        )


def test_later_tokens_change_nothing_before_them(mixer: nn.Module) -> None:
    x = tokens()
    other = x.clone()
    other[:, 9:] = tokens(length=4)
    y, z = mixer(x)[0], mixer(other)[0]
    assert torch.equal(y[:, :9], z[:, :9])
    assert not torch.equal(y[:, 9:], z[:, 9:])


def test_state_has_one_size(mixer: nn.Module) -> None:
    def sizes(state: object) -> list[torch.Size]:
        return [leaf.shape for leaf in pytree.tree_leaves(state)]

    for length in (1, 64):
        _, state = mixer(tokens(length=length), output_final_state=True)
        assert sizes(state) == sizes(mixer.init_state(2))


def test_state_survives_saving(mixer: nn.Module) -> None:
    x = tokens()
    _, state = mixer(x, output_final_state=True)
    file = io.BytesIO()
    torch.save(tuple(pytree.tree_leaves(state)), file)
    file.seek(0)
    leaves = torch.load(file, weights_only=True)
    restored = pytree.tree_unflatten(list(leaves), pytree.tree_structure(state))
    assert torch.equal(mixer(x, restored)[0], mixer(x, state)[0])


def test_weights_round_trip(mixer: nn.Module) -> None:
    other = copy.deepcopy(mixer)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    x = tokens()
    assert not torch.equal(other(x)[0], mixer(x)[0])
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(x)[0], mixer(x)[0])


@pytest.mark.parametrize("name", MIXERS)
def test_low_precision_follows_float32(name: str) -> None:
    mixer = MIXERS[name]()
    x = torch.randn(2, 40, WIDTH)
    expected, _ = mixer(x)
    got, _ = mixer.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    error = (got.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.03


@pytest.mark.parametrize("name", MIXERS)
def test_runs_under_autocast(name: str) -> None:
    mixer = MIXERS[name]()
    x = torch.randn(2, 9, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = mixer(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_linear_attention_is_its_composition() -> None:
    mixer = fnn.LinearAttention(hidden_size=WIDTH, num_heads=4, feature_map="elu").double()
    x = tokens()
    q, k, v = weights_of(mixer, x)
    o, _ = reference.linear_attention(F.elu(q) + 1, F.elu(k) + 1, v)
    expected = F.rms_norm(o, (8,), mixer.norm.weight, 1e-5).flatten(2) @ mixer.o_proj.weight.T
    assert_close(mixer(x)[0], expected, tolerance=1e-12)


def test_retention_is_its_composition() -> None:
    mixer = fnn.MultiScaleRetention(hidden_size=WIDTH, num_heads=4).double()
    x = tokens()
    q, k, v = weights_of(mixer, x)
    position = torch.arange(x.shape[1])
    g = retention_log_decay(4)
    o, _ = reference.linear_attention(rotary(q, position), rotary(k, position), v, g)
    o = F.rms_norm(o, (16,), mixer.g_norm_swish_gate.weight, 1e-5).flatten(2)
    expected = (o * F.silu(x @ mixer.g_proj.weight.T)) @ mixer.o_proj.weight.T
    assert_close(mixer(x)[0], expected, tolerance=1e-12)


def test_gated_linear_attention_is_its_composition() -> None:
    mixer = fnn.GatedLinearAttention(hidden_size=WIDTH, num_heads=4, clamp_min=-0.1).double()
    x = tokens()
    q, k, v = weights_of(mixer, x)
    low, high = mixer.gk_proj
    logits = x @ low.weight.T @ high.weight.T + high.bias
    g = (F.logsigmoid(logits) / 16).clamp(min=-0.1).unflatten(-1, (4, -1))
    o, _ = reference.linear_attention(q, k, v, g)
    o = F.rms_norm(o, (8,), mixer.g_norm_swish_gate.weight, 1e-5).flatten(2)
    expected = (o * F.silu(x @ mixer.g_proj.weight.T)) @ mixer.o_proj.weight.T
    assert_close(mixer(x)[0], expected, tolerance=1e-12)


def test_lightning_attention_is_its_composition() -> None:
    mixer = fnn.LightningAttention(WIDTH, 4, layer_idx=1, num_layers=3).double()
    x = tokens()
    q, k, v = (F.silu(y) for y in weights_of(mixer, x))
    o, _ = reference.linear_attention(q, k, v, lightning_log_decay(4, 1, 3), scale=1.0)
    o = F.layer_norm(o.flatten(2), (WIDTH,), mixer.norm.weight, mixer.norm.bias)
    first, second = mixer.output_gate
    gate = (x @ first.weight.T @ second.weight.T).sigmoid()
    assert_close(mixer(x)[0], (o * gate) @ mixer.o_proj.weight.T, tolerance=1e-12)


def test_norm_attention_is_its_composition() -> None:
    mixer = fnn.NormAttention(WIDTH, 4, lrpe=False).double()
    x = tokens()
    q, k, v = weights_of(mixer, x)
    o, _ = reference.linear_attention(F.elu(q), F.elu(k), v, scale=1.0)
    o = o.flatten(2)
    o = o / (o.norm(dim=-1, keepdim=True) / WIDTH**0.5 + 1e-8)
    assert_close(
        mixer(x)[0], F.linear(o, mixer.out_proj.weight, mixer.out_proj.bias), tolerance=1e-12
    )


def test_transnormer_block_is_its_composition() -> None:
    x = tokens()
    for layer, kind in ((0, fnn.DiagAttention), (1, fnn.NormAttention)):
        block = fnn.TransNormerBlock(WIDTH, 4, layer_idx=layer, num_layers=2).double()
        assert isinstance(block.self_attn, kind)
        norm = fnn.SRMSNorm()
        mixed = x + block.self_attn(norm(x))[0]
        glu = block.glu
        fed = glu.l3(F.silu(glu.l1(norm(mixed))) * glu.l2(norm(mixed)))
        assert_close(block(x)[0], mixed + fed, tolerance=1e-12)


def test_groups_equal_repeated_heads() -> None:
    for kind in (fnn.LinearAttention, fnn.MultiScaleRetention, fnn.GatedLinearAttention):
        grouped = kind(hidden_size=WIDTH, num_heads=4, num_kv_heads=2).double()
        full = kind(hidden_size=WIDTH, num_heads=4).double()
        weights = grouped.state_dict()
        for name in ("k_proj.weight", "v_proj.weight", "gk_proj.1.weight", "gk_proj.1.bias"):
            if name in weights:
                per_head = weights[name].unflatten(0, (2, -1))
                weights[name] = per_head.repeat_interleave(2, dim=0).flatten(0, 1)
        full.load_state_dict(weights)
        x = tokens()
        assert_close(grouped(x)[0], full(x)[0], tolerance=1e-12, what=kind.__name__)


QKVO = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"}
GATED_OUTPUT = QKVO | {"g_proj.weight", "g_norm_swish_gate.weight"}


def with_bias(*names: str) -> set[str]:
    return {f"{name}.{part}" for name in names for part in ("weight", "bias")}


@pytest.mark.parametrize(
    ("mixer", "keys"),
    [
        (
            fnn.LinearAttention(hidden_size=WIDTH),
            QKVO
            | {"norm.weight"}
            | with_bias(*(f"feature_map_{x}.layer{i}" for x in "qk" for i in (1, 2))),
        ),
        (
            fnn.LinearAttention(hidden_size=WIDTH, feature_map="hedgehog"),
            QKVO | {"norm.weight"} | with_bias("feature_map_q.layer", "feature_map_k.layer"),
        ),
        (
            fnn.LinearAttention(hidden_size=WIDTH, feature_map="t2r", output_norm="identity"),
            QKVO | {"feature_map_q.layer.weight", "feature_map_k.layer.weight"},
        ),
        (fnn.LinearAttention(hidden_size=WIDTH, feature_map="elu"), QKVO | {"norm.weight"}),
        (fnn.MultiScaleRetention(hidden_size=WIDTH), GATED_OUTPUT),
        (
            fnn.MultiScaleRetention(hidden_size=WIDTH, fuse_norm=False),
            QKVO | {"g_proj.weight", "g_norm.weight"},
        ),
        (
            fnn.GatedLinearAttention(hidden_size=WIDTH),
            GATED_OUTPUT | {"gk_proj.0.weight", "gk_proj.1.weight", "gk_proj.1.bias"},
        ),
        (
            fnn.GatedLinearAttention(hidden_size=WIDTH, use_output_gate=False),
            QKVO | {"g_norm.weight", "gk_proj.0.weight", "gk_proj.1.weight", "gk_proj.1.bias"},
        ),
        (
            fnn.LightningAttention(WIDTH, 4),
            QKVO | with_bias("norm") | {"output_gate.0.weight", "output_gate.1.weight"},
        ),
        (
            fnn.TransNormerBlock(WIDTH, 4, layer_idx=1, num_layers=2),
            with_bias(*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")))
            | {"self_attn.urpe.theta", "self_attn.urpe.v"}
            | with_bias("glu.l1", "glu.l2", "glu.l3"),
        ),
    ],
    ids=lambda case: type(case).__name__,
)
def test_state_dict_keys_are_the_published_ones(mixer: nn.Module, keys: set[str]) -> None:
    assert set(mixer.state_dict()) == keys


def test_published_shapes() -> None:
    """The 340M GLA checkpoint: hidden size 1024, 4 heads, expand_k 0.5, rank 16."""
    shapes = {k: tuple(v.shape) for k, v in fnn.GatedLinearAttention().state_dict().items()}
    assert shapes == {
        "q_proj.weight": (512, 1024),
        "k_proj.weight": (512, 1024),
        "v_proj.weight": (1024, 1024),
        "g_proj.weight": (1024, 1024),
        "gk_proj.0.weight": (16, 1024),
        "gk_proj.1.weight": (512, 16),
        "gk_proj.1.bias": (512,),
        "g_norm_swish_gate.weight": (256,),
        "o_proj.weight": (1024, 1024),
    }


LOSS_AFTER_50_STEPS = 0.5
# The first token of a block sees only itself, and eight sequences share eight tokens.
LOSS_WITHIN_BLOCKS = 0.8


@pytest.mark.parametrize("name", MIXERS)
def test_learns_a_toy_task(name: str) -> None:
    """Eight sequences of random labels by heart; ln 8 = 2.08 is the loss of a guess."""
    torch.manual_seed(0)
    inputs, labels = torch.randint(0, 8, (2, 8, 12))
    mixer = MIXERS[name]()
    embedding, head = nn.Embedding(8, WIDTH), nn.Linear(WIDTH, 8)
    model = nn.ModuleList([embedding, mixer, head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(50):
        x = embedding(inputs)
        logits = head(x + mixer(x)[0])
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    in_blocks = name in ("diag t1", "diag t2", "block")
    assert losses[-1] < (LOSS_WITHIN_BLOCKS if in_blocks else LOSS_AFTER_50_STEPS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fnn.LinearAttention(hidden_size=30, num_heads=4),
            r"LinearAttention: expected hidden_size \* expand_k to be a multiple of num_heads = 4",
        ),
        (
            lambda: fnn.LinearAttention(hidden_size=32, num_heads=4, num_kv_heads=3),
            r"LinearAttention: expected num_kv_heads to divide num_heads = 4, got 3",
        ),
        (
            lambda: fnn.LinearAttention(hidden_size=32, feature_map="cosine"),
            r"feature_map: expected one of elu, relu, .*, got 'cosine'",
        ),
        (
            lambda: fnn.LinearAttention(hidden_size=32, output_norm="layernorm"),
            r"LinearAttention: expected output_norm",
        ),
        (
            lambda: fnn.GatedLinearAttention("triton", hidden_size=32),
            r"GatedLinearAttention: expected mode to be one of",
        ),
        (
            lambda: fnn.GatedLinearAttention(hidden_size=32, gate_fn="step", fuse_norm=False),
            r"activation: expected one of",
        ),
        (
            lambda: fnn.MultiScaleRetention(hidden_size=12, num_heads=4),
            r"MultiScaleRetention: expected an even width of keys per head, got 3",
        ),
        (
            lambda: fnn.LightningAttention(32, 4, layer_idx=3, num_layers=3),
            r"lightning_log_decay: expected 0 <= layer_idx < num_layers = 3, got 3",
        ),
        (
            lambda: fnn.LightningAttention(32, 4, decay="cosine"),
            r'lightning_log_decay: expected rule "alibi" or "linear"',
        ),
        (
            lambda: fnn.NormAttention(32, 4, variant="t3"),
            r'NormAttention: expected variant "t1" or "t2"',
        ),
        (lambda: fnn.NormAttention(12, 4), r"LRPE: expected an even dim, got 3"),
        (
            lambda: fnn.DiagAttention(32, 4, block_size=0),
            r"DiagAttention: expected block_size >= 1, got 0",
        ),
        (
            lambda: fnn.TransNormerBlock(32, 4, layer_idx=2, num_layers=2),
            r"TransNormerBlock: expected 0 <= layer_idx < num_layers = 2, got 2",
        ),
        (
            lambda: fnn.DiagAttention(32, 4)(
                torch.randn(2, 8, 32), None, False, torch.tensor([0, 8])
            ),
            r"DiagAttention: expected batch size 1 with cu_seqlens, got 2",
        ),
        (
            lambda: fnn.DiagAttention(32, 4)(
                torch.randn(1, 8, 32), None, False, torch.tensor([0, 9])
            ),
            r"DiagAttention: expected cu_seqlens to ascend from 0 to T = 8, got \[0, 9\]",
        ),
        (
            lambda: fnn.DiagAttention(32, 4)(
                torch.randn(1, 8, 32), fnn.DiagAttention(32, 4).init_state(3)
            ),
            r"DiagAttention: expected initial_state of 1 sequences, got \(3,\) positions",
        ),
    ],
)
def test_bad_arguments_say_what_was_expected(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
