"""Adapters that PEFT writes are read here with the same logits, and the other way round."""

import json
import os
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import fastweights as fw
from adapters.models import shake
from adapters.test_peft_patch import gpt2, tokens
from fastweights.adapters import (
    CorDA,
    LoRA,
    OLoRA,
    PiSSA,
    activate,
    adapter_configs,
    adapter_names,
    combine,
    disabled,
    load_peft,
    save_peft,
)
from tiny_models import softmax_model

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Convolutions(nn.Module):
    """1, 2 and 3 dimensions, groups, an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.one = nn.Conv1d(4, 6, 3, padding=1)
        self.two = nn.Conv2d(1, 4, (3, 1), padding=(1, 0))
        self.three = nn.Conv3d(4, 4, (1, 2, 1), groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, ids):
        x = self.one(self.embed(ids).transpose(1, 2))
        x = self.three(self.two(x.unsqueeze(1)).unsqueeze(-1)).squeeze(-1).mean(1)
        return self.head(x.mean(-1).repeat(1, 2)[:, :6] if x.shape[1] < 6 else x.mean(-1))


def convolutions():
    torch.manual_seed(0)
    return Convolutions().eval()


BASES = {"qwen2": lambda: softmax_model("qwen2"), "gpt2": gpt2, "convolutions": convolutions}

Q = ["q_proj", "v_proj", "down_proj"]
CASES = {  # base, what PEFT is told
    "plain": ("qwen2", {"target_modules": Q}),
    "regex": ("qwen2", {"target_modules": r".*\.layers\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)"}),
    "all-linear": ("qwen2", {"target_modules": "all-linear"}),
    "rslora": ("qwen2", {"target_modules": Q, "use_rslora": True}),
    "dora": ("qwen2", {"target_modules": Q, "use_dora": True}),
    "dora conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "lora_bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "lora_only": ("qwen2", {"target_modules": Q, "bias": "lora_only"}),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "layers": (
        "qwen2",
        {"target_modules": Q, "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "excluded": ("qwen2", {"target_modules": Q, "exclude_modules": ["layers.0.mlp.down_proj"]}),
    "patterns": (
        "qwen2",
        {
            "target_modules": Q,
            "rank_pattern": {"v_proj": 2, r"layers\.0\..*down_proj": 3},
            "alpha_pattern": {"down_proj": 3, r"^model\.layers\.1\.self_attn\.q_proj": 1},
        },
    ),
    "embeddings": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "output embeddings": ("qwen2", {"target_modules": ["embed_tokens", "lm_head"]}),
    "whole modules": (
        "qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
    ),
    "whole modules by their ends": (
        "qwen2",
        {"target_modules": ["q_proj"], "modules_to_save": ["head", "norm"]},
    ),
    "whole embeddings": ("gpt2", {"target_modules": ["c_fc"], "modules_to_save": ["wte", "wpe"]}),
    "whole modules and biases": (
        "gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"], "bias": "all"},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "convolutions": ("convolutions", {"target_modules": ["embed", "one", "two", "three", "head"]}),
    "dora of all kinds": (
        "convolutions", {"target_modules": ["embed", "one", "two", "head"], "use_dora": True},
    ),
    "gaussian": ("qwen2", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("qwen2", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "pissa": ("qwen2", {"target_modules": Q, "init_lora_weights": "pissa"}),
    "pissa conv1d": ("gpt2", {"target_modules": ["c_attn"], "init_lora_weights": "pissa"}),
    "olora": ("qwen2", {"target_modules": Q, "init_lora_weights": "olora", "use_rslora": True}),
}  # fmt: skip
REPRODUCED = ("pissa", "olora")


def quiet(call, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


def moved(model, name="default"):
    """Trained, as far as anything is trained."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def theirs(base, r=4, name="default", model=None, **options):
    config = LoraConfig(r=r, lora_alpha=6, **options)
    if model is None:
        model = quiet(get_peft_model, BASES[base](), config, name)
    else:
        quiet(model.add_adapter, name, config)
        model.set_adapter(name)
    return moved(model).eval()


