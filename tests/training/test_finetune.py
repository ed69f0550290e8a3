"""Fine-tuning: what is trained, in what order, with what loss, and that it can be cut anywhere."""

import json
import signal
import threading

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

import fastweights as fw
from fastweights.adapters import LoRA, adapter_layers
from fastweights.training import finetune
from fastweights.training.causal_lm import next_token_loss, output_loss, plain_output
from fastweights.training.interrupt import undivided
from tiny_models import SIZES, VOCAB, softmax_model

# float32 whatever the machine is faster in: what is compared here is exact.
QUIET = dict(progress=False, precision="float32", length=16)


def text(n=2000):
    """Tokens with something to learn: a noisy walk through the vocabulary."""
    steps = torch.randint(1, 4, (n,), generator=torch.Generator().manual_seed(3))
    return steps.cumsum(0) % VOCAB


def adapted(**settings):
    """A model of 4 bits under LoRA."""
    torch.manual_seed(0)
    model = fw.quantize_(softmax_model(), "nf4", group_size=32)
    return fw.adapt(model, LoRA(rank=4, **settings))


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def batch():
    return text()[:66].view(2, 33)


def reference_loss(model, tokens):
    logits = model(tokens[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def test_only_the_adapter_learns_and_it_does():
    model = adapted()
    before, codes = values(model), [b.clone() for n, b in model.named_buffers() if "packed" in n]
    log = finetune(
        model, text(), held_out=text(500), steps=30, batch_size=4, lr=5e-2, evaluate_every=12,
        **QUIET,
    )  # fmt: skip
    assert list(log.held_out) == [0, 12, 24, 30]
    assert log.held_out[30] < 0.9 * log.held_out[0]
    assert log.tokens == 30 * 4 * 16 and log.tokens_per_second > 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name)
        assert p.requires_grad == ("lora_" in name) and p.grad is None
    after = [b for n, b in model.named_buffers() if "packed" in n]
    assert len(after) == 14 and all(map(torch.equal, codes, after))


def test_the_held_out_loss_is_that_of_whole_sequences():
    model = adapted()
    log = finetune(model, text(), held_out=text(50), steps=1, **QUIET)
    model.requires_grad_(False)
    rows = torch.stack([text()[i : i + 17] for i in (0, 16, 32)])
    assert log.held_out[1] == pytest.approx(reference_loss(model.eval(), rows).item(), rel=1e-5)


@pytest.mark.parametrize(
    "optimizer, ratio, recompute",
    [("adamw", 1.0, False), ("adamw8bit", 16.0, False), ("adamw8bit", 1.0, True)],
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, monkeypatch, optimizer, ratio, recompute):
    """With dropout, whose masks a step draws; the signal comes amid a step of the optimizer."""

    def run(model, checkpoint):
        return finetune(
            model, text(), held_out=text(100), steps=9, accumulation=2, evaluate_every=4, lr=1e-2,
            optimizer=optimizer, ratio=ratio, recompute=recompute, checkpoint=checkpoint, **QUIET,
        )  # fmt: skip

    whole, broken, resumed = (adapted(dropout=0.2) for _ in range(3))
    generator = torch.get_rng_state()
    expected = run(whole, tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), generator)

    kind = torch.optim.AdamW if optimizer == "adamw" else fw.optim.AdamW8bit
    original, calls = kind.step, []

    def step(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "step", step)
    # A shell's background jobs start with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        log = run(broken, tmp_path / "b.safetensors")
    finally:
        signal.signal(signal.SIGINT, before)
    assert log.interrupted and len(log.losses) == 6 and list(log.held_out) == [0, 4]
    monkeypatch.undo()

    torch.manual_seed(99)
    log = run(resumed, tmp_path / "b.safetensors")
    assert not log.interrupted
    assert log.losses == expected.losses and log.held_out == expected.held_out
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_ctrl_c_within_a_forward_pass_costs_that_step_alone(tmp_path):
    """Of the third step the first half is done: its gradients must not meet the next ones."""
    settings = dict(steps=5, accumulation=2, lr=1e-2, **QUIET)
    whole, broken = adapted(dropout=0.2), adapted(dropout=0.2)
    expected = finetune(whole, text(), **settings)
    calls = []

    def interrupt(*_):
        calls.append(None)
        if len(calls) == 8:  # two calls are the probe's of the logits, and two a step
            raise KeyboardInterrupt

    handle = broken.model.layers[1].register_forward_hook(interrupt)
    log = finetune(broken, text(), checkpoint=tmp_path / "c.safetensors", **settings)
    handle.remove()
    assert log.interrupted and log.losses == expected.losses[:2]
    log = finetune(broken, text(), checkpoint=tmp_path / "c.safetensors", **settings)
    assert log.losses == expected.losses
    for (name, p), q in zip(whole.named_parameters(), broken.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_recomputing_changes_no_bit():
    models, calls = [adapted(dropout=0.1) for _ in range(2)], [[], []]
    for model, seen in zip(models, calls, strict=True):
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(None))
    logs = [
        finetune(m, text(), steps=3, recompute=recompute, **QUIET)
        for m, recompute in zip(models, (False, True), strict=True)
    ]
    assert len(calls[1]) - len(calls[0]) == 3  # once more a step
    assert logs[0].losses == logs[1].losses
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in models[1].modules())


