"""fla's layers and models on a CPU, unchanged, through `fastweights.integrations.fla.patch`."""

import doctest
import os
import subprocess
import sys
import types
from itertools import pairwise

import fla.layers
import fla.models
import pytest
import torch
from fla.layers.simple_gla import SimpleGatedLinearAttention
from fla.models.utils import Cache

from fastweights.integrations.fla import patch, patched, patching, stats, unpatch
from fastweights.testing import assert_close
from test_readme import ROOT, run_blocks

D, T = 32, 70  # more than 64 tokens: layers change from recurrent to chunk functions there
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _patched():
    with patched():
        yield


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYERS = {
    "DeltaNet": {"num_heads": 2},
    "GatedDeltaNet": {"num_heads": 1, "num_v_heads": 2, "head_dim": 8},
    "GatedDeltaNet2": {"num_heads": 2, "head_dim": 8},
    "GatedDeltaProduct": {"num_heads": 2, "head_dim": 8, "num_householder": 2},
    "GatedLinearAttention": {"num_heads": 2},
    "HGRN2Attention": {"expand_ratio": 16},
    "HGRNAttention": {},
    "KimiDeltaAttention": {"num_heads": 1, "num_v_heads": 2, "head_dim": 8},
    "LinearAttention": {"num_heads": 2, "do_feature_map_norm": True},
    "MomAttention": {"num_heads": 2, "head_dim": 8, "num_memories": 3, "topk": 2},
    "MultiScaleRetention": {"num_heads": 2},
    "SimpleGatedLinearAttention": {"num_heads": 2},
}


def layer(name, **options):
    torch.manual_seed(0)
    kind = getattr(fla.layers, name, SimpleGatedLinearAttention)
    return kind(hidden_size=D, layer_idx=0, **(LAYERS[name] | options))


def cached(module, x, cuts):
    """The outputs of `module` on x in the pieces that `cuts` makes of it, state in between."""
    cache, outputs = Cache(), []
    with torch.no_grad():
        for start, end in zip(cuts, [*cuts[1:], None], strict=True):
            y, _, cache, *_ = module(x[:, start:end], past_key_values=cache, use_cache=True)
            outputs.append(y)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_train(name):
    module, x = layer(name), draw(2, T, D).requires_grad_()
    y = module(x)[0]
    assert y.shape == x.shape
    (y * draw(2, T, D, seed=1)).sum().backward()
    for which, parameter in (("input", x), *module.named_parameters()):
        assert parameter.grad is not None, which
        assert parameter.grad.isfinite().all(), which
        assert parameter.grad.any(), which


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("prompt", [3, 66])
def test_layers_decode(name, prompt):
    module, x = layer(name).eval(), draw(2, T, D)
    if name in ("HGRNAttention", "MomAttention") and prompt == 66:
        prompt = 64  # their chunk functions take no state
    whole = module(x)[0].detach()
    assert_close(cached(module, x, [0, *range(prompt, T)]), whole, tolerance=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "HGRNAttention"])
def test_layers_keep_packed_sequences_apart(name):
    module, x = layer(name).eval(), draw(1, T, D)
    cuts = [0, 3, 3, T]
    if name in ("MomAttention", "SimpleGatedLinearAttention"):
        cuts = [0, 3, T]
    with torch.no_grad():
        packed = module(x, cu_seqlens=torch.tensor(cuts))[0]
        apart = [module(x[:, a:b])[0] for a, b in pairwise(cuts) if a < b]
    assert_close(packed, torch.cat(apart, 1), tolerance=TOLERANCE)


# HGRN, MoM and simple GLA zero the padding instead, or part of what comes of it.
UNPADDING = sorted(set(LAYERS) - {"HGRNAttention", "MomAttention", "SimpleGatedLinearAttention"})


