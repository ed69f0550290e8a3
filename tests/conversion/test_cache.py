import pytest
import torch
from transformers import DynamicCache

import fastweights as fw
from fastweights.conversion import linearized_layers
from fastweights.integrations.transformers import StateCache, StateLayer

from .conftest import random_tokens, shake, tiny

SETTINGS = [
    ("llama", "stable", ()),
    ("qwen3", "stable", (0,)),
    ("mistral", "lolcats", ()),
    ("llama", "hedgehog", (1,)),
]


def converted(kind="llama", recipe="stable", kept=()):
    window = None if recipe == "hedgehog" else 5
    return shake(
        fw.linearize(tiny(kind), recipe, window=window, feature_dim=6, keep_softmax=kept)
    ).eval()


@pytest.mark.parametrize(("kind", "recipe", "kept"), SETTINGS)
@torch.no_grad()
def test_chunks_and_steps_equal_one_call(kind, recipe, kept):
    model, tokens = converted(kind, recipe, kept), random_tokens(2, 33)
    expected = model(tokens).logits
    cache, parts, start = StateCache(model), [], 0
    for length in (11, 1, 1, 13, 1, 1, 5):
        parts.append(model(tokens[:, start : start + length], cache=cache, use_cache=True).logits)
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-3, atol=1e-3)
    assert cache.get_seq_length() == 33


@pytest.mark.parametrize(("kind", "recipe", "kept"), SETTINGS)
def test_generate_needs_no_cache_of_ours(kind, recipe, kept):
    model, tokens = converted(kind, recipe, kept), random_tokens(2, 9)
    kwargs = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    with_cache = model.generate(tokens, **kwargs)
    assert torch.equal(with_cache, model.generate(tokens, use_cache=False, **kwargs))
    assert torch.equal(with_cache, model.generate(tokens, cache=StateCache(model), **kwargs))


def test_beam_search_reorders_the_states():
    model, tokens = converted(), random_tokens(2, 9)
    kwargs = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=3)
    assert torch.equal(
        model.generate(tokens, **kwargs), model.generate(tokens, use_cache=False, **kwargs)
    )


@torch.no_grad()
def test_the_state_does_not_grow():
    model, cache = converted(), DynamicCache()
    sizes = []
    for tokens in random_tokens(1, 60).split(10, 1):
        model(tokens, cache=cache, use_cache=True)
        sizes.append(sum(x.numel() for layer in cache.layers for x in layer.state.tensors()))
    assert all(isinstance(layer, StateLayer) for layer in cache.layers)
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(("kind", "recipe", "kept"), SETTINGS)
@torch.no_grad()
def test_left_padding_changes_nothing(kind, recipe, kept):
    model = converted(kind, recipe, kept)
    rows = [random_tokens(1, n, seed=n)[0] for n in (4, 17, 9)]
    width, steps = 17, 6
    batch, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
    for b, row in enumerate(rows):
        batch[b, width - len(row) :], mask[b, width - len(row) :] = row, 1
    kwargs = dict(
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    together = model.generate(batch, attention_mask=mask, **kwargs)
    for b, row in enumerate(rows):
        alone = model.generate(row[None], **kwargs)
        assert torch.equal(together.sequences[b, width:], alone.sequences[0, len(row) :])
        for x, y in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(x[b], y[0], rtol=1e-3, atol=1e-3)


def test_right_padding_trains_like_unpadded_rows():
    model, row = converted(), random_tokens(1, 12)
    padded, mask = torch.zeros(2, 20, dtype=torch.int64), torch.zeros(2, 20, dtype=torch.int64)
    padded[0, :12], mask[0, :12] = row, 1
    padded[1], mask[1] = random_tokens(20), 1
    logits = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(logits[0, :12], model(row).logits[0], rtol=1e-3, atol=1e-3)
    logits[0, :12].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_state_is_not_a_key_value_cache():
    model, cache = converted(), DynamicCache()
    tiny()(random_tokens(1, 4), cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="holds keys of a softmax attention"):
        model(random_tokens(1, 4), cache=cache, use_cache=True)
    layer = StateLayer()
    with pytest.raises(ValueError, match="cannot be cropped"):
        layer.crop(1)
    assert linearized_layers(model)


def test_packed_positions_are_refused():
    model = converted()
    positions = torch.cat((torch.arange(6), torch.arange(5)))[None]
    with pytest.raises(ValueError, match="position_ids that restart within a row"):
        model(random_tokens(1, 11), position_ids=positions, use_cache=False)