def inputs(base):
    return tokens(2, 8) % (20 if base == "convolutions" else 96)


@torch.no_grad()
def logits(model, base="qwen2"):
    y = model(inputs(base))
    return y if isinstance(y, torch.Tensor) else y.logits


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


# ---- one adapter --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_theirs_read_here_and_written_again(case, tmp_path):
    base, options = CASES[case]
    model = theirs(base, **options)
    expected = logits(model, base)
    assert not torch.allclose(expected, logits(BASES[base](), base), atol=1e-3)
    quiet(model.save_pretrained, tmp_path / "theirs")
    ours = load_peft(BASES[base](), tmp_path / "theirs")
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    same(logits(ours, base), expected)

    residual = case.split()[0] in REPRODUCED
    save_peft(
        ours,
        tmp_path / "ours",
        residual=residual,
        embeddings=case in ("embeddings", "output embeddings"),
    )
    tensors, again = (load_file(tmp_path / who / TENSORS) for who in ("theirs", "ours"))
    unread = {k for k in tensors if ".modules_to_save." in k or ".original_module." in k}
    assert bool(unread) == (case == "whole modules and biases")
    assert again.keys() == tensors.keys() - unread
    for key, tensor in again.items():
        assert torch.equal(tensor, tensors[key])
    with safe_open(tmp_path / "ours" / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    back = quiet(PeftModel.from_pretrained, BASES[base](), tmp_path / "ours").eval()
    same(logits(back, base), expected)


@pytest.mark.parametrize("case", CASES)
def test_the_config_is_written_to_the_letter(case, tmp_path):
    base, options = CASES[case]
    quiet(theirs(base, **options).save_pretrained, tmp_path / "theirs")
    ours = load_peft(BASES[base](), tmp_path / "theirs")
    save_peft(ours, tmp_path / "ours", residual=case.split()[0] in REPRODUCED)
    text = (tmp_path / "ours" / CONFIG).read_text()
    got, expected = json.loads(text), json.loads((tmp_path / "theirs" / CONFIG).read_text())
    assert text == json.dumps(got, indent=2, sort_keys=True)
    for key in ("target_modules", "exclude_modules"):  # sets in PEFT
        for config in (got, expected):
            if isinstance(config[key], list):
                config[key] = sorted(config[key])
    if case == "orthogonal":
        expected["init_lora_weights"] = True  # a way to begin, of which nothing is left
    if case == "whole modules by their ends":
        whole = set(got["modules_to_save"])
        assert (
            len(whole) == 6 and {"lm_head", "model.norm", "model.layers.0.input_layernorm"} < whole
        )
        expected["modules_to_save"] = got["modules_to_save"]
    if case == "dora conv1d":
        expected["fan_in_fan_out"] = got["fan_in_fan_out"]
    assert got == expected


OURS = {
    "plain": ("qwen2", LoRA(rank=4, alpha=6, targets=Q)),
    "all-linear": ("qwen2", LoRA(rank=3)),
    "customary": ("qwen2", LoRA(rank=3, targets=None, rslora=True)),
    "regex": ("qwen2", LoRA(targets=r".*layers\.0\..*up_proj")),
    "dora": ("qwen2", LoRA(rank=4, targets=Q, dora=True)),
    "sorted patterns": (
        "qwen2",
        LoRA(targets=Q, rank_pattern={"v_proj": 2, "_proj": 3}, alpha_pattern={"q_proj": 2.5}),
    ),
    "embeddings": ("qwen2", LoRA(rank=4, targets=["embed_tokens", "lm_head"])),
    "whole modules": ("qwen2", LoRA(rank=4, targets=Q, modules_to_save=["lm_head"])),
    # PEFT would take ln_f, ln_1 and ln_2 for endings of the texts, were they written as they are.
    "whole modules by segment": ("gpt2", LoRA(targets=["c_fc"], modules_to_save=["h.0.ln_1", "f"])),
    "biases": ("qwen2", LoRA(rank=4, targets=["k_proj"], bias="all", lora_bias=True)),
    "lora_only": ("qwen2", LoRA(rank=4, targets=["k_proj"], bias="lora_only")),
    "conv1d": ("gpt2", LoRA(rank=4, targets=["c_attn", "c_proj"])),
    "convolutions": ("convolutions", LoRA(targets=["embed", "one", "two", "three", "head"])),
    "half": ("qwen2", LoRA(rank=4, targets=Q, dtype=torch.bfloat16)),
    "pissa": ("qwen2", PiSSA(rank=4, targets=Q)),
    "pissa rslora": ("gpt2", PiSSA(rank=4, targets=["c_attn"], rslora=True)),
    "pissa patterns": (
        "qwen2",
        PiSSA(
            rank=4, targets=Q, rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 9}
        ),
    ),
    "olora": ("qwen2", OLoRA(rank=4, alpha=2, targets=Q)),
    "corda": ("qwen2", CorDA(rank=4, targets=["q_proj"], mode="kpm")),
}  # fmt: skip