@pytest.mark.parametrize("name", UNPADDING)
def test_layers_ignore_padding_on_the_left(name):
    module, x = layer(name).eval(), draw(2, T, D)
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        y = module(x, attention_mask=mask)[0]
        assert_close(y[:1], module(x[:1])[0], tolerance=TOLERANCE)
        assert_close(y[1:, 5:], module(x[1:, 5:])[0], tolerance=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_half_precision(name, dtype):
    module, x = layer(name), draw(2, T, D)
    expected = module(x)[0].detach()
    with torch.autocast("cpu", dtype):
        y = module(x)[0]
    assert y.dtype == dtype
    (y.float() ** 2).sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    got = module.to(dtype)(x.to(dtype))[0]
    for half in (y, got):
        scale = expected.square().mean().sqrt()
        assert (half.float() - expected).square().mean().sqrt() < 0.05 * scale


MODELS = {
    "DeltaNet": {"num_heads": 2},
    "GLA": {"num_heads": 2},
    "GatedDeltaNet": {"num_heads": 2, "head_dim": 16},
    "GatedDeltaProduct": {"num_heads": 2, "head_dim": 16},
    "HGRN": {},
    "HGRN2": {"expand_ratio": 32},
    "KDA": {"num_heads": 2, "head_dim": 16},
    "LinearAttention": {"num_heads": 2},
    "Mamba": {"state_size": 8},
    "Mom": {"num_heads": 2, "head_dim": 16},
    "RetNet": {"num_heads": 2},
}


def model(name, **options):
    torch.manual_seed(0)
    config = getattr(fla.models, f"{name}Config")(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        vocab_size=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **(MODELS[name] | options),
    )
    return getattr(fla.models, f"{name}ForCausalLM")(config)


def tokens(*shape):
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(0))


def greedy(module, prompt, count):
    """The most likely continuation, each token computed from the whole text before it."""
    text = prompt
    with torch.no_grad():
        for _ in range(count):
            following = module(input_ids=text).logits[:, -1].argmax(-1, keepdim=True)
            text = torch.cat([text, following], 1)
    return text


@pytest.mark.parametrize("name", MODELS)
def test_models_of_default_settings_train_and_generate(name):
    module, ids = model(name), tokens(2, T)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    losses = []
    for _ in range(8):
        loss = module(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    module.eval()
    prompt = ids[:, :12]
    text = module.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False
    )
    assert torch.equal(text, greedy(module, prompt, 10))


def _with_linear_loss():
    return model("GatedDeltaNet", fuse_cross_entropy=False, fuse_linear_cross_entropy=True)


