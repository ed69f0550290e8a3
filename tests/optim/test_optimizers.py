"""The optimizers in training: against torch, under its helpers, with overrides."""

import copy

import pytest
import torch
from torch import nn

import fastweights as fw
from fastweights.functional import dequantize_blockwise
from fastweights.testing import assert_close

EIGHT = [fw.optim.Adam8bit, fw.optim.AdamW8bit, fw.optim.Lion8bit, fw.optim.SGD8bit]
TWINS = [fw.optim.Adam, fw.optim.AdamW, fw.optim.Lion, fw.optim.SGD]
PAIRS = pytest.mark.parametrize(("eight", "twin"), list(zip(EIGHT, TWINS, strict=True)))


def model(width=64, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(16, width), nn.GELU(), nn.Linear(width, width), nn.Linear(width, 1)
    )
    return net.to(dtype)


def loss_of(net, seed=0):
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(seed))
    x = x.to(net[0].weight.dtype)
    return (net(x) - x[:, :4].sum(1, keepdim=True)).square().mean()


def train(net, optimizer, steps=10, first=0):
    losses = []
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(net, seed)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parameters(net):
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (fw.optim.AdamW, torch.optim.AdamW),
        (fw.optim.Adam, torch.optim.Adam),
        (fw.optim.SGD, lambda p, **k: torch.optim.SGD(p, momentum=0.9, **k)),
    ],
    ids=["AdamW", "Adam", "SGD"],
)
def test_twins_are_torchs_optimizers(ours, theirs):
    a, b = model(), model()
    train(a, ours(a.parameters(), lr=1e-2))
    train(b, theirs(b.parameters(), lr=1e-2))
    # Ten steps that pass roundings of float32 on.
    assert_close(parameters(a), parameters(b), tolerance=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (fw.optim.Adam, 0.81),  # twice 1 - lr decay, as without a state
        (fw.optim.Lion, 0.81),
        (fw.optim.SGD, 1 - 0.1 - 0.5 * (0.9 * 0.2 + 0.2 * 0.9)),  # the decay is in the momentum
    ],
)
def test_decay_is_decoupled_but_in_sgd(optimizer, expected):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    decaying = optimizer([p], lr=0.5, weight_decay=0.2)
    decaying.step()
    decaying.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), expected))


