"""What a delta rule can count: parity and words of permutations, by weights written down by hand.

With v = -k a factor takes S + I to (I - beta k k^T)(S + I), so that from an empty state S_t + I is
the product of all factors so far: no initial state is needed.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fastweights as fw
import fastweights.nn as fnn
from fastweights.data import parity, permutation_words, symmetric_group

FORMS = ("recurrent", "chunked")
# Carries what is at 0 to 1, at 1 to 2, at 2 to 0.
THREE_CYCLE = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).double()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    return F.normalize(draw(*shape, seed=seed), dim=-1)


# ---- parity: the group of two elements -------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_parity_is_one_number_flipped_by_a_beta_of_two(form):
    # S + beta (1/2 - S) is 1 - S for beta = 2 and S for beta = 0: exactly x xor S.
    bits, labels = parity(4, 4096, generator=seeded())
    one = torch.ones(4, 4096, 1, 1)
    raw = torch.where(bits == 1, 200.0, -200.0)[..., None]
    o, state = fw.delta_rule(
        *(one, one, one / 2),
        beta=raw,
        beta_sigmoid=True,
        allow_neg_eigval=True,
        output_final_state=True,
        _form=form,
    )
    assert torch.equal(o[..., 0, 0], labels.float())
    token = torch.ones(4, 1, 1)
    for t in range(50):
        o = fw.delta_rule_step(token, token, token / 2, beta=2.0 * bits[:, t, None], state=state)
        assert torch.equal(o[:, 0, 0], (labels[:, -1] + labels[:, t]).remainder(2).float())


def turns(o):
    """How often a sequence [T, ...] changes its direction; what is below rounding is rest."""
    step = o.diff(dim=0)
    return (step[1:] * step[:-1] < -1e-24).sum(dim=0)


def constant_word(beta, g, T=100, K=4, V=3):
    """Outputs [T, HV, V] of heads of any key, value, query and first state, for T equal tokens."""
    heads = len(beta)
    q, v, S0 = draw(heads, K), draw(heads, V, seed=1), draw(heads, K, V, seed=2)
    k = unit(heads, K, seed=3)
    o, _ = fw.delta_rule(
        *(x.expand(1, T, *x.shape) for x in (q, k, v)),
        beta=beta.expand(1, T, heads),
        g=g,
        initial_state=S0[None],
    )
    return o[0]


def test_without_negative_eigenvalues_a_gated_delta_rule_cannot_alternate():
    # Parity of 1, 1, 1, ... turns at every step. Equal tokens have one transition A, symmetric
    # with the eigenvalues e^g and e^g (1 - beta), so that the difference of two outputs is
    # a e^{g t} + b (e^g (1 - beta))^t: with eigenvalues in [0, 1] it has at most one zero.
    heads = 2000
    beta, g = draw(heads, seed=8).sigmoid(), -draw(heads, seed=9).exp()
    assert turns(constant_word(beta, g)).max() <= 1
    assert turns(constant_word(beta, 0 * g)).max() <= 1
    assert turns(constant_word(torch.full_like(beta, 2.0), 0 * g)).min() == 98


# ---- permutations ----------------------------------------------------------------------------


def transition(k, beta, g=None):
    """What n rows k [..., n, K] of beta and g [..., n] do to a state: a matrix [..., K, K]."""
    shape, (n, K) = k.shape[:-2], k.shape[-2:]
    k, beta = k.reshape(-1, n, 1, K), beta.expand(*shape, n).reshape(-1, n, 1)
    _, S = fw.delta_rule(
        *(k, k, torch.zeros_like(k)),
        beta=beta,
        g=None if g is None else g.expand(*shape, n).reshape(-1, n, 1),
        initial_state=torch.eye(K, dtype=k.dtype).expand(len(k), 1, K, K).contiguous(),
        output_final_state=True,
    )
    return S.reshape(*shape, K, K)


def swap_key(n, i, j):
    """The unit key whose reflection exchanges i and j."""
    k = torch.zeros(n, dtype=torch.float64)
    k[i], k[j] = math.sqrt(0.5), -math.sqrt(0.5)
    return k


def swaps(p):
    """Exchanges of places, in their order, that carry what is at i to p[i]: n - 1 at most."""
    found, places = [], list(range(len(p)))  # places[i]: where the thing from i is by now
    for i, target in enumerate(p):
        if places[i] != target:
            found.append((places[i], target))
            other = places.index(target)
            places[i], places[other] = places[other], places[i]
    return found


def householder_table(n):
    """Keys [n!, n - 1, n] and betas [n!, n - 1] whose product is each permutation of n things."""
    group = symmetric_group(n).tolist()
    k = torch.zeros(len(group), n - 1, n, dtype=torch.float64)
    k[..., 0] = 1.0
    beta = torch.zeros(len(group), n - 1, dtype=torch.float64)
    for row, p in enumerate(group):
        for factor, (i, j) in enumerate(swaps(p)):
            k[row, factor], beta[row, factor] = swap_key(n, i, j), 2.0
    return k, beta


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_permutation_of_n_things_is_n_minus_1_reflections(n):
    matrices = F.one_hot(symmetric_group(n)).mT.double()  # column i has its 1 in row p[i]
    assert_close(transition(*householder_table(n)), matrices, rtol=0, atol=1e-12)


def delta_product(k, beta, q):
    """Outputs [N, T, n] of Gated DeltaProduct, rows k [N, T, n - 1, n]: q on the last, v = -k."""
    last = torch.zeros_like(k)
    last[:, :, -1] = q
    rows = [x.flatten(1, 2)[:, :, None] for x in (last, k, -k)]
    o, _ = fw.delta_rule(*rows, beta=beta.flatten(1, 2)[:, :, None], scale=1.0)
    return o[:, k.shape[2] - 1 :: k.shape[2], 0]


@pytest.mark.parametrize("n, length", [(3, 256), (3, 4096), (4, 1024), (5, 1024)])
def test_words_of_permutations_are_exact_from_an_empty_state(n, length):
    # o_t = (S_t)^T q with S_t = P_t - I: added to q = (0, ..., n - 1) it is the permutation.
    tokens, labels = permutation_words(4, length, n=n, generator=seeded())
    k, beta = (table[tokens].float() for table in householder_table(n))
    q = torch.arange(float(n))
    places = q + delta_product(k, beta, q)
    assert_close(places, symmetric_group(n)[labels].float(), rtol=0, atol=0.01)


def test_one_reflection_a_token_tracks_words_of_swaps():
    odd = [row for row, p in enumerate(symmetric_group(4).tolist()) if len(swaps(p)) == 1]
    tokens, labels = permutation_words(4, 1024, n=4, elements=odd, generator=seeded())
    k, beta = (table[tokens, :1].float() for table in householder_table(4))
    q = torch.arange(4.0)
    places = q + delta_product(k, beta, q)
    assert_close(places, symmetric_group(4)[labels].float(), rtol=0, atol=0.01)


def any_factor(K, draws=2000):
    """Transitions of one row with any key, beta in [0, 2] and decay."""
    return transition(
        unit(draws, 1, K),
        2 * draw(draws, 1, seed=1).sigmoid(),
        -draw(draws, 1, seed=2).square(),
    )


def test_one_reflection_is_no_three_cycle():
    # Its determinant is -1, a 3-cycle's is 1; and any factor, whatever beta and g, is symmetric,
    # so that it misses the antisymmetric part of the cycle.
    mirror = transition(unit(100, 1, 3), torch.tensor([2.0]).double())
    assert_close(torch.linalg.det(mirror), -torch.ones(100).double(), rtol=0, atol=1e-12)
    assert_close(torch.linalg.det(THREE_CYCLE), torch.ones(()).double())
    factors = any_factor(3)
    assert_close(factors, factors.mT)
    missed = torch.linalg.matrix_norm((THREE_CYCLE - THREE_CYCLE.T) / 2)
    assert torch.linalg.matrix_norm(factors - THREE_CYCLE).min() >= missed > 1.2


def test_one_factor_never_comes_back_after_three_steps():
    # In whatever space a token of order three is represented: |x^3 - 1| >= 3/4 |x - 1| for the
    # real eigenvalues of a symmetric A, so A^3 = I leaves A = I only.
    factors, eye = any_factor(5), torch.eye(5).double()
    moved, after_three = (
        torch.linalg.matrix_norm(A - eye) for A in (factors, factors.matrix_power(3))
    )
    assert (after_three >= 0.75 * moved - 1e-9).all()
    assert torch.equal(THREE_CYCLE.matrix_power(3), torch.eye(3).double())


# ---- the layers, with weights written by hand; tokens come as one-hot vectors -----------------


def before_silu(y):
    """The x >= -1 of silu(x) = y, for y above its minimum there; by halving."""
    low, high = torch.full_like(y, -1.0), torch.full_like(y, 9.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = F.silu(middle) < y
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


@torch.no_grad()
def test_a_delta_net_layer_holds_parity():
    layer = fnn.DeltaNet(
        hidden_size=2, num_heads=1, expand_k=0.5, expand_v=0.5, use_short_conv=False,
        allow_neg_eigval=True,
    )  # fmt: skip
    layer.b_proj.weight[:] = torch.tensor([-200.0, 200.0])  # beta of 0 and 2
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
        projection.weight.fill_(100.0)
    layer.o_proj.weight.fill_(1.0)
    bits, labels = parity(4, 4096, generator=seeded())
    y, _ = layer(F.one_hot(bits).float())
    assert_close(y, labels[..., None].expand(-1, -1, 2).float(), rtol=0, atol=0.01)


@torch.no_grad()
def test_a_delta_product_layer_holds_words_of_three_things():
    group = symmetric_group(3)
    layer = fnn.GatedDeltaProduct(
        hidden_size=6, head_dim=3, num_heads=1, expand_v=1, num_householder=2,
        use_short_conv=False, use_forget_gate=False, use_output_gate=False,
    )  # fmt: skip
    k, beta = householder_table(3)
    small = 0.25 * k.flatten(1).T  # silu does not go below -0.278
    layer.k_proj.weight[:] = before_silu(small)
    layer.v_proj.weight[:] = before_silu(-small)
    layer.b_proj.weight[:] = 200 * (beta.T - 1)
    layer.q_proj.weight[:] = before_silu(torch.arange(3.0))[:, None]
    layer.o_proj.weight[:] = torch.eye(6, 3)
    tokens, labels = permutation_words(4, 1024, generator=seeded())
    y, _ = layer(F.one_hot(tokens).float())
    # The layer's norm leaves the direction of (P - I)^T q.
    moved = (group - group[0]).float()
    directions = F.normalize(moved, dim=-1) * math.sqrt(3)
    assert torch.equal(torch.cdist(y[..., :3], directions).argmin(dim=-1), labels)
