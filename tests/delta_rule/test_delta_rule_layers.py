"""The layers: one state for every way of reading, padding, fla's weights, and that they train."""

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fla_state_dicts import FLA_STATE_DICTS
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastweights.nn as fnn
from fastweights.testing import assert_close

WIDTH = 32
HEADS = {"hidden_size": WIDTH, "num_heads": 2, "head_dim": 8}

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "delta": lambda: fnn.DeltaNet(hidden_size=WIDTH, num_heads=2),
    "delta, gated": lambda: fnn.DeltaNet(
        d_model=WIDTH, num_heads=4, expand_k=0.5, use_gate=True, conv_size=3, conv_bias=True
    ),
    "delta, sum": lambda: fnn.DeltaNet(
        hidden_size=WIDTH, num_heads=2, qk_activation="elu", qk_norm="sum", allow_neg_eigval=True
    ),
    "delta, bare": lambda: fnn.DeltaNet(
        hidden_size=WIDTH,
        num_heads=2,
        use_beta=False,
        use_short_conv=False,
        qk_activation="identity",
        allow_neg_eigval=True,
    ),
    "gated": lambda: fnn.GatedDeltaNet(**HEADS),
    "gated, grouped": lambda: fnn.GatedDeltaNet(
        **HEADS, expand_v=1, num_v_heads=4, output_gate_activation="sigmoid", allow_neg_eigval=True
    ),
    "gated, bare": lambda: fnn.GatedDeltaNet(**HEADS, use_gate=False, use_short_conv=False),
    "product": lambda: fnn.GatedDeltaProduct(**HEADS),
    "product, grouped": lambda: fnn.GatedDeltaProduct(
        **HEADS, expand_v=1, num_v_heads=4, num_householder=3, conv_bias=True
    ),
    "product, bare": lambda: fnn.GatedDeltaProduct(
        **HEADS, use_output_gate=False, use_short_conv=False, use_forget_gate=False
    ),
    "kimi": lambda: fnn.KimiDeltaAttention(**HEADS),
    "kimi, grouped": lambda: fnn.KimiDeltaAttention(
        **HEADS, num_v_heads=4, expand_v=2, allow_neg_eigval=True, conv_bias=True
    ),
    "kimi, safe": lambda: fnn.KimiDeltaAttention(
        **HEADS, safe_gate=True, lower_bound=-5.0, use_short_conv=False
    ),
    "gated 2": lambda: fnn.GatedDeltaNet2(**HEADS),
    "gated 2, grouped": lambda: fnn.GatedDeltaNet2(
        **HEADS, num_v_heads=4, expand_v=2, allow_neg_eigval=True, conv_size=1
    ),
    "gated 2, bare": lambda: fnn.GatedDeltaNet2(**HEADS, use_short_conv=False),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return LAYERS[request.param]().double()