def test_a_seed_is_a_training():
    losses = [finetune(adapted(), text(), steps=2, seed=s, **QUIET).losses for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_model_without_adapters_is_trained_whole():
    model = softmax_model()
    before = values(model)
    finetune(model, text(), steps=1, lr=1e-3, **QUIET)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_modes_are_left_as_they_were():
    model = adapted()
    model.model.layers[1].train()
    before = [m.training for m in model.modules()]
    finetune(model, text(), steps=1, **QUIET)
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize("saved", [(), ("lm_head",)])
def test_loss_and_gradients_are_those_of_the_whole_logits(saved, monkeypatch):
    """Also of an output layer that is trained itself; over more positions than one chunk."""
    monkeypatch.setattr("fastweights.training.causal_lm._CHUNK", 24)
    model = fw.adapt(softmax_model(), LoRA(rank=4, init="random", modules_to_save=saved))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert plain_output(model)
    expected = reference_loss(model, batch())
    gradients = torch.autograd.grad(0.5 * expected, parameters)
    assert next_token_loss(model, batch(), weight=0.5) == pytest.approx(expected.item(), rel=1e-5)
    for p, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distill", [0.3, 1.0])
def test_distillation_has_the_gradient_of_its_cross_entropy(distill, monkeypatch):
    monkeypatch.setattr("fastweights.training.causal_lm._CHUNK", 24)
    model = softmax_model().requires_grad_(False)
    hidden, teacher = torch.randn(2, 64, 64)
    hidden.requires_grad_(True)
    targets = batch()[:, 1:].flatten()
    logits, expected = model.lm_head(hidden), model.lm_head(teacher).softmax(-1)
    loss = (1 - distill) * nn.functional.cross_entropy(logits, targets)
    loss = loss + distill * nn.functional.cross_entropy(logits, expected)
    (gradient,) = torch.autograd.grad(2 * loss, hidden)
    ours = output_loss(model, hidden, targets, weight=2.0, teacher=teacher, distill=distill)
    assert ours == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad, gradient, rtol=1e-4, atol=1e-6)


def test_logits_that_are_bent_are_asked_of_the_model():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)).eval()
    fw.adapt(model, LoRA(rank=2, init="random"))
    assert not plain_output(model)
    expected = reference_loss(model, batch()).item()
    assert next_token_loss(model, batch(), plain=True) != pytest.approx(expected, rel=1e-2)
    assert next_token_loss(model, batch(), plain=False) == pytest.approx(expected, rel=1e-6)
    first, held_out = (row[None] for row in batch())
    losses = [reference_loss(model, rows).item() for rows in (first, held_out)]
    log = finetune(model, first[0], held_out=held_out[0], steps=1, **QUIET | {"length": 32})
    assert [log.losses[0], log.held_out[0]] == pytest.approx(losses, rel=1e-5)


def test_lora_plus_moves_b_faster():
    def moved(ratio):
        model = adapted()
        before = values(model)
        finetune(model, text(), steps=1, ratio=ratio, lr=1e-3, **QUIET)
        layer = next(adapter_layers(model))
        name = "model.layers.0.self_attn.q_proj.lora_{}.default"
        return [
            (factors["default"] - before[name.format(part)]).abs().max().item()
            for part, factors in (("A", layer.lora_A), ("B", layer.lora_B))
        ]

    slow, fast = moved(1.0), moved(8.0)
    assert fast[1] == pytest.approx(8 * slow[1], rel=1e-3)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    file = tmp_path / "c.safetensors"

    def run(model=None, tokens=None, **options):
        tokens = text() if tokens is None else tokens
        settings = dict(steps=2, checkpoint=file) | QUIET | options
        return finetune(adapted() if model is None else model, tokens, **settings)

    run()
    with pytest.raises(ValueError, match="expected a checkpoint with text="):
        run(tokens=text(1999))
    with pytest.raises(ValueError, match="expected a checkpoint with adapters="):
        run(adapted(alpha=8))
    with pytest.raises(ValueError, match="expected a checkpoint with optimizer=adamw8bit"):
        run(optimizer="adamw8bit")
    other = fw.adapt(fw.quantize_(softmax_model(), "int4", group_size=32), LoRA(rank=4))
    with pytest.raises(ValueError, match=r"formats=\['int4 in 32', .* has formats=\['nf4 in 32', "):
        run(other)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"held_out": text(16)}, "expected more than 16 held-out tokens"),
        ({"optimizer": "sgd"}, r"expected optimizer in \['adamw', 'adamw8bit'\], got 'sgd'"),
        ({"evaluate_every": 0}, "expected evaluate_every > 0, got 0"),
        ({"lr": 0.0}, "expected lr > 0, got 0.0"),
        ({"steps": None}, "expected either steps or minutes"),
        ({"length": 2000}, "expected more than 2000 tokens"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        finetune(adapted(), text(), **QUIET | {"steps": 1} | arguments)


def test_a_frozen_model_has_nothing_to_train():
    with pytest.raises(ValueError, match="something to train"):
        finetune(softmax_model().requires_grad_(False), text(), steps=1)


def test_ctrl_c_waits_for_the_end_of_what_is_undivided():
    done = []
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), undivided():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with undivided():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    assert done == [1]


def test_a_thread_has_no_handler_to_change():
    done = []

    def work():
        with undivided():
            done.append(json.dumps(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["1"]
