"""What fla's modules call on a CPU, against fla's own references and plain torch."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from fla.modules import FusedCrossEntropyLoss, FusedLinearCrossEntropyLoss, RotaryEmbedding
from fla.modules import ShortConvolution as FlaShortConvolution
from fla.modules.activations import logsigmoid, sigmoid, swiglu, swiglu_linear, swish
from fla.modules.norm.fused_norm_gate import FusedLayerNormGated, FusedRMSNormGated
from fla.modules.norm.l2norm import l2norm
from fla.modules.norm.layernorm import (
    GroupNorm,
    GroupNormLinear,
    LayerNorm,
    LayerNormLinear,
    RMSNorm,
    RMSNormLinear,
    group_norm_ref,
    layer_norm_ref,
    rms_norm_ref,
)
from fla.modules.rotary import rotary_embedding, rotary_embedding_ref

from fastweights.integrations.fla import modules, patched
from fastweights.testing import assert_close

TOLERANCE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def _patched():
    with patched():
        yield


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(function, *inputs):
    """Outputs and the gradients of `inputs` through all of them."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((y * draw(*y.shape, seed=9 + i)).sum() for i, y in enumerate(outputs))
    return *outputs, *torch.autograd.grad(loss, inputs)


def check(ours, reference, *inputs, tolerance=TOLERANCE):
    assert_close(run(ours, *inputs), run(reference, *inputs), tolerance=tolerance)


@pytest.mark.parametrize(
    ("function", "reference"),
    [
        (sigmoid, torch.sigmoid),
        (lambda x: logsigmoid(x, 3.0), lambda x: F.logsigmoid(x) / 3.0),
        (swish, F.silu),
    ],
)
def test_activations(function, reference):
    check(function, reference, draw(3, 4, 5).transpose(0, 1))


def test_swiglu():
    check(swiglu, lambda x, y: F.silu(x) * y, draw(3, 5, seed=1), draw(3, 5, seed=2))
    check(
        lambda x, y, w, b: swiglu_linear(x, y, w, b),
        lambda x, y, w, b: F.linear(F.silu(x) * y, w, b),
        *(draw(2, 3, 5, seed=1), draw(2, 3, 5, seed=2), draw(4, 5, seed=3), draw(4, seed=4)),
    )


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize(
    ("kind", "reference"), [(RMSNorm, rms_norm_ref), (LayerNorm, layer_norm_ref)]
)
def test_norms(kind, reference, prenorm):
    norm = kind(8)
    bias = torch.zeros(8) if kind is LayerNorm else None
    check(
        lambda x, residual, w: torch.func.functional_call(
            norm, {"weight": w}, (x,), {"residual": residual, "prenorm": prenorm}
        ),
        lambda x, residual, w: reference(x, w, bias, residual, norm.eps, prenorm),
        *(draw(2, 3, 8, seed=1), draw(2, 3, 8, seed=2), draw(8, seed=3)),
    )


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_group_norm(is_rms_norm):
    norm = GroupNorm(2, 8, bias=True, is_rms_norm=is_rms_norm)
    check(
        lambda x, w, b: torch.func.functional_call(norm, {"weight": w, "bias": b}, (x,)),
        lambda x, w, b: group_norm_ref(x, w, b, 2, eps=norm.eps, is_rms_norm=is_rms_norm),
        *(draw(2, 3, 8, seed=1), draw(8, seed=2), draw(8, seed=3)),
    )


@pytest.mark.parametrize(
    ("kind", "plain"),
    [(RMSNormLinear, RMSNorm), (LayerNormLinear, LayerNorm), (GroupNormLinear, GroupNorm)],
)
def test_norms_before_a_linear_layer(kind, plain):
    size = (2, 8) if kind is GroupNormLinear else (8,)
    check(
        lambda x, w: kind(*size)(x, w, None),
        lambda x, w: plain(*size)(x) @ w.T,
        *(draw(3, 8, seed=1), draw(4, 8, seed=2)),
    )


@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
@pytest.mark.parametrize(
    ("kind", "reference"),
    [(FusedRMSNormGated, rms_norm_ref), (FusedLayerNormGated, layer_norm_ref)],
)
def test_gated_norms(kind, reference, activation):
    norm = kind(8, activation=activation)
    act = F.silu if activation == "swish" else torch.sigmoid
    check(
        lambda x, g, w: torch.func.functional_call(norm, {"weight": w}, (x, g)),
        lambda x, g, w: reference(x, w, None, eps=norm.eps) * act(g),
        *(draw(2, 3, 8, seed=1), draw(2, 3, 8, seed=2), draw(8, seed=3)),
    )