def tokens(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


def by_steps(layer: nn.Module, x: Tensor, state: object) -> Tensor:
    with torch.no_grad():
        return torch.stack([layer.step(x[:, t], state) for t in range(x.shape[1])], dim=1)


def sequence(states: object, n: int) -> object:
    return pytree.tree_map(lambda leaf: leaf[n : n + 1], states)


def test_steps_equal_one_call(layer: nn.Module) -> None:
    x = tokens()
    y, final = layer(x, output_final_state=True)
    state = layer.init_state(2)
    assert_close(by_steps(layer, x, state), y, tolerance=1e-12, what="output")
    assert_close(state, final, tolerance=1e-12, what="state")


def test_prompt_then_steps_equal_one_call(layer: nn.Module) -> None:
    x = tokens(length=37)
    y, _ = layer(x)
    _, state = layer(x[:, :31], output_final_state=True)
    got = by_steps(layer, x[:, 31:], pytree.tree_map(torch.clone, state))
    assert_close(got, y[:, 31:], tolerance=1e-12)


@pytest.mark.parametrize("split", [0, 1, 5, 12, 13])
def test_split_and_resumed_equals_one_call(layer: nn.Module, split: int) -> None:
    x = tokens().requires_grad_()
    y, _ = layer(x)
    direction = torch.randn_like(y)
    (expected,) = torch.autograd.grad((y * direction).sum(), x)

    first, state = layer(x[:, :split], output_final_state=True)
    second, _ = layer(x[:, split:], state)
    resumed = torch.cat([first, second], dim=1)
    (gradient,) = torch.autograd.grad((resumed * direction).sum(), x)
    assert_close(resumed, y, tolerance=1e-12)
    assert_close(gradient, expected, tolerance=1e-10, what="gradient")


def test_packed_equals_separate(layer: nn.Module) -> None:
    x = tokens(batch=1, length=29)
    _, states = layer(tokens(batch=4, length=3), output_final_state=True)
    ends = [0, 16, 16, 17, 29]
    packed, final = layer(x, states, True, torch.tensor(ends))
    for n in range(4):
        y, state = layer(x[:, ends[n] : ends[n + 1]], sequence(states, n), output_final_state=True)
        assert_close(packed[:, ends[n] : ends[n + 1]], y, tolerance=1e-12, what=f"output {n}")
        assert_close(sequence(final, n), state, tolerance=1e-12, what=f"state {n}")
    assert_close(sequence(final, 1), sequence(states, 1), tolerance=0, what="an empty sequence")


def test_padding_is_as_if_it_were_not_there(layer: nn.Module) -> None:
    x = tokens(batch=4, length=21).requires_grad_()
    real = [slice(0, 21), slice(17, 21), slice(0, 5), slice(0, 0)]
    mask = torch.zeros(4, 21, dtype=torch.long)
    for n, kept in enumerate(real):
        mask[n, kept] = 1
    _, states = layer(tokens(batch=4, length=3), output_final_state=True)
    y, final = layer(x, states, True, attention_mask=mask)
    direction = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * direction).sum(), x)
    assert not y[mask == 0].any()
    for n, kept in enumerate(real):
        alone = x[n : n + 1, kept].detach().requires_grad_()
        expected, state = layer(alone, sequence(states, n), output_final_state=True)
        own = torch.autograd.grad((expected * direction[n : n + 1, kept]).sum(), alone)
        assert_close(y[n : n + 1, kept], expected, tolerance=1e-12, what=f"output {n}")
        assert_close(sequence(final, n), state, tolerance=1e-12, what=f"state {n}")
        assert_close((gradient[n : n + 1, kept],), own, tolerance=1e-12, what=f"gradient {n}")
    assert torch.equal(layer(x, attention_mask=mask.bool())[0], layer(x, attention_mask=mask)[0])


@pytest.mark.parametrize(("batch", "length"), [(2, 5), (2, 0), (0, 5)])
def test_padding_alone_leaves_the_state(layer: nn.Module, batch: int, length: int) -> None:
    states = sequence(layer(tokens(), output_final_state=True)[1], 0)
    states = pytree.tree_map(lambda leaf: leaf.expand(batch, *leaf.shape[1:]), states)
    mask = torch.zeros(batch, length, dtype=torch.bool)
    y, final = layer(tokens(batch, length), states, True, attention_mask=mask)
    assert y.shape == (batch, length, WIDTH)
    assert not y.any()
    assert_close(final, states, tolerance=0)


@pytest.mark.parametrize("name", ["gated", "product"])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_one_graph_serves_every_padding(name: str) -> None:
    """The number of real tokens is data, which a compiled layer must not ask for."""
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    stance = "default"
    for lengths in ((6, 9, 7), (9, 9, 9), (1, 0, 2), (0, 1, 0), (0, 0, 0)):
        x = tokens(3, 9).requires_grad_()
        mask = torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]
        expected, _ = layer(x, attention_mask=mask)
        with torch.compiler.set_stance(stance):
            y, _ = compiled(x, attention_mask=mask)
        stance = "fail_on_recompile"
        assert torch.equal(y, expected), lengths
        leaves = (x, *layer.parameters())
        wanted = torch.autograd.grad(expected.square().sum(), leaves)
        found = torch.autograd.grad(y.square().sum(), leaves)
        assert_close(found, wanted, tolerance=0, what=f"gradients for {lengths}")


def test_later_tokens_change_nothing_before_them(layer: nn.Module) -> None:
    x = tokens()
    other = x.clone()
    other[:, 9:] = tokens(length=4)
    y, z = layer(x)[0], layer(other)[0]
    assert torch.equal(y[:, :9], z[:, :9])
    assert not torch.equal(y[:, 9:], z[:, 9:])


def test_state_is_plain_tensors_of_one_size(layer: nn.Module) -> None:
    def sizes(state: object) -> list[torch.Size]:
        return [leaf.shape for leaf in pytree.tree_leaves(state)]

    x = tokens()
    for length in (0, 1, 13):
        _, state = layer(x[:, :length], output_final_state=True)
        assert sizes(state) == sizes(layer.init_state(2))
    file = io.BytesIO()
    torch.save(pytree.tree_leaves(state), file)
    file.seek(0)
    leaves = torch.load(file, weights_only=True)
    restored = pytree.tree_unflatten(leaves, pytree.tree_structure(state))
    assert torch.equal(layer(x, restored)[0], layer(x, state)[0])


