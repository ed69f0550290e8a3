"""fla's modules on our ops, and how calls are routed to ours; nothing here needs fla."""

import sys
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from fastweights.integrations import _routing, fla
from fastweights.integrations.fla import modules


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- modules -----------------------------------------------------------------------------------


def test_short_convolution_in_steps_is_the_whole():
    conv = modules.ShortConvolution(8, 4, bias=True)
    assert {name: p.shape for name, p in conv.named_parameters()} == {
        "weight": (8, 1, 4),
        "bias": (8,),
    }
    x, residual = draw(2, 7, 8, seed=1), draw(2, 7, 8, seed=2)
    whole, last = conv(x, residual=residual, output_final_state=True)
    expected = torch.nn.functional.silu(
        torch.nn.functional.conv1d(x.mT, conv.weight, conv.bias, padding=3, groups=8)[..., :7].mT
    )
    assert_close(whole, expected + residual)
    assert_close(last, x.mT[..., -4:])
    y, cache = conv(x[:, :3], residual=residual[:, :3], output_final_state=True)
    assert_close(cache, torch.nn.functional.pad(x[:, :3].mT, (1, 0)))
    outputs = [y]
    with torch.no_grad():
        for t in range(3, 7):
            y, after = conv(
                x[:, t : t + 1], residual[:, t : t + 1], cache=cache, output_final_state=True
            )
            assert after is cache  # moved on in place
            outputs.append(y)
    assert_close(torch.cat(outputs, 1), whole)
    assert_close(cache, last)


def test_short_convolution_packed():
    conv = modules.ShortConvolution(8, 3, activation=None)
    x, offsets = draw(1, 9, 8), torch.tensor([0, 4, 4, 9])
    y, states = conv(x, cu_seqlens=offsets, output_final_state=True)
    assert_close(y, torch.cat([conv(x[:, :4])[0], conv(x[:, 4:])[0]], 1))
    assert_close(states[1], torch.zeros(8, 3))
    expected = modules.convolution.causal_conv1d_update_states(x, 3, cu_seqlens=offsets)
    assert_close(states, expected)
    with torch.no_grad():
        one = torch.arange(4)
        step, after = conv(x[:, :3], cache=states.clone(), cu_seqlens=one, output_final_state=True)
    rows, _ = conv(x[0, :3, None], cache=states)
    assert_close(step, rows.transpose(0, 1))
    assert_close(after[:, :, -1], x[0, :3])


def test_short_convolution_masks_in_place_and_refuses():
    conv = modules.ShortConvolution(8, 3)
    x, mask = draw(2, 5, 8), torch.ones(2, 5)
    mask[:, :2] = 0
    expected, _ = conv(x * mask[..., None])
    with torch.no_grad():
        assert_close(conv(x, mask=mask)[0], expected)
    assert not x[:, :2].any()
    with pytest.raises(ValueError, match="`mask` and `cu_seqlens` cannot be provided"):
        conv(x, mask=mask, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="Invalid backend: numpy"):
        modules.ShortConvolution(8, 3, backend="numpy")
    with pytest.raises(AssertionError, match="Activation `gelu` not supported yet"):
        modules.ShortConvolution(8, 3, activation="gelu")
    with pytest.raises(ValueError, match="Unsupported backend: numpy"):
        modules.causal_conv1d(x, conv.weight[:, 0], backend="numpy")
    with pytest.raises(ValueError, match="`weight` must be a tensor"):
        modules.causal_conv1d(x)


def test_conv_takes_channels_in_several_dimensions():
    x, weight = draw(2, 5, 2, 4), draw(8, 3)
    y, _ = modules.causal_conv1d(x, weight, activation="silu")
    assert_close(y.flatten(2), modules.causal_conv1d(x.flatten(2), weight, activation="silu")[0])
    cache = draw(2, 8, 3)
    step, _ = modules.causal_conv1d_update(x[:, :1], cache.clone(), weight=weight)
    flat, _ = modules.causal_conv1d_update(x[:, 0].flatten(1), cache, weight=weight)
    assert_close(step.flatten(1), flat)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_norms(is_rms_norm, bias, groups):
    x, residual, weight = draw(3, 5, 8, seed=1), draw(3, 5, 8, seed=2), draw(8, seed=3)
    b = draw(8, seed=4) if bias else None
    total = (x + residual).unflatten(-1, (groups, -1))
    centred = total if is_rms_norm else total - total.mean(-1, keepdim=True)
    n = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = n.flatten(-2) * weight + (0 if b is None else b)
    y, summed = modules.group_norm(
        x, weight, b, residual, prenorm=True, is_rms_norm=is_rms_norm, num_groups=groups
    )
    assert_close(y, expected)
    assert_close(summed, x + residual)
    linear = modules.norm.layer_norm_linear(
        x, weight, b, draw(4, 8), None, residual, is_rms_norm=is_rms_norm, num_groups=groups
    )
    assert_close(linear, expected @ draw(4, 8).T)
    if groups == 1:
        function = modules.rms_norm if is_rms_norm else modules.layer_norm
        assert_close(function(x, weight, b, residual), expected)
        gated = modules.rms_norm_gated if is_rms_norm else modules.layer_norm_gated
        for activation, act in (("swish", torch.nn.functional.silu), ("sigmoid", torch.sigmoid)):
            got = gated(x, residual, weight, b, activation, residual, eps=1e-5)
            assert_close(got, expected * act(residual))


def test_norms_of_half_precision_add_the_residual_in_float32():
    x, residual = (draw(3, 8, seed=s).bfloat16() for s in (1, 2))
    y, total = modules.rms_norm(x, None, None, residual.float(), prenorm=True)
    assert y.dtype == torch.bfloat16
    assert total.dtype == torch.float32
    assert_close(total, x.float() + residual.float())
    _, alone = modules.rms_norm(x, None, None, prenorm=True, residual_in_fp32=True)
    assert alone.dtype == torch.float32
    gated = modules.rms_norm_gated(x, residual.float(), None, None)
    assert gated.dtype == torch.bfloat16


def test_l2norm():
    x = draw(3, 8, dtype=torch.float64).requires_grad_()
    assert_close(modules.l2norm(x), x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt())
    assert torch.autograd.gradcheck(modules.l2norm, (x,))
    assert modules.l2norm(x.float(), output_dtype=torch.bfloat16).dtype == torch.bfloat16


# ---- routing -----------------------------------------------------------------------------------


def test_patch_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(ImportError, match="pip install flash-linear-attention triton"):
        fla.patch()
    assert not any(fla.stats().values())
    fla.unpatch()


def test_only_cpu_tensors_are_routed():
    def original(x, factor=2):
        """Doc."""
        return "original"

    calls = Counter()
    routed = _routing.route(original, lambda x, factor=2: "ours", calls, "name")
    assert (routed(torch.ones(1)), routed(factor=3, x=torch.ones(1))) == ("ours", "ours")
    assert (routed(torch.ones(1, device="meta")), routed(None)) == ("original", "original")
    assert calls == {"name": 2}
    assert (routed.__name__, routed.__doc__) == ("original", "Doc.")
