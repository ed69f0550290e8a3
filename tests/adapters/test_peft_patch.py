"""An unchanged `PeftModel` on our op: what it computes, and what is left to PEFT."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from fastweights.integrations.peft import patch, patched, stats, unpatch
from tiny_models import VOCAB, softmax_model

ORIGINAL = Linear.forward
NAMES = ("first", "second", "third")
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    unpatch()
    assert Linear.forward is ORIGINAL


def adapted(*configs, model=None, seed=0):
    """A PeftModel with adapters first, second, … that are trained already."""
    model = softmax_model() if model is None else model
    for i, config in enumerate(configs):
        if i == 0:
            model = get_peft_model(model, config, NAMES[0])
        else:
            model.add_adapter(NAMES[i], config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model.eval()


def lora(r=4, **options):
    return LoraConfig(**{"r": r, "lora_alpha": 6, "target_modules": TARGETS} | options)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def tokens(*shape):
    torch.manual_seed(3)
    return torch.randint(2, VOCAB, shape)


def served():
    return stats()["lora_linear"]


def gradients(model, ids):
    model.zero_grad()
    logits = model(ids).logits
    logits.log_softmax(-1)[..., 0].sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(got, expected, dtype=torch.float32, factor=1):
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float64: 1e-12}[dtype] * factor
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)


# ---- the same results ---------------------------------------------------------------------------

CONFIGS = {
    "plain": lora(),
    "rslora": lora(use_rslora=True),
    "patterns": lora(rank_pattern={"v_proj": 2}, alpha_pattern={"layers.0.mlp.down_proj": 3}),
    "biases": lora(bias="all"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(name, dtype):
    model = adapted(CONFIGS[name], model=softmax_model("qwen2")).to(dtype)
    if dtype == torch.bfloat16:  # as PEFT keeps adapters over a base of 16 bits
        for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
            parameter.data = parameter.data.float()
    ids = tokens(2, 9)
    logits, grads = gradients(model, ids)
    with patched():
        got, got_grads = gradients(model, ids)
        assert served() == 6
        with torch.no_grad():
            same(model(ids).logits, logits, dtype)
    same(got, logits, dtype)
    assert got_grads.keys() == grads.keys()
    for key, grad in grads.items():
        assert got_grads[key].dtype == grad.dtype
        same(got_grads[key], grad, dtype, 10)


def test_conv1d_of_transformers():
    model = adapted(LoraConfig(r=4, target_modules=["c_attn", "c_proj"]), model=gpt2())
    ids = tokens(2, 7)
    logits, grads = gradients(model, ids)
    with patched():
        got, got_grads = gradients(model, ids)
        assert served() == 6
    same(got, logits)
    for key, grad in grads.items():
        same(got_grads[key], grad)


def test_adapters_that_are_active_together():
    model = adapted(lora(), lora(2, use_rslora=True), lora(target_modules=["q_proj"]))
    model.base_model.set_adapter(list(NAMES))
    ids = tokens(1, 6)
    logits, grads = gradients(model, ids)
    with patched():
        got, got_grads = gradients(model, ids)
    same(got, logits)
    assert len(grads) == 2 * (6 + 6 + 2)
    for key, grad in grads.items():
        same(got_grads[key], grad, factor=4)


def test_a_mixed_batch():
    model = adapted(lora(), lora(2), lora(target_modules=["q_proj"]))
    ids, names = tokens(6, 5), ["second", "__base__", "first", "third", "second", "first"]
    with torch.no_grad():
        expected = model(ids, adapter_names=names).logits
        with patched():
            same(model(ids, adapter_names=names).logits, expected)
            assert served() == 6
            with pytest.raises(ValueError, match="Length of `adapter_names`"):
                model(ids, adapter_names=names[:-1])


@pytest.mark.parametrize("beams", [1, 2])
def test_generated_text(beams):
    model = adapted(lora(), lora(2))
    ids = tokens(3, 4)
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    settings |= {
        "attention_mask": torch.ones_like(ids),
        "adapter_names": ["first", "second", "__base__"],
    }
    expected = model.generate(input_ids=ids, **settings)
    with patched():
        assert torch.equal(model.generate(input_ids=ids, **settings), expected)
        assert served() > 0


def test_disabled_merged_and_scaled():
    model, ids = adapted(lora()), tokens(1, 5)
    layers = [m for m in model.modules() if isinstance(m, Linear)]

    @torch.no_grad()
    def states():
        yield model(ids).logits
        with model.disable_adapter():
            yield model(ids).logits
        model.merge_adapter()
        yield model(ids).logits
        model.unmerge_adapter()
        for layer in layers:
            layer.set_scale("first", 0.25)
        yield model(ids).logits
        for layer in layers:
            layer.scaling["first"] = torch.tensor(1.5)  # as for hot-swapping
        yield model(ids).logits

    expected = list(states())
    for layer in layers:
        layer.set_scale("first", 1)
    with patched():
        for got, wanted in zip(states(), expected, strict=True):
            same(got, wanted)
        assert served() == 3 * len(layers)


def test_autocast():
    model, ids = adapted(lora()), tokens(2, 5)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), torch.autocast("cpu", torch.bfloat16):
            expected = model(ids).logits
            with patched():
                got = model(ids).logits
                assert served() == 6
        assert got.dtype == expected.dtype == torch.bfloat16
        same(got.float(), expected.float(), torch.bfloat16)


def test_compiled():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    model = adapted(LoraConfig(r=2, target_modules=["0", "1"]), model=model)
    x, trained = torch.randn(3, 8), [p for p in model.parameters() if p.requires_grad]
    expected = model(x)
    grads = torch.autograd.grad(expected.sum(), trained)
    with patched():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(x)
        same(got, expected)
        for got_grad, grad in zip(torch.autograd.grad(got.sum(), trained), grads, strict=True):
            same(got_grad, grad)
        with torch.no_grad():
            same(compiled(x), expected)
        layer, ones = probe(), torch.ones(100, 200)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        first, second = ((compiled(ones) - layer.base_layer(ones)) > 0.5 for _ in range(2))
    assert abs(float(first.float().mean()) - 0.7) < 0.017
    assert (first != second).float().mean() > 0.3


# ---- dropout ------------------------------------------------------------------------------------


def probe(p=0.3, features=200, **options):
    """A layer that adds the dropped x to its base's output."""
    model = nn.Sequential(nn.Linear(features, features))
    model = adapted(
        LoraConfig(r=features, lora_alpha=features, lora_dropout=p, target_modules=["0"]),
        model=model,
    )
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["first"].weight.copy_(torch.eye(features))
        layer.lora_B["first"].weight.copy_(torch.eye(features))
    return layer.train()


