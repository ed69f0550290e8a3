"""What a training step of one adapted layer keeps in memory, beside PEFT."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastweights as fw
from fastweights.adapters import LoRA


def peak(step):
    """Bytes of tensors that a step holds at most, beyond what was there before it."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        step()
    changes = [e for e in events.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = largest = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        largest = max(largest, held)
    return largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_takes_three_quarters_of_pefts_memory(dtype):
    features, rows, rank = 2048, 512, 16
    x = torch.randn(rows, features, dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, features, dtype=dtype)

    def step_of(model):
        def step():
            model(x).backward(dy)
            x.grad = None
            model.zero_grad()

        return peak(step)

    def bare():
        return nn.Sequential(nn.Linear(features, features, bias=False, dtype=dtype))

    theirs = step_of(get_peft_model(bare(), LoraConfig(r=rank, target_modules=["0"])))
    ours = step_of(fw.adapt(bare(), LoRA(rank=rank)))
    assert 2 * x.nbytes <= ours <= 0.75 * theirs  # y and the gradient of x at least