def adapted(case, name="default"):
    base, config = OURS[case]
    if case == "whole modules by segment":
        config = LoRA(targets=["c_fc"], modules_to_save=["transformer.h.0.ln_1"])
    calibration = [{"input_ids": tokens(2, 8)}] if case == "corda" else None
    model = fw.adapt(BASES[base](), config, name=name, calibration=calibration)
    return base, moved(model).eval()


@pytest.mark.parametrize("case", OURS)
def test_ours_read_there_and_here(case, tmp_path):
    base, model = adapted(case)
    expected = logits(model, base)
    assert not torch.allclose(expected, logits(BASES[base](), base), atol=1e-3)
    save_peft(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, TENSORS]
    torch.testing.assert_close(logits(model, base), expected, rtol=0, atol=0)  # nothing moved
    there = quiet(PeftModel.from_pretrained, BASES[base](), tmp_path).eval()
    if case == "half":
        expected = logits(model.float(), base)
    same(logits(there, base), expected)
    here = load_peft(BASES[base](), tmp_path, trainable=True)
    same(logits(here, base), expected)
    assert any(p.requires_grad for p in here.parameters())


@pytest.mark.parametrize("case", ["pissa", "pissa rslora", "olora"])
def test_a_residual_is_taken_again(case, tmp_path):
    base, model = adapted(case)
    save_peft(model, tmp_path, residual=True)
    rank = load_file(tmp_path / TENSORS).popitem()[1].shape
    assert 4 in rank
    there = quiet(PeftModel.from_pretrained, BASES[base](), tmp_path).eval()
    same(logits(there, base), logits(model, base))
    same(logits(load_peft(BASES[base](), tmp_path), base), logits(model, base))


def test_a_changed_scale_is_written(tmp_path):
    base, model = adapted("plain")
    layers = [m for m in model.modules() if hasattr(m, "set_scale")]
    layers[0].set_scale("default", 0.3)
    layers[-1].set_scale("default", -2)
    save_peft(model, tmp_path)
    same(logits(load_peft(BASES[base](), tmp_path)), logits(model))
    same(logits(quiet(PeftModel.from_pretrained, BASES[base](), tmp_path).eval()), logits(model))


def test_what_is_written_about_the_model(tmp_path):
    _, model = adapted("plain")
    save_peft(model, tmp_path, base_model="some/base", task_type="CAUSAL_LM")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["auto_mapping"] is None
    there = quiet(PeftModel.from_pretrained, softmax_model("qwen2"), tmp_path)
    assert type(there).__name__ == "PeftModelForCausalLM"


