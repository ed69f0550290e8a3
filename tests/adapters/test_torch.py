"""LoRA's layers among torch's machinery: compilation, export, checkpointing, memory."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import fastweights as fw
from fastweights.adapters import LoRA, activate, disabled

from .models import adapted, inputs, model, quantized, shake


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def test_a_compiled_layer_draws_a_new_mask_every_time():
    ours, x = adapted(dropout=0.5), inputs(40)
    shake(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(compiled(x), first)


def test_values_and_scales_change_without_compiling_again():
    ours, x = adapted(), inputs()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        shake(ours)
        for scale in (0.5, 3.0):
            ours.layers[0].up.set_scale("default", scale)
            torch.testing.assert_close(compiled(x), ours(x))


def test_switching_compiles_again_and_is_right():
    ours, x = adapted(name="a"), inputs()
    adapted(ours, name="b", rank=2)
    shake(ours, "a")
    shake(ours, "b")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for names in ("a", ["a", "b"], ()):
        activate(ours, names)
        torch.testing.assert_close(compiled(x), ours(x))
    activate(ours, "a")
    with disabled(ours):
        torch.testing.assert_close(compiled(x), model()(x))


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"dora": True}], ids=str)
def test_models_are_exported(options):
    base = model(depth=1) if "dora" in options else quantized()
    ours, x = adapted(base, **options).eval(), inputs()
    shake(ours)
    program = torch.export.export(ours, (x,))
    torch.testing.assert_close(program.module()(x), ours(x))


def test_a_checkpointed_block_sees_the_same_mask_again():
    ours = adapted(dropout=0.5)
    shake(ours)
    x = inputs(8).requires_grad_()
    results = []
    for through in (lambda block, h: block(h), lambda b, h: checkpoint(b, h, use_reentrant=False)):
        torch.manual_seed(0)
        ours.zero_grad()
        y = through(ours.layers[1], through(ours.layers[0], x))
        y.square().sum().backward()
        results.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    assert len(results[0]) == 16
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_step_allocates_nothing_of_the_size_of_the_weight():
    ours = fw.adapt(nn.Sequential(nn.Linear(1024, 1024)), LoRA(rank=4, init="random"))
    x = torch.randn(4, 1024, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        ours(x).sum().backward()
    assert ours[0].base_layer.weight.grad is None
    largest = max(event.self_cpu_memory_usage for event in events.events())
    assert 0 < largest < ours[0].base_layer.weight.nbytes / 4