def test_dropout_is_distributed_as_pefts():
    layer, x = probe(), torch.ones(100, 200)
    kept = []
    for context in (patched, torch.enable_grad):
        with context():
            torch.manual_seed(0)
            update = (layer(x) - layer.base_layer(x)).detach()
            again = (layer(x) - layer.base_layer(x)).detach()
        ones = update > 0.5
        torch.testing.assert_close(update, ones / 0.7, rtol=0, atol=1e-5)
        assert (ones != (again > 0.5)).float().mean() > 0.3  # drawn anew at every call
        kept.append(ones.float())
    for ones in kept:  # 20000 draws: 5 standard deviations
        assert abs(float(ones.mean()) - 0.7) < 0.017
        assert float((ones.mean(0) - 0.7).abs().max()) < 0.25
        assert float((ones.mean(1) - 0.7).abs().max()) < 0.18
    layer.eval()
    with patched():
        same(layer(x), layer.base_layer(x) + x)


def test_dropout_is_the_same_when_a_checkpoint_runs_again():
    layer, x = probe(), torch.randn(5, 200, requires_grad=True)
    results = []
    with patched():
        for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
            torch.manual_seed(5)
            y = call(x)
            results.append(
                (y, *torch.autograd.grad(y.square().sum(), [x, layer.lora_A["first"].weight]))
            )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- what is left to PEFT -----------------------------------------------------------------------


def unserved(layer, call, setup=lambda layer: None):
    """PEFT's result, bit for bit, and nothing served."""
    setup(layer)
    torch.manual_seed(1)
    expected = call(layer)
    with patched():
        torch.manual_seed(1)
        got = call(layer)
        assert served() == 0
    assert torch.equal(got, expected)


def layer_of(model=None, **options):
    model = nn.Sequential(nn.Linear(6, 5)) if model is None else model
    return adapted(LoraConfig(r=2, target_modules=["0"], **options), model=model).base_model.model[
        0
    ]


X = torch.randn(3, 6)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_bias": True}, {"use_dora": True, "lora_dropout": 0.5}],
    ids=str,
)
def test_variants_are_pefts(options):
    unserved(layer_of(**options).train(), lambda layer: layer(X))