# ---- what an adapter took out of the base -------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "pissa_niter_4"])
@pytest.mark.parametrize("rslora", [False, True])
def test_with_the_initial_adapter_it_is_plain(init, rslora, tmp_path):
    """PEFT's own conversion, and ours from the same two folders."""
    options = {"target_modules": Q, "init_lora_weights": init, "use_rslora": rslora}
    model = softmax_model("qwen2")
    config = LoraConfig(r=4, lora_alpha=6, **options)
    if init == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        quiet(preprocess_corda, model, config, run_model=lambda: model(tokens(1, 8)))
    model = quiet(get_peft_model, model, config)
    model.peft_config["default"].init_lora_weights = True
    quiet(model.save_pretrained, tmp_path / "initial")
    moved(model).eval()
    expected = logits(model)
    quiet(
        model.save_pretrained,
        tmp_path / "converted",
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    model.peft_config["default"].init_lora_weights = init
    model.peft_config["default"].r, model.peft_config["default"].lora_alpha = 4, 6
    quiet(model.save_pretrained, tmp_path / "trained")
    same(logits(load_peft(softmax_model("qwen2"), tmp_path / "converted")), expected)
    plain = load_peft(softmax_model("qwen2"), tmp_path / "trained", initial=tmp_path / "initial")
    same(logits(plain), expected)
    assert type(adapter_configs(plain)["default"]) is LoRA
    with disabled(plain):
        assert torch.equal(logits(plain), logits(softmax_model("qwen2")))
    if init == "corda":
        with pytest.raises(ValueError, match=r"took something out of the base.*`initial`"):
            load_peft(softmax_model("qwen2"), tmp_path / "trained")
    if init == "pissa_niter_4":
        with pytest.warns(UserWarning, match="randomised decomposition"):
            load_peft(softmax_model("qwen2"), tmp_path / "trained")


def test_an_initial_adapter_has_to_fit(tmp_path):
    for folder, rank, alpha in (("a", 4, 6), ("b", 3, 6), ("c", 4, 5)):
        save_peft(fw.adapt(BASES["qwen2"](), LoRA(rank=rank, alpha=alpha)), tmp_path / folder)
    for folder, what in (("b", "rank"), ("c", "alpha")):
        with pytest.raises(ValueError, match=f"expected the {what} of"):
            load_peft(BASES["qwen2"](), tmp_path / "a", initial=tmp_path / folder)


# ---- several adapters ---------------------------------------------------------------------------


def test_two_named_adapters_of_theirs(tmp_path):
    model = theirs("qwen2", name="first", target_modules=Q)
    model = theirs("qwen2", name="second", model=model, r=2, target_modules=["q_proj", "up_proj"])
    quiet(model.save_pretrained, tmp_path)
    ours = load_peft(softmax_model("qwen2"), tmp_path, name="first")
    load_peft(ours, tmp_path, name="other", subfolder="second")
    assert adapter_names(ours) == ["first", "other"]
    for there, here in (
        (["first"], "first"),
        (["second"], "other"),
        (["first", "second"], ["first", "other"]),
    ):
        model.base_model.set_adapter(there)
        activate(ours, here)
        same(logits(ours), logits(model))
    save_peft(ours, tmp_path / "again", name="other")
    again = load_file(tmp_path / "again" / "other" / TENSORS)
    for key, tensor in load_file(tmp_path / "second" / TENSORS).items():
        assert torch.equal(again[key], tensor)


def test_two_named_adapters_of_ours(tmp_path):
    ours = fw.adapt(softmax_model("qwen2"), LoRA(rank=4, targets=Q), name="weight")
    fw.adapt(ours, LoRA(rank=2, alpha=3, targets=["q_proj", "lm_head"]), name="model")
    fw.adapt(ours, LoRA(rank=3), name="default")
    for name in ("weight", "model", "default"):
        shake(ours, name)
        save_peft(ours, tmp_path, name=name)
    here = softmax_model("qwen2")
    for name in ("default", "weight", "model"):
        load_peft(here, tmp_path, name=name)
        activate(ours, name)
        same(logits(here), logits(ours))
    same(
        logits(load_peft(softmax_model("qwen2"), tmp_path, name="any", subfolder="model")),
        logits(ours),
    )
    there = quiet(PeftModel.from_pretrained, softmax_model("qwen2"), tmp_path / "weight", "one")
    quiet(there.load_adapter, tmp_path / "model", "two")
    for names, theirs_ in (
        (["weight"], ["one"]),
        (["model"], ["two"]),
        (["weight", "model"], ["one", "two"]),
    ):
        activate(ours, names)
        there.base_model.set_adapter(theirs_)
        same(logits(ours), logits(there.eval()))


KINDS = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 0.5},
    "ties_svd": {"density": 0.5},
    "magnitude_prune": {"density": 0.6},
    "magnitude_prune_svd": {"density": 0.6},
    "dare_linear": {"density": 0.7},
    "dare_ties": {"density": 0.7},
    "dare_linear_svd": {"density": 0.7},
    "dare_ties_svd": {"density": 0.7},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_combination_of_each_kind(kind, tmp_path):
    """Made there, here of the same, and read crosswise."""
    model = theirs("qwen2", name="one", target_modules=Q)
    model = theirs("qwen2", name="two", model=model, target_modules=Q, use_rslora=True)
    quiet(model.save_pretrained, tmp_path)
    model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "both", kind, **KINDS[kind])
    model.set_adapter("both")
    ours = load_peft(load_peft(softmax_model("qwen2"), tmp_path, name="one"), tmp_path, name="two")
    combine(ours, {"one": 0.7, "two": -0.4}, name="both", kind=kind, **KINDS[kind])
    activate(ours, "both")
    if "dare" not in kind:
        same(logits(ours), logits(model))
    quiet(model.save_pretrained, tmp_path / "there", selected_adapters=["both"])
    same(logits(load_peft(softmax_model("qwen2"), tmp_path / "there", name="both")), logits(model))
    save_peft(ours, tmp_path / "here", name="both")
    there = quiet(PeftModel.from_pretrained, softmax_model("qwen2"), tmp_path / "here" / "both")
    same(logits(there.eval()), logits(ours))


