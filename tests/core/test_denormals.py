"""Kernels count denormals as zero, and leave the mode of every thread as they found it."""

import pytest
import torch

import fastweights as fw

TINY = 2.0**-130


@pytest.fixture
def torch_flushes():
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def decayed(heads: int) -> torch.Tensor:
    """One step that writes nothing into states of denormals and does not let them decay."""
    zeros = torch.zeros(1, heads, 64)
    state = torch.full((1, heads, 64, 64), TINY)
    fw.linear_attention_step(zeros, zeros, zeros, torch.zeros(1, heads), state=state)
    return state


def test_states_reach_zero():
    assert not decayed(2).any()


@pytest.mark.parametrize("heads", [1, 64])
def test_the_mode_comes_back(heads):
    decayed(heads)
    assert (torch.full((1 << 20,), TINY) * 1.0 == TINY).all()


def test_a_mode_of_the_user_stays(torch_flushes):
    decayed(1)
    assert not (torch.full((8,), TINY) * 1.0).any()


@pytest.mark.parametrize("rate", [-5.0, -10.0, -50.0])
def test_strong_decays_stay_exact(rate):
    q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
    g = torch.full((1, 100, 2), rate)
    out, state = fw.linear_attention(q, k, v, g=g, output_final_state=True)
    wide = [x.double() for x in (q, k, v, g)]
    want, want_state = fw.linear_attention(*wide[:3], g=wide[3], output_final_state=True)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double(), want_state, rtol=1e-5, atol=1e-5)