@pytest.mark.parametrize(
    "model, x",
    [
        (nn.Sequential(nn.Conv1d(6, 5, 3)), torch.randn(1, 6, 4)),
        (nn.Sequential(nn.Embedding(6, 5)), torch.tensor([1, 4])),
    ],
)
def test_other_layers_are_pefts(model, x):
    unserved(layer_of(model), lambda layer: layer(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_base_with_a_forward_of_its_own_is_pefts():
    unserved(layer_of(nn.Sequential(Doubled(6, 5))), lambda layer: layer(X))
    patched_base = nn.Linear(6, 5)
    patched_base.forward = lambda x: torch.ones(3, 5)
    unserved(layer_of(nn.Sequential(patched_base)), lambda layer: layer(X))


@pytest.mark.parametrize("which", ["base_layer", "lora_A", "lora_B"])
@pytest.mark.parametrize("grad", [True, False])
def test_hooks_run(which, grad):
    layer = layer_of()
    module = getattr(layer, which)
    module = module if which == "base_layer" else module["first"]
    seen = []
    module.register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.set_grad_enabled(grad):
        unserved(layer, lambda layer: layer(X))
        assert len(seen) == 2 and torch.equal(*seen)


def test_hooks_of_all_modules_run():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args))
    try:
        unserved(layer_of(), lambda layer: layer(X))
    finally:
        handle.remove()
    assert len(seen) % 2 == 0 and len(seen) >= 8


def test_a_base_that_is_trained_gets_its_gradient():
    layer = layer_of()
    layer.base_layer.weight.requires_grad_(True)
    with patched():
        layer(X).sum().backward()
        assert served() == 0
        with torch.no_grad():
            layer(X)
        assert served() == 1
    torch.testing.assert_close(layer.base_layer.weight.grad, X.sum(0).expand(5, 6))


def test_several_adapters_with_dropout_are_pefts():
    model = nn.Sequential(nn.Linear(6, 5))
    options = {"r": 2, "target_modules": ["0"], "lora_dropout": 0.5}
    model = adapted(LoraConfig(**options), LoraConfig(**options), model=model)
    model.base_model.set_adapter(["first", "second"])
    unserved(model.base_model.model[0].train(), lambda layer: layer(X))
    unserved(layer_of(lora_dropout=0.5).train(), lambda layer: layer(X), everything_dropped)


def everything_dropped(layer):
    layer.lora_dropout["first"].p = 1.0


def test_transforms_are_pefts():
    layer = layer_of()
    unserved(layer, lambda layer: torch.func.vmap(layer)(X))

    def tangent(layer):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(X, torch.ones(3, 6)))).tangent

    unserved(layer, tangent)


def test_wrong_inputs_raise_as_in_peft():
    layer = layer_of()
    for x in (torch.randn(3, 7), X.double(), torch.ones(3, 6, dtype=torch.int64)):
        for context in (torch.no_grad, torch.enable_grad):
            with context(), pytest.raises(RuntimeError):
                layer(x)
            with context(), patched(), pytest.raises(RuntimeError):
                layer(x)


def test_exported():
    layer = layer_of()
    with patched():
        program = torch.export.export(layer, (X,))
    assert not any("fastweights" in str(node.target) for node in program.graph.nodes)
    same(program.module()(X), layer(X))


# ---- what patch touches -------------------------------------------------------------------------


def test_patch_and_unpatch():
    unpatch()
    patch()
    ours = Linear.forward
    assert ours is not ORIGINAL and ours.__wrapped__ is ORIGINAL
    patch()
    assert Linear.forward is ours
    with patched():
        assert Linear.forward is ours
    assert Linear.forward is ours
    unpatch()
    assert Linear.forward is ORIGINAL
    with patched():
        assert Linear.forward is not ORIGINAL
    assert Linear.forward is ORIGINAL


def test_copies_of_a_model_are_served():
    layer = layer_of()
    with patched():
        twin = copy.deepcopy(layer)
        same(twin(X), layer(X))
        assert served() == 2


def test_peft_is_not_imported_before_it_is_patched():
    code = (
        "import sys, fastweights.integrations.peft as p\n"
        "assert 'peft' not in sys.modules and 'transformers' not in sys.modules\n"
        "p.unpatch(); assert p.stats() == {'lora_linear': 0}\n"
        "sys.modules['peft'] = None\n"
        "try: p.patch()\n"
        "except ImportError as e: assert 'pip install peft' in str(e)\n"
        "else: raise SystemExit(1)\n"
    )
    subprocess.run([sys.executable, *(["-S"] if sys.flags.no_site else []), "-c", code], check=True)
