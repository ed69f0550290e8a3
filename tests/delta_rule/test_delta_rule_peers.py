"""The rivals of the benchmark compute what our op computes."""

import pytest
import torch

import fastweights as fw
from fastweights.testing import assert_close
from fastweights.testing.opspec import sample
from fastweights.testing.peers import delta_rule as peers

H, K, V = 2, 16, 16


def agree(got, expected):
    assert_close(got, expected, tolerance=1e-5)


def call(kind, length, **options):
    shape = {"token": (H,), "channel": (H, K)}[kind]
    q, k = torch.randn(2, 1, length, H, K)
    v, g, beta = (
        torch.randn(1, length, H, V),
        -torch.rand(1, length, *shape),
        torch.rand(1, length, H),
    )
    return sample(q, k, v, g=g, beta=beta, qk_l2norm=True, **options)


@pytest.mark.parametrize(("peer", "kind"), [(peers.GATED, "token"), (peers.KDA, "channel")])
def test_sequence(peer, kind):
    ours = call(kind, 70)
    theirs = peer.adapt(ours)
    agree(
        peer.load()(*theirs.args, **theirs.kwargs)[0], fw.delta_rule(*ours.args, **ours.kwargs)[0]
    )
    assert peer.adapt(call("channel" if kind == "token" else "token", 3)) is None


@pytest.mark.parametrize(
    ("peer", "kind"), [(peers.GATED_STEP, "token"), (peers.KDA_STEP, "channel")]
)
def test_step(peer, kind):
    ours = call(kind, 1).map_tensors(lambda t: t[:, 0])
    ours.kwargs["state"] = torch.randn(1, H, K, V)
    theirs = peer.adapt(ours)
    o, state = peer.load()(*theirs.args, **theirs.kwargs)
    agree(o[:, 0], fw.delta_rule_step(*ours.args, **ours.kwargs))
    agree(state, ours.kwargs["state"])