def test_weights_round_trip(layer: nn.Module) -> None:
    other = copy.deepcopy(layer)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    x = tokens()
    assert not torch.equal(other(x)[0], layer(x)[0])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], layer(x)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_low_precision_follows_float32(name: str) -> None:
    layer = LAYERS[name]()
    x = torch.randn(2, 40, WIDTH)
    expected, _ = layer(x)
    layer = layer.bfloat16()
    got, state = layer(x.bfloat16(), output_final_state=True)
    assert got.dtype == torch.bfloat16
    assert state.memory.dtype == torch.float32
    error = (got.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.03
    token = x[:, 0].bfloat16()
    expected, _ = layer(token.unsqueeze(1), state)
    with torch.no_grad():
        assert_close(layer.step(token, state), expected.squeeze(1), tolerance=0.05)


@pytest.mark.parametrize("name", LAYERS)
def test_runs_under_autocast(name: str) -> None:
    layer = LAYERS[name]()
    x = torch.randn(2, 9, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, output_final_state=True)
        with torch.no_grad():
            next_y = layer.step(x[:, 0], state)
            first_y = layer.step(x[:, 0], layer.init_state(2))
    assert y.dtype == next_y.dtype == torch.bfloat16
    assert_close(first_y, y[:, 0], tolerance=0.1)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_gradients_reach_every_parameter(layer: nn.Module) -> None:
    y, state = layer(tokens(), output_final_state=True)
    (y.square().sum() + state.memory.square().sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# ---- weights of fla ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "arguments", "shapes"), FLA_STATE_DICTS)
def test_state_dict_is_that_of_fla(
    kind: str, arguments: dict[str, object], shapes: dict[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        layer = getattr(fnn, kind)(**arguments)
    found = {name: tuple(weight.shape) for name, weight in layer.state_dict().items()}
    assert list(found.items()) == list(shapes.items())


@pytest.mark.parametrize(
    ("kind", "low"),
    [
        (fnn.GatedDeltaNet, 0),
        (fnn.GatedDeltaProduct, 0),
        (fnn.KimiDeltaAttention, 1),
        (fnn.GatedDeltaNet2, 1),
    ],
)
def test_decays_start_as_published_and_without_weight_decay(
    kind: type[nn.Module], low: float
) -> None:
    layer = kind(hidden_size=8, head_dim=2, num_heads=400)
    A, dt = layer.A_log.detach().exp(), F.softplus(layer.dt_bias.detach())
    assert low <= A.min() < low + 1
    assert 15 < A.max() <= 16
    assert abs(A.mean() - (low + 16) / 2) < 1
    assert 0.000999 < dt.min() < 0.0012
    assert 0.085 < dt.max() < 0.1001
    assert abs(dt.log().mean() - math.log(0.01)) < 0.2
    marked = [n for n, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)]
    assert marked == ["A_log", "dt_bias"]


def test_safe_gate_starts_at_a_rate_of_one() -> None:
    layer = fnn.KimiDeltaAttention(**HEADS, safe_gate=True, lower_bound=-5.0)
    assert not layer.A_log.any()
    assert layer.A_log._no_weight_decay


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("bias", [False, True])
def test_short_convolution_is_torchs(activation: str | None, bias: bool) -> None:
    convolution = fnn.ShortConvolution(6, 4, bias, activation).double()
    torchs = nn.Conv1d(6, 6, 4, padding=3, groups=6, bias=bias).double()
    torchs.load_state_dict(convolution.state_dict())
    x = tokens()[..., :6]
    expected = torchs(x.mT)[..., :13].mT
    expected = expected if activation is None else F.silu(expected)
    assert_close(convolution(x)[0], expected, tolerance=1e-12)
    assert_close(by_steps(convolution, x, convolution.init_state(2)), expected, tolerance=1e-12)


# ---- training, and what is refused ---------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_learns_a_toy_task(name: str) -> None:
    """Eight sequences of random labels by heart; ln 8 = 2.08 is the loss of a guess."""
    torch.manual_seed(0)
    inputs, labels = torch.randint(0, 8, (2, 8, 12))
    layer = LAYERS[name]()
    embedding, head = nn.Embedding(8, WIDTH), nn.Linear(WIDTH, 8)
    model = nn.ModuleList([embedding, layer, head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(50):
        x = embedding(inputs)
        logits = head(x + layer(x)[0])
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fnn.DeltaNet(hidden_size=30, num_heads=4),
            r"DeltaNet: expected hidden_size \* expand_k / num_heads to be an integer above 0, "
            r"got 7.5",
        ),
        (
            lambda: fnn.DeltaNet(hidden_size=32, num_heads=4, expand_v=0.3),
            r"DeltaNet: expected hidden_size \* expand_v / num_heads to be an integer above 0",
        ),
        (
            lambda: fnn.DeltaNet(hidden_size=32, num_heads=0),
            r"DeltaNet: expected hidden_size \* expand_k / num_heads to be an integer above 0",
        ),
        (
            lambda: fnn.DeltaNet("fused_chunk", hidden_size=32),
            r"DeltaNet: expected mode to be one of chunk, fused_recurrent, got 'fused_chunk'",
        ),
        (
            lambda: fnn.DeltaNet(hidden_size=32, qk_activation="tanh"),
            r'DeltaNet: expected qk_activation "silu", "relu", "elu" or "identity", got \'tanh\'',
        ),
        (
            lambda: fnn.DeltaNet(hidden_size=32, qk_norm="l1"),
            r"DeltaNet: expected qk_norm \"l2\" or \"sum\", got 'l1'",
        ),
        (
            lambda: fnn.DeltaNet(hidden_size=32, conv_size=0),
            r"DeltaNet: expected conv_size >= 1, got 0",
        ),
        (
            lambda: fnn.GatedDeltaNet(**HEADS, expand_v=1.3),
            r"GatedDeltaNet: expected head_dim \* expand_v to be an integer above 0, got 10.4",
        ),
        (
            lambda: fnn.GatedDeltaNet(**HEADS, num_v_heads=3),
            r"GatedDeltaNet: expected num_v_heads to be a multiple of num_heads = 2, got 3",
        ),
        (
            lambda: fnn.GatedDeltaNet(**HEADS, num_v_heads=1),
            r"GatedDeltaNet: expected num_v_heads to be a multiple of num_heads = 2, got 1",
        ),
        (
            lambda: fnn.GatedDeltaNet(**HEADS, output_gate_activation="tanh"),
            r"GatedDeltaNet: expected output_gate_activation",
        ),
        (
            lambda: fnn.GatedDeltaProduct(**HEADS, num_householder=0),
            r"GatedDeltaProduct: expected num_householder >= 1, got 0",
        ),
        (
            lambda: fnn.KimiDeltaAttention(**HEADS, safe_gate=True),
            r"KimiDeltaAttention: expected lower_bound with safe_gate, got None",
        ),
        (
            lambda: fnn.KimiDeltaAttention(**HEADS, lower_bound=0.0),
            r"KimiDeltaAttention: expected lower_bound < 0, got 0.0",
        ),
        (
            lambda: fnn.GatedDeltaNet2(**HEADS, mode="parallel"),
            r"GatedDeltaNet2: expected mode to be one of chunk, fused_recurrent, got 'parallel'",
        ),
        (
            lambda: fnn.DeltaNet(hidden_size=32)(
                torch.randn(1, 8, 32),
                cu_seqlens=torch.tensor([0, 8]),
                attention_mask=torch.ones(1, 8, dtype=torch.bool),
            ),
            r"DeltaNet: expected cu_seqlens or attention_mask, got both",
        ),
        (
            lambda: fnn.DeltaNet(hidden_size=32)(
                torch.randn(2, 8, 32), attention_mask=torch.ones(2, 9, dtype=torch.bool)
            ),
            r"DeltaNet: expected attention_mask of shape \[B, T\] = \[2, 8\] .*got \[2, 9\]",
        ),
        (
            lambda: fnn.DeltaNet(hidden_size=32)(
                torch.randn(2, 8, 32), attention_mask=torch.zeros(2, 8)
            ),
            r"DeltaNet: expected attention_mask .* of 0 and 1 or bool, .* of torch.float32",
        ),
        (
            lambda: fnn.DeltaNet(hidden_size=32)(
                torch.randn(2, 8, 32),
                fnn.DeltaNet(hidden_size=32, use_short_conv=False).init_state(2),
            ),
            r"DeltaNet: expected initial_state of 3 convolutions, got 0",
        ),
    ],
)
def test_bad_arguments_say_what_was_expected(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="num_head"):
        fnn.GatedDeltaNet(hidden_size=32, num_head=4)
