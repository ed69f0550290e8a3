import signal

import pytest
import torch

import fastweights as fw
from fastweights import data
from fastweights.adapters import LoRALinear
from fastweights.conversion import linearized_layers
from fastweights.training import train
from fastweights.training.loop import window_seed

from .conftest import shake, tiny

# float32 whatever the machine is faster in: what is compared here is exact.
QUIET = dict(progress=False, precision="float32")


def text(n=4000):
    """Tokens with something to learn: a noisy walk through the vocabulary."""
    generator = torch.Generator().manual_seed(3)
    steps = torch.randint(1, 4, (n,), generator=generator)
    return 3 + steps.cumsum(0) % 90


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("recipe", ["stable", "lolcats", "hedgehog"])
def test_transfer_lowers_the_error_tenfold_and_touches_nothing_else(recipe):
    window = None if recipe == "hedgehog" else 4
    model = shake(
        fw.linearize(tiny(initializer_range=0.1), recipe, window=window, feature_dim=16), seed=5
    )
    own = {id(p) for layer in linearized_layers(model) for p in layer.own_parameters()}
    before = snapshot(model)
    log = fw.transfer_attention(model, text(), steps=100, length=24, batch_size=4, lr=5e-2, **QUIET)
    assert sum(log.losses[-10:]) / 10 < log.losses[0] / 10
    assert log.steps == 100 and log.tokens == 100 * 4 * 24
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in own)
        assert p.grad is None and p.requires_grad


def test_the_transfer_loss_is_the_papers():
    model, tokens = shake(fw.linearize(tiny(), window=4)), text(26)
    errors = []
    layers = linearized_layers(model)
    for layer in layers:
        layer.original = True
        layer.on_transfer = lambda ours, softmax: errors.append(
            (ours - softmax).square().mean().item()
        )
    with torch.no_grad():
        model(tokens[None, :24])
    for layer in layers:
        layer.original, layer.on_transfer = False, None
    log = fw.transfer_attention(model, tokens[:25], steps=1, length=24, **QUIET)
    assert log.losses[0] == pytest.approx(1000 * sum(errors) / len(errors), rel=1e-5)


@pytest.mark.parametrize("distill", [0.0, 0.5, 1.0])
def test_recover_learns_by_lora_alone(distill):
    model = fw.linearize(tiny(), window=4, feature_dim=6)
    own = {id(p) for layer in linearized_layers(model) for p in layer.own_parameters()}
    before = snapshot(model)
    log = fw.recover(
        model,
        text(),
        steps=24,
        length=32,
        batch_size=2,
        lr=1e-2,
        rank=4,
        distill=distill,
        merge=False,
        **QUIET,
    )
    assert sum(log.losses[-6:]) < sum(log.losses[:6])
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 8
    for name, p in model.named_parameters():
        if "lora" not in name:
            assert torch.equal(p, before[name.replace(".base_layer.", ".")]) == (id(p) not in own)


def test_distillation_needs_no_second_model():
    """Its loss is at least the teacher's entropy, which it reaches where student and teacher are
    the same."""
    model, tokens = fw.linearize(tiny(), window=64, feature_dim=6), text()
    whole = tiny()
    log = fw.recover(model, tokens, steps=1, length=30, distill=1.0, seed=4, **QUIET)
    with torch.no_grad():
        inputs = data.windows(tokens, 31, 1, seed=window_seed(4, 0, 0))[:, :-1]
        p = whole(inputs).logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean().item()
    assert entropy - 1e-4 <= log.losses[0] < entropy + 0.5


def test_gradient_accumulation_is_a_larger_batch():
    results = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = fw.linearize(tiny(), window=4, feature_dim=6)
        seen = []

        def loss_and_backward(batch, weight, model=model, seen=seen):
            seen.append(batch)
            loss = model(batch[:, :-1], labels=batch[:, :-1]).loss
            (loss * weight).backward()
            return loss.item()

        p = {"mix": linearized_layers(model)[0].mix}
        log = train(
            loss_and_backward, p, text(18), lr=1e-2, steps=1, minutes=None, length=17,
            batch_size=batch_size, accumulation=accumulation, **QUIET,
        )  # fmt: skip
        results.append((p["mix"].detach(), log.tokens))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == 68


@pytest.mark.parametrize("stage", ["transfer", "recover"])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(stage, tmp_path, monkeypatch):
    def run(model, checkpoint, **kwargs):
        function = fw.transfer_attention if stage == "transfer" else fw.recover
        return function(
            model, text(), steps=9, length=(16, 24), checkpoint=checkpoint, seed=7, **QUIET | kwargs
        )

    def start():
        return fw.linearize(tiny(), window=4, feature_dim=6)

    whole = start()
    expected = run(whole, tmp_path / "a.safetensors")

    broken, original, calls = start(), torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    # A shell's background jobs start with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        log = run(
            broken, tmp_path / "b.safetensors", **({} if stage == "transfer" else {"merge": False})
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert log.interrupted and len(log.losses) == 5
    monkeypatch.undo()

    resumed = start()
    log = run(resumed, tmp_path / "b.safetensors")
    assert log.losses == expected.losses and not log.interrupted
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    model, file = fw.linearize(tiny(), window=4, feature_dim=6), tmp_path / "c.safetensors"

    def run(**kw):
        return fw.transfer_attention(
            model, text(), length=16, checkpoint=file, **QUIET | dict(steps=2) | kw
        )

    run()
    with pytest.raises(ValueError, match=r"expected a checkpoint with seed=1, .* has seed=0"):
        run(seed=1)
    data = file.read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"\xff" * 64 + data[64:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a checkpoint of a training, or is damaged"):
            run()


def test_a_time_budget_becomes_steps():
    model = fw.linearize(tiny(), window=4, feature_dim=6)
    log = fw.transfer_attention(model, text(), minutes=0.02, length=16, **QUIET)
    assert log.steps == len(log.losses) >= 4 and log.seconds < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected either steps or minutes, got steps=None, minutes=None"),
        ({"steps": 1, "minutes": 1}, "expected either steps or minutes"),
        ({"steps": 0}, "expected steps > 0, got 0"),
        ({"steps": 1, "length": 1}, "expected length >= 2"),
        ({"steps": 1, "length": 4000}, "expected more than 4000 tokens"),
        ({"steps": 1, "batch_size": 0}, "expected batch_size > 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fw.transfer_attention(fw.linearize(tiny()), text(), **QUIET | arguments)


def test_an_unconverted_model_has_nothing_to_transfer():
    with pytest.raises(ValueError, match="expected a model converted by linearize"):
        fw.transfer_attention(tiny(), text(), steps=1)


def test_the_precision_is_chosen_kept_and_checked(tmp_path):
    model, file = fw.linearize(tiny(), window=4, feature_dim=6), tmp_path / "d.safetensors"

    def run(**kw):
        options = dict(steps=1, length=16, checkpoint=file)
        return fw.transfer_attention(model, text(), **QUIET | options | kw)

    assert run(precision="bfloat16").losses
    assert run(precision="auto").losses
    with pytest.raises(ValueError, match="expected a checkpoint with precision=float32"):
        run(precision="float32")
    with pytest.raises(ValueError, match="expected precision 'auto', 'float32' or 'bfloat16'"):
        run(precision="float8")