def test_a_gated_deltanet_learns_a_text_by_heart_and_recites_it():
    module, ids = _with_linear_loss(), tokens(1, 48)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    for _ in range(60):
        loss = module(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    module.eval()
    before = stats()["fused_recurrent_gated_delta_rule"]
    recited = module.generate(
        ids[:, :8], attention_mask=torch.ones(1, 8).long(), max_new_tokens=40, do_sample=False
    )
    assert torch.equal(recited, ids)
    # Both layers, once for the prompt and then for one token at a time.
    assert stats()["fused_recurrent_gated_delta_rule"] - before == 2 * 40
    assert stats()["causal_conv1d_update"] == 2 * 3 * 39


def test_generation_of_a_padded_batch():
    module, ids = model("GatedDeltaNet").eval(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    text = module.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(text[:1], greedy(module, ids[:1], 8))
    assert torch.equal(text[1:, 4:], greedy(module, ids[1:, 4:], 8))


def test_generation_loses_its_state_without_us(monkeypatch):
    """Why `prepare_inputs_for_generation` is repaired: if this fails, it need not be any more."""
    module, ids = model("GatedDeltaNet").eval(), tokens(1, 12)
    mixin = fla.models.generation_utils.FLAGenerationMixin
    inputs = mixin.prepare_inputs_for_generation
    monkeypatch.setattr(mixin, "prepare_inputs_for_generation", inputs.__wrapped__)
    text = module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    assert not torch.equal(text, greedy(module, ids, 12))


def test_mom_mixes_up_its_tokens_without_us(monkeypatch):
    """Why its `transform` is repaired: if this fails, it need not be any more."""
    module, x = layer("MomAttention").eval(), draw(1, T, D)
    whole = module(x)[0]
    assert_close(module(x[:, :66])[0], whole[:, :66], tolerance=TOLERANCE)
    transform = fla.layers.mom.transform
    monkeypatch.setattr(fla.layers.mom, "transform", transform.__wrapped__)
    whole = module(x)[0]
    assert (module(x[:, :66])[0] - whole[:, :66]).abs().max() > 1e-3


# ---- manners of the patch ----------------------------------------------------------------------


def held():
    """Every function of fla, and the methods that are repaired, by where they are."""
    functions = {
        (name, key): value
        for name, module in list(sys.modules.items())
        if name == "fla" or name.startswith("fla.")
        for key, value in list(vars(module).items())
        if callable(value)
    }
    methods = {
        (cls, key): vars(cls)[key]
        for cls, key in (
            (fla.modules.FusedCrossEntropyLoss, "forward"),
            (fla.models.generation_utils.FLAGenerationMixin, "prepare_inputs_for_generation"),
        )
    }
    return functions | methods


def registered():
    registries = [
        *fla.backends._operation_registries.values(),
        *fla.backends._function_registries.values(),
    ]
    return [registry for registry in registries if "fastweights" in registry._backends]


def test_unpatch_restores_every_object():
    unpatch()
    before = held()
    assert not registered()
    patch()
    changed = {key for key, value in held().items() if value is not before[key]}
    assert ("fla.layers.gated_deltanet", "fused_recurrent_gated_delta_rule") in changed
    assert ("fla.ops.gla", "chunk_gla") in changed
    assert registered()
    patch()
    assert {key for key, value in held().items() if value is not before[key]} == changed
    unpatch()
    assert all(value is before[key] for key, value in held().items())
    assert not registered()
    unpatch()


def test_a_layer_from_before_and_a_script_that_holds_a_function(monkeypatch):
    unpatch()
    script = types.ModuleType("script")
    monkeypatch.setitem(sys.modules, "script", script)
    script.chunk_gla = original = fla.ops.gla.chunk_gla
    module, x = layer("GatedLinearAttention", fuse_norm=False), draw(1, T, D)
    with pytest.raises(RuntimeError, match="0 active drivers"):
        module(x)
    with patched():
        module(x)
        assert stats()["chunk_gla"] == 1
        assert script.chunk_gla is fla.ops.gla.chunk_gla is not original
    assert script.chunk_gla is original
    with pytest.raises(RuntimeError, match="0 active drivers"):
        module(x)
    patch()


def test_the_page_runs():
    unpatch()
    run_blocks(ROOT / "docs" / "fla.md")
    patch()


def test_examples_run():
    unpatch()
    results = doctest.testmod(patching)
    assert results.attempted >= 4
    assert results.failed == 0
    patch()


def test_stats_start_anew_and_patched_keeps_what_was():
    x, g = draw(1, 3, 4), -draw(1, 3, 4).abs()
    fla.ops.hgrn.fused_recurrent_hgrn(x, g)
    with patched():
        fla.ops.hgrn.fused_recurrent_hgrn(x, g)
    assert stats()["fused_recurrent_hgrn"] == 2
    fla.ops.hgrn.fused_recurrent_hgrn(x, g)
    assert stats()["fused_recurrent_hgrn"] == 3
    unpatch()
    patch()
    assert not any(stats().values())


def test_tensors_of_another_device_get_the_original(caplog):
    meta = [torch.empty(1, 70, 2, 8, device="meta") for _ in range(3)]
    g = torch.empty(1, 70, 2, device="meta")
    for call in (
        lambda: fla.ops.gla.chunk_gla(*meta, meta[0]),  # exchanged
        lambda: fla.ops.kda.chunk_kda(*meta, meta[0], g),  # a registry of its own
        lambda: fla.ops.gated_delta_rule.chunk_gated_delta_rule(*meta, g, g),  # of its operation
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"active drivers|cpu tensor"):
            call()
    assert not any(stats().values())


def test_without_dispatch_everything_is_exchanged():
    program = """
import torch
from fastweights.integrations.fla import patching, patch, stats
patch()
from fla.layers import GatedDeltaNet
layer = GatedDeltaNet(hidden_size=32, num_heads=2, head_dim=8, layer_idx=0)
layer(torch.randn(1, 70, 32))[0].sum().backward()
print(stats()["chunk_gated_delta_rule"])
"""
    result = subprocess.run(
        [sys.executable, *(["-S"] if sys.flags.no_site else []), "-W", "ignore", "-c", program],
        env=os.environ | {"FLA_DISABLE_BACKEND_DISPATCH": "1"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "1", result.stderr