def test_l2norm():
    check(l2norm, lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt(), draw(2, 3, 8))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(interleaved):
    cos, sin = draw(20, 3, seed=1), draw(20, 3, seed=2)
    x = draw(2, 7, 2, 8)

    def reference(x, starts):
        rows = [
            rotary_embedding_ref(row[None], cos[s : s + 7], sin[s : s + 7], interleaved)
            for row, s in zip(x, starts, strict=True)
        ]
        return torch.cat(rows)

    for offset, starts in ((0, (0, 0)), (5, (5, 5)), (torch.tensor([3, 9]), (3, 9))):
        check(
            lambda x, o=offset: rotary_embedding(x, cos, sin, interleaved, False, o),
            lambda x, s=starts: reference(x, s),
            x,
        )
    packed = rotary_embedding(
        x.flatten(0, 1)[None],
        cos,
        sin,
        interleaved,
        seqlen_offsets=torch.tensor([3, 0, 9]),
        cu_seqlens=torch.tensor([0, 7, 7, 14]),
    )
    assert_close(packed.view(x.shape), reference(x, (3, 9)), tolerance=TOLERANCE)


def test_rotary_embedding_in_place_and_out_of_range():
    rotary = RotaryEmbedding(8)
    q, k = rotary(draw(1, 5, 2, 8, seed=1), draw(1, 5, 2, 8, seed=2))
    assert not torch.equal(q[:, 1], draw(1, 5, 2, 8, seed=1)[:, 1])
    x = draw(1, 5, 2, 8, seed=2)
    cos, sin = rotary._cos_cached, rotary._sin_cached
    rotary_embedding(x, cos, sin, inplace=True)
    assert_close(x, k, tolerance=TOLERANCE)
    with pytest.raises(ValueError, match=r"positions must be in \[0, 5\), got -1 to 3"):
        rotary_embedding(x, cos, sin, seqlen_offsets=torch.tensor([-1]))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction, smoothing, inplace):
    target = torch.tensor([3, -100, 0, 7])
    ours = FusedCrossEntropyLoss(
        reduction=reduction, label_smoothing=smoothing, inplace_backward=inplace
    )
    check(
        lambda x: ours(x * 1.0, target),
        lambda x: F.cross_entropy(x, target, reduction=reduction, label_smoothing=smoothing),
        draw(4, 9),
    )


def test_cross_entropy_with_everything():
    target = torch.tensor([3, -100, 0, 7])
    ours = FusedCrossEntropyLoss(
        logit_scale=0.7, lse_square_scale=0.3, logit_softcapping=2.0, return_z_loss=True
    )

    def reference(x):
        capped = 2.0 * torch.tanh(0.7 * x / 2.0)
        z = 0.3 * capped.logsumexp(-1).square()[target != -100].sum() / 3
        return F.cross_entropy(capped, target) + z

    check(lambda x: ours(x, target)[0], reference, draw(4, 9))
    loss, z = ours(draw(4, 9), target)
    assert 0 < z < loss
    with pytest.raises(NotImplementedError, match="process_group"):
        modules.cross_entropy.cross_entropy_fwd(draw(4, 9), target, process_group=object())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy(reduction):
    target = torch.tensor([3, -100, 0, 7])
    ours = FusedLinearCrossEntropyLoss(reduction=reduction, num_chunks=2)
    check(
        lambda x, w, b: 3.0 * ours(x, target, w, b),
        lambda x, w, b: 3.0 * F.cross_entropy(F.linear(x, w, b), target, reduction=reduction),
        *(draw(4, 8, seed=1), draw(9, 8, seed=2), draw(9, seed=3)),
    )


def test_short_convolution_is_that_of_fla():
    ours, theirs = modules.ShortConvolution, FlaShortConvolution
    for name in ("__init__", "forward", "step"):
        mine, yours = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (getattr(ours, name), getattr(theirs, name))
        )
        assert mine == yours
    a, b = ours(8, 4, bias=True), theirs(8, 4, bias=True)
    b.load_state_dict(a.state_dict())
    x, residual, state = draw(2, 7, 8, seed=1), draw(2, 7, 8, seed=2), draw(2, 8, 4, seed=3)

    def call(conv):
        return lambda x, residual, state: conv(x, residual, cache=state, output_final_state=True)

    check(call(b), call(a), x, residual, state)
    with torch.no_grad():
        caches = state.clone(), state.clone()
        steps = [
            conv(x[:, :1], cache=cache, output_final_state=True)
            for conv, cache in zip((a, b), caches, strict=True)
        ]
    assert_close(*steps, tolerance=TOLERANCE)
    assert_close(*caches, tolerance=TOLERANCE)
    assert a.state_size == b.state_size