@PAIRS
def test_small_parameters_are_those_of_32_bits(eight, twin):
    a, b = model(63), model(63)  # 63 * 63 < 4096
    train(a, eight(a.parameters(), lr=1e-2))
    train(b, twin(b.parameters(), lr=1e-2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@PAIRS
def test_a_first_step_is_that_of_32_bits(eight, twin):
    a, b = model(100), model(100)
    train(a, eight(a.parameters(), lr=1e-2), 1)
    train(b, twin(b.parameters(), lr=1e-2), 1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@PAIRS
def test_training_follows_that_of_32_bits(eight, twin):
    a, b = model(100), model(100)
    rate = 1e-3 if eight is fw.optim.Lion8bit else 1e-2
    losses = train(a, eight(a.parameters(), lr=rate, min_8bit_size=64), 60)
    expected = train(b, twin(b.parameters(), lr=rate), 60)
    assert sum(expected[-10:]) < 0.5 * sum(expected[:10])
    assert sum(losses[-10:]) == pytest.approx(sum(expected[-10:]), rel=0.1)


@PAIRS
def test_bytes_of_the_states(eight, twin):
    net = nn.Linear(1024, 1024, bias=False)
    optimizer = eight(net.parameters(), lr=1e-3)
    net(torch.ones(1024)).sum().backward()
    optimizer.step()
    state = optimizer.state[net.weight]
    held = sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, torch.Tensor))
    states = len(eight.signs)
    assert held / net.weight.numel() == states * (1 + 4 / 256)
    assert held / net.weight.numel() <= 2.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("optimizer", [fw.optim.AdamW8bit, fw.optim.AdamW])
def test_other_dtypes_train(optimizer, dtype):
    net = model(100, dtype)
    states = optimizer(net.parameters(), lr=1e-2, eps=1e-7)
    losses = train(net, states, 60)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    kept = states.state[net[2].weight]["state1"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    coded = optimizer is fw.optim.AdamW8bit and dtype != torch.float64
    assert kept == (torch.uint8 if coded else wide)


def test_stochastic_rounding_learns_where_rounding_to_nearest_stands_still():
    def final(stochastic):
        torch.manual_seed(0)
        p = nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
        optimizer = fw.optim.AdamW([p], lr=1e-4, weight_decay=0, stochastic_rounding=stochastic)
        for _ in range(300):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach().float().mean()

    assert final(False) == 1  # half of the spacing below 1 is 2e-3
    assert final(True) == pytest.approx(1 - 300 * 1e-4, abs=2e-3)


def test_stochastic_rounding_comes_from_torchs_generator():
    def run():
        net = model(100, torch.bfloat16)
        torch.manual_seed(3)
        train(net, fw.optim.AdamW8bit(net.parameters(), lr=1e-3, stochastic_rounding=True))
        return parameters(net)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_steps_of_parameters_without_gradients_are_not_counted():
    net = model(100)
    optimizer = fw.optim.AdamW8bit(net.parameters(), lr=1e-2)
    net[0].requires_grad_(False)
    train(net, optimizer, 3)
    net[0].requires_grad_(True)
    train(net, optimizer, 2)
    assert optimizer.state[net[0].weight]["step"] == 2
    assert optimizer.state[net[2].weight]["step"] == 5


def test_parameters_of_other_strides():
    a, b = model(100), model(100)
    with torch.no_grad():
        b[2].weight.set_(b[2].weight.T.contiguous().T)
    assert not b[2].weight.is_contiguous()
    train(a, fw.optim.AdamW8bit(a.parameters(), lr=1e-2), 5)
    train(b, fw.optim.AdamW8bit(b.parameters(), lr=1e-2), 5)
    assert_close(parameters(b), parameters(a), tolerance=1e-5)


def test_a_closure_is_called_and_its_loss_returned():
    net = model()
    optimizer = fw.optim.AdamW8bit(net.parameters(), lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_backward_through_a_parameter_that_has_moved_raises():
    net = model()
    optimizer = fw.optim.AdamW8bit(net.parameters(), lr=1e-2)
    loss = loss_of(net)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_scaler_skips_what_overflows():
    net = model(100)
    optimizer = fw.optim.AdamW8bit(net.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(net)).backward()
    scaler.step(optimizer)
    scaler.update()
    twin = model(100)
    train(twin, fw.optim.AdamW8bit(twin.parameters(), lr=1e-2), 1)
    assert_close(parameters(net), parameters(twin), tolerance=1e-5)
    before = copy.deepcopy(parameters(net))
    optimizer.zero_grad()
    scaler.scale(loss_of(net)).backward()
    net[0].weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(parameters(net), before, strict=True))


def test_schedulers_change_rate_and_betas():
    net = model(100)
    optimizer = fw.optim.AdamW8bit(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
    seen = []
    for _ in range(9):
        train(net, optimizer, 1)
        scheduler.step()
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
    assert len(set(seen)) == 9
    before = copy.deepcopy(parameters(net))
    optimizer.param_groups[0]["lr"] = 0.0
    train(net, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(parameters(net), before, strict=True))


def test_a_rate_may_be_a_tensor():
    a, b = model(100), model(100)
    train(a, fw.optim.AdamW8bit(a.parameters(), lr=torch.tensor(1e-2)), 2)
    train(b, fw.optim.AdamW8bit(b.parameters(), lr=float(torch.tensor(1e-2))), 2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_accelerate():
    from accelerate import Accelerator

    a, b = model(100), model(100)
    accelerator = Accelerator(cpu=True)
    net, optimizer = accelerator.prepare(a, fw.optim.AdamW8bit(a.parameters(), lr=1e-2))
    for seed in range(4):
        with accelerator.accumulate(net):
            optimizer.zero_grad()
            accelerator.backward(loss_of(net, seed))
            optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    train(b, fw.optim.AdamW8bit(b.parameters(), lr=1e-2), 4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_groups_differ():
    net = model(100)
    optimizer = fw.optim.AdamW8bit(
        [
            {"params": net[0].parameters(), "lr": 0.0},
            {"params": net[2].parameters(), "optim_bits": 32},
            {"params": net[3].parameters(), "block_size": 64, "min_8bit_size": 1},
        ],
        lr=1e-2,
    )
    before = net[0].weight.detach().clone()
    train(net, optimizer, 2)
    assert torch.equal(net[0].weight, before)
    assert optimizer.state[net[2].weight]["state1"].dtype == torch.float32
    assert optimizer.state[net[3].weight]["absmax1"].shape == (2,)


def test_overrides_by_parameter_and_by_module():
    manager = fw.optim.GlobalOptimManager.get_instance()
    assert manager is fw.optim.GlobalOptimManager.get_instance()
    net = model(100)
    manager.register_parameters(net.parameters())
    manager.override_config(net[0].weight, "lr", 0.0)
    manager.override_config([net[0].bias, net[3].bias], key_value_dict={"weight_decay": 0.5})
    manager.register_module_override(net[2], "weight", {"optim_bits": 32})
    optimizer = fw.optim.AdamW8bit(net.parameters(), lr=1e-2)
    before = net[0].weight.detach().clone()
    train(net, optimizer, 2)
    assert torch.equal(net[0].weight, before)
    assert optimizer.state[net[2].weight]["state1"].dtype == torch.float32
    plain = model(100)
    train(plain, fw.optim.AdamW8bit(plain.parameters(), lr=1e-2), 2)
    assert not torch.equal(net[3].bias, plain[3].bias)
    with pytest.raises(ValueError, match="either key and value or key_value_dict"):
        manager.override_config(net[0].weight)


def test_overrides_keep_nothing_alive():
    manager = fw.optim.GlobalOptimManager()
    net = model()
    manager.override_config(net[0].weight, "lr", 0.0)
    manager.register_module_override(net[2], "weight", {"lr": 0.0})
    assert set(manager.overrides()) == {id(net[0].weight), id(net[2].weight)}
    del net
    assert not manager.overrides()


def test_stable_embedding():
    table = fw.optim.StableEmbedding(300, 32, padding_idx=1)
    assert fw.nn.StableEmbedding is fw.optim.StableEmbedding
    assert set(table.state_dict()) == {"weight", "norm.weight", "norm.bias"}
    bound = (6 / (300 + 32)) ** 0.5
    weight = table.weight.detach()
    assert (weight[1] == 0).all() and 0.99 * bound < weight.abs().max() <= bound
    tokens = torch.randint(300, (4, 9))
    expected = nn.functional.layer_norm(nn.functional.embedding(tokens, weight), (32,))
    torch.testing.assert_close(table(tokens), expected)
    assert table.bfloat16()(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize("copied", [False, True])
def test_stable_embedding_has_states_of_32_bits(copied):
    table = fw.optim.StableEmbedding(300, 32)
    table = copy.deepcopy(table) if copied else table
    optimizer = fw.optim.AdamW8bit(table.parameters())
    table(torch.arange(300)).square().sum().backward()
    optimizer.step()
    assert optimizer.state[table.weight]["state1"].dtype == torch.float32


def test_no_state_is_older_than_its_gradient():
    # A row of an embedding that is no longer seen stops moving as soon as its block is quiet.
    p = nn.Parameter(torch.zeros(4096))
    optimizer = fw.optim.SGD8bit([p], lr=1.0)
    p.grad = torch.randn(4096)
    optimizer.step()
    p.grad = torch.zeros(4096)
    for _ in range(400):
        optimizer.step()
    state = optimizer.state[p]
    left = dequantize_blockwise(state["state1"], state["absmax1"])
    assert left.abs().max() < 1e-15


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: fw.optim.AdamW(p, lr=-1.0), "AdamW: expected lr >= 0, got -1.0"),
        (lambda p: fw.optim.AdamW8bit(p, betas=(0.9, 1.0)), "AdamW8bit: expected 0 <= beta < 1"),
        (lambda p: fw.optim.Adam(p, eps=-1e-8), "Adam: expected eps >= 0"),
        (lambda p: fw.optim.Lion(p, optim_bits=4), "Lion: expected optim_bits 8 or 32, got 4"),
        (lambda p: fw.optim.SGD8bit(p, momentum=0.0), "SGD8bit: expected 0 < momentum < 1, got 0"),
        (lambda p: fw.optim.SGD(p, weight_decay=float("nan")), "SGD: expected weight_decay >= 0"),
    ],
)
def test_refused_options(make, message):
    with pytest.raises(ValueError, match=message):
        make(model().parameters())


def test_refused_gradients():
    table = nn.Embedding(300, 32, sparse=True)
    optimizer = fw.optim.AdamW8bit(table.parameters())
    table(torch.arange(5)).sum().backward()
    with pytest.raises(RuntimeError, match="AdamW8bit: expected dense gradients, got sparse ones"):
        optimizer.step()
