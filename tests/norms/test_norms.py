"""The fused norms against torch's and transformers' own."""

import pytest
import torch
import torch.nn.functional as F

import fastweights as fw
from fastweights.testing import assert_close, available_cpu_levels, cpu_level


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [1, 7, 64, 100, 1027])
def test_is_torchs_rms_norm(dim):
    x, weight = draw(3, 70, dim).requires_grad_(), draw(dim, seed=1).requires_grad_()
    cotangent = draw(3, 70, dim, seed=2)
    expected = F.rms_norm(x.double(), (dim,), weight.double(), 1e-6)
    wanted = torch.autograd.grad(expected, (x, weight), cotangent.double())
    for level in available_cpu_levels():
        with cpu_level(level):
            y = fw.rms_norm(x, weight)
            found = torch.autograd.grad(y, (x, weight), cotangent)
        assert_close(y, expected, tolerance=2e-6, what=level)
        assert_close(found, wanted, tolerance=1e-5, what=level)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_gated_norm_of_qwen3_next(dtype):
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    module = Qwen3NextRMSNormGated(128).to(dtype)
    with torch.no_grad():
        module.weight.copy_(draw(128, seed=1))
    x, gate = draw(2, 5, 4, 128, seed=2).to(dtype), draw(2, 5, 4, 128, seed=3).to(dtype)
    ours = fw.gated_rms_norm(x, gate, module.weight)
    assert ours.dtype == dtype
    assert_close(ours, module(x, gate), tolerance=1e-6 if dtype == torch.float32 else 2e-2)


def test_sigmoid_gate_is_that_of_kimi_linear():
    x, gate, weight = draw(2, 6, 32), draw(2, 6, 32, seed=1), draw(32, seed=2)
    ours = fw.gated_rms_norm(x, gate, weight, activation="sigmoid", eps=1e-5)
    assert_close(ours, F.rms_norm(x, (32,), weight, 1e-5) * torch.sigmoid(gate), tolerance=2e-6)


def test_reads_heads_of_a_fused_projection():
    fused = draw(2, 9, 3 * 4 * 16)
    q, k, _ = fused.view(2, 9, 3, 4, 16).unbind(2)
    assert not q.is_contiguous()
    assert torch.equal(fw.rms_norm(q), fw.rms_norm(q.contiguous()))
    assert torch.equal(fw.gated_rms_norm(q, k), fw.gated_rms_norm(q.contiguous(), k.contiguous()))


def test_scale_does_not_matter_beyond_eps():
    x = draw(4, 33)
    assert_close(fw.rms_norm(1e4 * x), fw.rms_norm(1e-2 * x, eps=1e-12), tolerance=1e-6)
    assert torch.equal(fw.rms_norm(torch.zeros(2, 5)), torch.zeros(2, 5))


def test_gradient_of_a_weight_in_another_dtype():
    x, weight = draw(5, 8).bfloat16(), draw(8, seed=1).requires_grad_()
    y = fw.rms_norm(x, weight)
    (gradient,) = torch.autograd.grad(y.float().sum(), weight)
    assert y.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32
    assert_close(gradient, F.rms_norm(x.float(), (8,), None, 1e-6).sum(0), tolerance=1e-6)
