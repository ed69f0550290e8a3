import math

import pytest
import torch
import torch.nn.functional as F

import fastweights as fw

from .conftest import random_tokens, shake, tiny


def direct(model, tokens):
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1]
    return F.cross_entropy(logits, tokens[1:], reduction="none").double()


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_streamed_text_is_the_whole_text(converted, chunk):
    model, tokens = tiny(), random_tokens(50)
    if converted:
        shake(fw.linearize(model, window=4, feature_dim=6))
    losses = direct(model, tokens)
    assert fw.perplexity(model, tokens, chunk=chunk) == pytest.approx(
        math.exp(losses.mean()), rel=1e-4
    )
    by_position = fw.perplexity(model, tokens, by_position=(10, 30, 49, 90), chunk=chunk)
    assert list(by_position) == ["0-10", "10-30", "30-49"]
    for value, (a, b) in zip(by_position.values(), ((0, 10), (10, 30), (30, 49)), strict=True):
        assert value == pytest.approx(math.exp(losses[a:b].mean()), rel=1e-4)


def test_sequences_do_not_see_each_other():
    model, tokens = shake(fw.linearize(tiny(), window=4, feature_dim=6)), random_tokens(50)
    expected = torch.stack([direct(model, row) for row in tokens[:48].view(3, 16)]).mean()
    assert fw.perplexity(model, tokens, length=16) == pytest.approx(math.exp(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 51}, "expected at least 51 tokens, got 50"),
        ({"by_position": (5, 5)}, "expected ascending positive by_position"),
        ({"chunk": 0}, "expected chunk >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fw.perplexity(tiny(), random_tokens(50), **arguments)


@pytest.mark.parametrize("chunk", [7, 64])
def test_a_model_that_bends_its_logits(chunk):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 60}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=0.5)).eval()
    tokens = random_tokens(50) % 60
    expected = math.exp(direct(model, tokens).mean())
    assert fw.perplexity(model, tokens, chunk=chunk) == pytest.approx(expected, rel=1e-4)
