"""Unchanged Hugging Face models on our ops: what they compute, and what `patch` touches."""

import copy
import functools
import pickle
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from fastweights.integrations.transformers import patch, patched, stats, unpatch
from fastweights.integrations.transformers.converted import cache_argument
from recurrent_models import FAMILIES, GATED, KDA, VOCAB, modeling, recurrent_model

RECURRENT = (*GATED, *KDA)
SOME = ("qwen3_next", "olmo_hybrid", "kimi_linear", "bailing_hybrid", "lfm2", "lfm3")


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    unpatch()


@functools.cache
def model_of(family):
    return recurrent_model(family)


def tokens(*shape):
    return torch.randint(2, VOCAB, shape)


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def kernels_of(family):
    """Names under which a forward pass and the decoding of `family` ask for kernels."""
    names = {"causal_conv1d_fn", "causal_conv1d_update"}
    if family in GATED:
        names |= {"chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", "RMSNormGated"}
    elif family in KDA:
        names |= {"chunk_kda", "fused_recurrent_kda", "RMSNormGated"}
    return names


def gradients(model, ids, **options):
    model.zero_grad()
    logits = model(ids, use_cache=False, **options).logits
    logits.log_softmax(-1)[..., 0].sum().div(ids.numel()).backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def greedy(model, ids, count=32, **options):
    options |= {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    return model.generate(ids, attention_mask=options.pop("mask", torch.ones_like(ids)), **options)


def in_chunks(model, ids, lengths):
    cache = cache_argument(model, DynamicCache(config=model.config))
    return torch.cat(
        [model(part, use_cache=True, **cache).logits for part in ids.split(lengths, 1)], 1
    )


# ---- what the models compute --------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_gradients_and_tokens(family):
    model, ids = model_of(family), tokens(2, 70)
    logits, grads = gradients(model, ids)
    text = greedy(model, ids[:, :9])
    with patched():
        got, got_grads = gradients(model, ids)
        assert torch.equal(greedy(model, ids[:, :9]), text)
        assert {name for name, calls in stats().items() if calls} == kernels_of(family)
    close(got, logits)
    close(got_grads, grads, 1e-4)


@pytest.mark.parametrize("length", [1, 3, 64, 65, 200])
@pytest.mark.parametrize("family", [*RECURRENT, "lfm2", "lfm3"])
@torch.no_grad()
def test_prompts_of_any_length(family, length):
    model, ids = model_of(family), tokens(1, length + 4)
    lengths = (length, 1, 1, 2)
    expected = in_chunks(model, ids, lengths)
    with patched():
        close(in_chunks(model, ids, lengths), expected)


@pytest.mark.parametrize("family", [*GATED, "kimi_linear", "bailing_hybrid", "lfm2", "lfm3"])
@torch.no_grad()
def test_chunks_and_steps_equal_one_call(family):
    model, ids = model_of(family), tokens(2, 90)
    with patched():
        close(in_chunks(model, ids, (5, 1, 64, 1, 1, 2, 16)), model(ids).logits)


@pytest.mark.parametrize("family", SOME)
@torch.no_grad()
def test_left_padding(family):
    model, ids = model_of(family), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    alone = ids[1:, 13:]
    expected = model(ids, attention_mask=mask).logits
    with patched():
        got = model(ids, attention_mask=mask).logits
        close(got[0], expected[0])
        close(got[1, 13:], expected[1, 13:])
        text = greedy(model, ids, mask=mask)
        assert torch.equal(text[1, 40:], greedy(model, alone)[0, 27:])


@pytest.mark.parametrize("family", SOME)
def test_beam_search(family):
    model, ids = model_of(family), tokens(2, 9)
    expected = greedy(model, ids, 12, num_beams=3)
    with patched():
        assert torch.equal(greedy(model, ids, 12, num_beams=3), expected)


@pytest.mark.parametrize("family", ["qwen3_5", "olmo_hybrid", "kimi_linear", "lfm2"])
def test_bfloat16_and_autocast(family):
    # No experts: a rounding can send a token to another one.
    dense = {"mlp_layer_types": ["dense"] * 2} if family in KDA else {}
    model, ids = recurrent_model(family, **dense), tokens(2, 70)
    half = copy.deepcopy(model).bfloat16()

    def results():
        with torch.no_grad():
            yield half(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            logits, grads = gradients(model, ids)
        yield logits
        yield torch.cat([grad.flatten() for grad in grads.values()])

    expected = list(results())
    with patched():
        for got, other in zip(results(), expected, strict=True):
            assert got.dtype == other.dtype
            assert (got - other).norm() < 2e-2 * other.norm()


@pytest.mark.parametrize("family", SOME)
def test_inference_mode(family):
    model, ids = model_of(family), tokens(2, 33)
    with torch.inference_mode():
        expected = in_chunks(model, ids, (30, 1, 1, 1))
        with patched():
            close(in_chunks(model, ids, (30, 1, 1, 1)), expected)


def train_through_a_cache(model, ids):
    model.zero_grad()
    logits = in_chunks(model, ids, (20, 1, 19))
    logits.log_softmax(-1)[..., 0].sum().div(ids.numel()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", SOME)
def test_training_through_a_cache(family):
    model, ids = model_of(family), tokens(2, 40)
    _, whole = gradients(model, ids)
    if family in RECURRENT:  # their backward needs states that the cache has overwritten since
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            train_through_a_cache(model, ids)
    with patched():
        close(train_through_a_cache(model, ids), whole, 1e-4)


# ---- packed sequences ---------------------------------------------------------------------------

LENGTHS = (7, 1, 64, 2, 30)


def packing(spelling, lengths=LENGTHS):
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].int()
    given = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": max(lengths)}
    return {"position_ids": positions} | (given if spelling == "lengths" else {"seq_idx": numbers})


@pytest.mark.parametrize("spelling", ["lengths", "seq_idx"])
@pytest.mark.parametrize("family", SOME)
def test_packed_sequences_do_not_see_each_other(family, spelling):
    model, ids = model_of(family), tokens(1, sum(LENGTHS))
    with patched():
        logits, grads = gradients(model, ids, **packing(spelling))
        alone = [gradients(model, part) for part in ids.split(LENGTHS, 1)]
    close(logits, torch.cat([part for part, _ in alone], 1))
    shares = [length / ids.numel() for length in LENGTHS]
    for name, grad in grads.items():
        close(grad, sum(s * g[name] for s, (_, g) in zip(shares, alone, strict=True)), 1e-4)


def test_packed_rows():
    lengths = ((10, 23), (16, 17))
    rows = [packing("seq_idx", row) for row in lengths]
    options = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    model, ids = model_of("qwen3_next"), tokens(2, 33)
    with patched(), torch.no_grad():
        logits = model(ids, use_cache=False, **options).logits
        for row, parts, got in zip(ids, lengths, logits, strict=True):
            alone = [model(part[None]).logits[0] for part in row.split(parts)]
            close(got, torch.cat(alone))


@pytest.mark.parametrize("family", SOME)
@torch.no_grad()
def test_packed_sequences_unpatched_raise_or_leak(family):
    model, ids = model_of(family), tokens(1, sum(LENGTHS))
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        model(ids, use_cache=False, **packing("seq_idx"))
    if family in GATED:
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            model(ids, use_cache=False, **packing("lengths"))
        return
    logits = model(ids, use_cache=False, **packing("lengths")).logits
    alone = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)
    assert (logits - alone).abs().max() > 1e-2


@torch.no_grad()
def test_three_spellings_of_one_function():
    module, (q, k) = modeling("qwen3_next"), torch.randn(2, 1, 9, 2, 16)
    v, g, beta = torch.randn(1, 9, 4, 16), -torch.rand(1, 9, 4), torch.rand(1, 9, 4)
    x, weight = torch.randn(1, 9, 6).transpose(1, 2), torch.randn(6, 4)
    offsets, numbers = torch.tensor([0, 4, 9]), torch.tensor([[0] * 4 + [1] * 5])
    spellings = ({"cu_seqlens": offsets}, {"cu_seq_lens_q": offsets}, {"seq_idx": numbers})
    with patched():
        rule, conv = module.torch_chunk_gated_delta_rule, module.causal_conv1d_fn
        halves = [slice(0, 4), slice(4, 9)]
        o = torch.cat([rule(*(t[:, h] for t in (q, k, v, g, beta)))[0] for h in halves], 1)
        y = torch.cat([conv(x[..., h], weight) for h in halves], -1)
        for given in (*spellings, spellings[1] | spellings[2]):
            close(rule(q, k, v, g, beta, unknown=1, **given)[0], o)
            close(conv(x, weight, unknown=1, **given), y)
            # Three columns before the first token, as a cache puts them there.
            longer = torch.cat([torch.zeros(1, 6, 3), x], -1)
            close(conv(longer, weight, **given)[..., 3:], y)


# ---- the contracts of the functions -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@torch.no_grad()
def test_convolution(dtype, activation):
    module = modeling("lfm2")
    x = torch.randn(2, 20, 6).transpose(1, 2).to(dtype)
    weight, bias = torch.randn(6, 4), torch.randn(6)
    expected = module.causal_conv1d_fn(x, weight, bias, activation)
    with patched():
        y = module.causal_conv1d_fn(x, weight, bias, activation=activation, use_cache=False)
        close(module.causal_conv1d_fn(x.contiguous(), weight, bias, activation), y)
    close(y, expected, 1e-5 if dtype == torch.float32 else 3e-2)
    assert y.transpose(1, 2).is_contiguous()  # so that the delta rule reads heads as they lie


@pytest.mark.parametrize("kept", [3, 4])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
def test_convolution_step(kept, grad, dtype, activation):
    module = modeling("lfm2")
    x = torch.randn(2, 6, 20).to(dtype)
    weight, bias = torch.randn(6, 4, requires_grad=grad), torch.randn(6)
    state = torch.zeros(2, 6, kept, dtype=dtype)
    with torch.set_grad_enabled(grad), patched():
        y = module.causal_conv1d_fn(x, weight, bias, activation)
        steps = [
            module.causal_conv1d_update(token, state, weight, bias, activation)
            for token in x.split((1,) * 17 + (3,), -1)
        ]
    close(torch.cat(steps, -1), y, 1e-5 if dtype == torch.float32 else 3e-2)
    assert torch.equal(state, x[..., -kept:])


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
@torch.no_grad()
def test_a_step_updates_the_state_it_is_given_and_only_then(family):
    module = modeling(family)
    name = (
        "torch_recurrent_gated_delta_rule" if family in GATED else "recurrent_kimi_delta_attention"
    )
    channels = () if family in GATED else (16,)
    (q, k, v), beta = torch.randn(3, 2, 1, 4, 16), torch.rand(2, 1, 4)
    g, state = -torch.rand(2, 1, 4, *channels), torch.randn(2, 4, 16, 16)
    call = functools.partial(getattr(module, name), q, k, v, g=g, beta=beta)
    o, final = call(initial_state=state.clone(), output_final_state=True)
    with patched():
        call = functools.partial(getattr(module, name), q, k, v, g=g, beta=beta)
        given = state.clone()
        got, none = call(initial_state=given, output_final_state=False)
        close(got, o)
        assert none is None
        assert torch.equal(given, state)
        with torch.enable_grad():
            got, ours = call(initial_state=given, output_final_state=True)
        close((got, ours), (o, final))
        assert torch.equal(given, state)
        got, ours = call(initial_state=given, output_final_state=True)
        close((got, ours), (o, final))
        assert ours is given


def test_other_devices_get_the_original():
    module = modeling("lfm2")
    x, weight = torch.empty(2, 6, 20, device="meta"), torch.empty(6, 4, device="meta")
    with patched():
        assert module.causal_conv1d_fn(x, weight).shape == x.shape
        assert stats()["causal_conv1d_fn"] == 0
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            module.causal_conv1d_fn(x, weight, seq_idx=torch.zeros(2, 20, device="meta"))


# ---- compile, export, copies --------------------------------------------------------------------


def layer(family):
    return next(m for m in model_of(family).modules() if hasattr(m, "conv1d"))


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_compiled_layer(family):
    mixer, x = layer(family), torch.randn(2, 40, 64)
    nodes = []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    expected = mixer(x)
    with patched():
        for _ in range(2):
            close(torch.compile(mixer, fullgraph=True, backend=backend)(x), expected)
        for op in ("causal_conv1d", "delta_rule", "gated_rms_norm"):
            assert any(f"fastweights.{op}" in node for node in nodes)
    torch._dynamo.reset()


def test_exported_layer_has_no_ops_of_ours():
    mixer, x = layer("qwen3_next"), torch.randn(2, 40, 64)
    with patched(), torch.no_grad():
        program = torch.export.export(mixer, (x,))
        targets = {str(node.target) for node in program.graph.nodes}
        assert not any("fastweights" in target for target in targets)
        close(program.module()(x), mixer(x))


@torch.no_grad()
def test_copies_and_pickles():
    model, ids = model_of("qwen3_next"), tokens(1, 20)
    expected = model(ids).logits
    with patched():
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        function = modeling("qwen3_next").torch_chunk_gated_delta_rule
        assert pickle.loads(pickle.dumps(function)) is function
        for other in copies:
            close(other(ids).logits, expected)
    for other in copies:
        close(other(ids).logits, expected)


# ---- what is patched, and when ------------------------------------------------------------------


def contents():
    modules = [modeling(family) for family in FAMILIES]
    norms = [getattr(m, n) for m in modules for n in vars(m) if n.endswith("RMSNormGated")]
    return [dict(vars(m)) for m in modules] + [{"forward": c.forward} for c in norms]


def same(a, b):
    return all(
        x.keys() == y.keys() and all(x[n] is y[n] for n in x) for x, y in zip(a, b, strict=True)
    )


def test_unpatch_restores_every_object_and_patching_twice_is_patching_once():
    before = contents()
    patch()
    once = contents()
    assert not same(once, before)
    patch()
    assert same(contents(), once)
    with patched():
        pass
    assert same(contents(), once)
    unpatch()
    assert same(contents(), before)
    unpatch()
    assert same(contents(), before)


def test_norms_that_gate_first_are_left_alone():
    with patched():
        for family, name in (("bamba", "Bamba"), ("falcon_h1", "FalconH1"), ("zamba2", "Zamba2")):
            norm = getattr(modeling(family), f"{name}RMSNormGated")
            assert not hasattr(norm.forward, "__wrapped__")


def test_what_another_put_in_place_meanwhile_stays():
    module = modeling("lfm2")
    original = module.causal_conv1d_fn
    patch()
    module.causal_conv1d_fn = other = lambda *args, **kwargs: None
    unpatch()
    try:
        assert module.causal_conv1d_fn is other
    finally:
        module.causal_conv1d_fn = original


def test_stats_count_from_patch_on():
    x, weight = torch.randn(1, 6, 5), torch.randn(6, 4)
    for calls in (3, 2):
        patch()
        assert not any(stats().values())
        for _ in range(calls):
            modeling("lfm2").causal_conv1d_fn(x, weight)
        assert stats()["causal_conv1d_fn"] == calls
        unpatch()
        assert stats()["causal_conv1d_fn"] == calls


def test_the_module_that_the_package_kernels_makes_of_a_function(monkeypatch):
    class Func(nn.Module):
        kernel_layer_name = "causal_conv1d_fn"

        def forward(self, hidden_states, weight):
            raise AssertionError("not ours")

    name = "transformers.models.some.modeling_some"
    module = ModuleType(name)
    module.causal_conv1d_fn = function = Func()
    monkeypatch.setitem(sys.modules, name, module)
    with patched():
        assert module.causal_conv1d_fn(torch.randn(1, 6, 5), torch.randn(6, 4)).shape == (1, 6, 5)
    assert module.causal_conv1d_fn is function


def test_model_code_that_is_imported_later():
    code = """
import sys, torch
from fastweights.integrations.transformers import patch, stats, unpatch
assert not any("modeling_qwen3" in name for name in sys.modules)
patch()
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as module
assert "exec_module" not in vars(module.__spec__.loader)
ours = module.torch_chunk_gated_delta_rule
q, g = torch.randn(1, 5, 2, 8), torch.zeros(1, 5, 2)
ours(q, q, q, g, g)
assert stats()["chunk_gated_delta_rule"] == 1
unpatch()
original = module.torch_chunk_gated_delta_rule
assert original is ours.__wrapped__
import transformers.models.lfm2.modeling_lfm2 as later
assert not any(hasattr(f, "__wrapped__") and "patching" in f.__code__.co_filename
               for f in vars(later).values() if hasattr(f, "__code__"))
"""
    subprocess.run([sys.executable, *(["-S"] if sys.flags.no_site else []), "-c", code], check=True)
