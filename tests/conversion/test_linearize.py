import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OlmoeConfig, OlmoeForCausalLM
from transformers.models.cohere import CohereConfig, CohereForCausalLM

import fastweights as fw
from fastweights.conversion import Recipe, linearized_layers, original_attention

from .conftest import CONFIGS, SIZES, random_tokens, shake, tiny

KINDS = list(CONFIGS)
WHOLE = Recipe("stable", window=64, sink=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_over_everything_is_the_softmax_model(kind):
    model, tokens = tiny(kind), random_tokens(2, 40)
    expected = model(tokens).logits
    shake(fw.linearize(model, WHOLE))
    torch.testing.assert_close(model(tokens).logits, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_attention_is_still_there(kind):
    model, tokens = tiny(kind), random_tokens(2, 40)
    expected = model(tokens).logits
    shake(fw.linearize(model, window=4))
    assert not torch.allclose(model(tokens).logits, expected, atol=1e-2)
    with original_attention(model):
        torch.testing.assert_close(model(tokens).logits, expected, rtol=2e-4, atol=2e-4)


def test_a_sliding_softmax_model_is_reproduced_by_its_original_attention():
    model, tokens = tiny("mistral", sliding_window=7), random_tokens(2, 40)
    expected = model(tokens).logits
    fw.linearize(model, window=4, keep_softmax=[1])
    with original_attention(model):
        torch.testing.assert_close(model(tokens).logits, expected, rtol=2e-4, atol=2e-4)


def test_published_recipes_add_what_the_papers_count():
    heads, key_dim, features = 4, 8, 6
    for recipe, expected in (
        ("lolcats", heads * 2 * key_dim * features + heads),
        ("hedgehog", heads * 2 * key_dim * features),
    ):
        model = fw.linearize(tiny(), recipe, feature_dim=features)
        for layer in linearized_layers(model):
            assert sum(p.numel() for p in layer.own_parameters()) == expected


def test_pretrained_names_stay():
    model = tiny("qwen3")
    before = set(model.state_dict())
    assert before <= set(fw.linearize(model).state_dict())


@pytest.mark.parametrize("recipe", ["stable", "lolcats", "hedgehog"])
def test_no_token_sees_a_later_one(recipe):
    model = shake(fw.linearize(tiny(), recipe, **({} if recipe == "hedgehog" else {"window": 4})))
    tokens = random_tokens(1, 30)
    changed = tokens.clone()
    changed[0, 20] = 5 + tokens[0, 20] % 50
    a, b = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(a[:, :20], b[:, :20])
    assert not torch.allclose(a[:, 20:], b[:, 20:])


def test_the_stable_recipe_does_not_see_absolute_positions():
    model, tokens = shake(fw.linearize(tiny(), window=4)), random_tokens(1, 30)
    positions = torch.arange(30)[None]
    a = model(tokens, position_ids=positions).logits
    torch.testing.assert_close(
        model(tokens, position_ids=positions + 100).logits, a, rtol=1e-3, atol=1e-3
    )


def test_chosen_layers_stay_softmax():
    model = fw.linearize(tiny(), window=64, keep_softmax=[1])
    assert [layer.layer_idx for layer in linearized_layers(model)] == [0]
    tokens = random_tokens(2, 40)
    reference = tiny()
    reference.model.layers[0] = shake(fw.linearize(tiny(), WHOLE)).model.layers[0]
    model = fw.linearize(tiny(), WHOLE, keep_softmax=[1])
    torch.testing.assert_close(model(tokens).logits, tiny()(tokens).logits, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "magic"}, "expected recipe 'stable', 'lolcats', 'hedgehog', got 'magic'"),
        ({"window": 0}, "expected window >= 1"),
        ({"feature_dim": 0}, "expected feature_dim >= 1, got 0"),
        ({"keep_softmax": [7]}, r"expected keep_softmax within layers 0 to 1, got \[7\]"),
        ({"keep_softmax": [0, 1]}, "expected at least one layer to convert"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fw.linearize(tiny(), **arguments)


def test_unsupported_architectures_give_one_line():
    small = SIZES | dict(num_experts=2, num_experts_per_tok=1)
    models = [
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50)),
        OlmoeForCausalLM(OlmoeConfig(**small)),  # norms over the whole projection
        CohereForCausalLM(CohereConfig(**SIZES)),  # rotates interleaved pairs
        torch.nn.Linear(3, 3),
    ]
    for model in models:
        with pytest.raises(ValueError, match=r"^linearize: ") as error:
            fw.linearize(model)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="converted already"):
        fw.linearize(fw.linearize(tiny()))
