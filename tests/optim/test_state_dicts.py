"""State dicts in the layout of bitsandbytes, both ways."""

import copy
import io

import pytest
import torch
from test_optimizers import EIGHT, TWINS, model, parameters, train

import fastweights as fw

EVERY = pytest.mark.parametrize("optimizer", [*EIGHT, *TWINS])


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_as_if_it_had_not_stopped(optimizer, dtype):
    whole, first = model(100, dtype), model(100, dtype)
    train(whole, straight := optimizer(whole.parameters(), lr=1e-2), 4)
    train(first, before := optimizer(first.parameters(), lr=1e-2), 4)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = optimizer(first.parameters(), lr=0.5)
    after.load_state_dict(torch.load(file, weights_only=True))
    train(whole, straight, 3)
    train(first, after, 3)
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(first), strict=True))


def test_keys_are_those_of_bitsandbytes():
    net = model(100)
    train(net, optimizer := fw.optim.AdamW8bit(net.parameters()), 2)
    states = optimizer.state_dict()["state"]
    assert set(states[2]) == {
        "step", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2",
    }  # fmt: skip
    assert set(states[0]) == {"step", "state1", "state2"}
    assert states[2]["step"] == 2 and states[2]["state1"].dtype == torch.uint8
    assert torch.equal(states[2]["qmap1"], fw.functional.dynamic_map(True))
    assert torch.equal(states[2]["qmap2"], fw.functional.dynamic_map(False))
    # The optimizer itself holds no maps.
    assert "qmap1" not in optimizer.state[net[2].weight]


def as_bitsandbytes_writes(saved):
    """States nested, and groups with its hyperparameters only."""
    saved = copy.deepcopy(saved)
    for state in saved["state"].values():
        nested = {key: state.pop(key) for key in list(state) if key != "step"}
        state["__bnb_optimizer_quant_state__"] = nested
    ours = ("optim_bits", "min_8bit_size", "block_size", "stochastic_rounding")
    for group in saved["param_groups"]:
        for key in ours:
            del group[key]
        group |= {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    return saved


@pytest.mark.parametrize("optimizer", EIGHT)
def test_loads_what_bitsandbytes_writes(optimizer):
    whole, first = model(100), model(100)
    train(whole, optimizer(whole.parameters(), lr=1e-2), 6)
    train(first, before := optimizer(first.parameters(), lr=1e-2), 4)
    after = optimizer(first.parameters(), lr=0.5)
    after.load_state_dict(as_bitsandbytes_writes(before.state_dict()))
    train(first, after, 2, first=4)
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(first), strict=True))


def test_states_of_32_bits_go_on_in_an_optimizer_of_8():
    net = model(100)
    train(net, before := fw.optim.AdamW(net.parameters()), 2)
    after = fw.optim.AdamW8bit(net.parameters())
    after.load_state_dict(before.state_dict())
    train(net, after, 1)
    assert after.state[net[2].weight]["state1"].dtype == torch.float32


def saved():
    net = model(100)
    train(net, optimizer := fw.optim.AdamW8bit(net.parameters()), 2)
    return net, copy.deepcopy(optimizer.state_dict())


def state(**changes):
    def change(saved):
        saved["state"][2] |= changes

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"][2].pop("absmax2"), "expected a state with absmax1, absmax2"),
        (state(exp_avg=torch.zeros(3)), "expected a state with .* got .*exp_avg"),
        (state(qmap2=fw.functional.dynamic_map(True)), "expected qmap2 to be the dynamic map"),
        (state(qmap1=torch.linspace(-1, 1, 256)), "expected qmap1 to be the dynamic map"),
        (state(qmap1=torch.zeros(16)), "expected qmap1 to be the dynamic map"),
        (state(absmax1=torch.zeros(5)), "expected 40 numbers in absmax1, one per block of block_"),
        (state(state1=torch.zeros(100, 100)), "expected state1 of uint8 codes of shape"),
        (
            state(state2=torch.zeros(99, 100, dtype=torch.uint8)),
            r"expected state2 of uint8 codes of shape \[100, 100\] \(from the parameter\)",
        ),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "parameter groups"),
        (lambda s: s["param_groups"][0]["params"].pop(), "doesn't match the size"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    net, there = saved()
    change(there)
    optimizer = fw.optim.AdamW8bit(net.parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(there)
    assert not optimizer.state


def test_refuses_states_of_torch():
    net, _ = saved()
    train(net, other := torch.optim.AdamW(net.parameters()), 1)
    with pytest.raises(ValueError, match="expected a state with state1, state2, step, got exp_avg"):
        fw.optim.AdamW8bit(net.parameters()).load_state_dict(other.state_dict())