# ---- other ways to write the same ---------------------------------------------------------------


def test_keys_without_the_prefix_and_pickled_tensors(tmp_path):
    model = theirs("qwen2", target_modules=Q)
    quiet(model.save_pretrained, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    os.remove(tmp_path / TENSORS)
    short = {k.removeprefix("base_model.model."): v for k, v in tensors.items()}
    for stored in (tensors, short):
        torch.save(stored, tmp_path / "adapter_model.bin")
        same(logits(load_peft(softmax_model("qwen2"), tmp_path)), logits(model))


def test_only_what_is_in_the_file_counts(tmp_path):
    """All but peft_type has a default."""
    tensors = get_peft_model_state_dict(theirs("qwen2", r=8, target_modules=["q_proj", "v_proj"]))
    save_peft(fw.adapt(softmax_model("qwen2"), LoRA(targets=None)), tmp_path)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    ours = load_peft(softmax_model("qwen2"), tmp_path)
    there = quiet(PeftModel.from_pretrained, softmax_model("qwen2"), tmp_path).eval()
    same(logits(ours), logits(there))


def test_over_a_quantized_base(tmp_path):
    quiet(theirs("qwen2", target_modules=Q).save_pretrained, tmp_path)
    model = fw.quantize_(softmax_model("qwen2"), "int8", group_size=32)
    exact = logits(load_peft(softmax_model("qwen2"), tmp_path))
    got = logits(load_peft(model, tmp_path))
    assert (got - exact).norm() / exact.norm() < 0.05
    quiet(
        theirs("qwen2", target_modules=Q, init_lora_weights="pissa").save_pretrained,
        tmp_path / "residual",
    )
    with pytest.raises(ValueError, match=r"load_peft: .* expected a float layer to take the start"):
        load_peft(model, tmp_path / "residual", name="second")
    assert adapter_names(model) == ["default"]
