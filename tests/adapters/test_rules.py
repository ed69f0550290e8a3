"""Which modules are adapted: every rule, and beside PEFT."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import fastweights as fw
from fastweights.adapters import LoRA, adapter_layers
from fastweights.adapters.rules import is_selected, pattern_value, saved_paths, selected_paths
from tiny_models import softmax_model

from .models import model

PATHS = [
    "q_proj", "proj", "model.q_proj", "model.my_q_proj", "model.layers.0.attn.q_proj",
    "model.layers.1.attn.q_proj", "model.layers.1.mlp.up", "model.layers.11.experts.1.q_proj",
    "h.1.attn.c_attn", "blocks.3.1.q_proj", "score", "score.dense", "underscore", "default",
]  # fmt: skip
RULES = [
    {"targets": "q_proj"},
    {"targets": r".*\.(q_proj|up)"},
    {"targets": ["q_proj"]},
    {"targets": ["proj"]},
    {"targets": ["q_proj", "up"], "exclude": ["layers.1.mlp.up", "model.q_proj"]},
    {"targets": ".*q_proj", "exclude": r".*layers\.1\..*"},
    {"targets": ["q_proj", "c_attn"], "layers": 1},
    {"targets": ["q_proj", "c_attn"], "layers": [1, 3]},
    {"targets": ["q_proj", "c_attn"], "layers": []},
    {"targets": ["q_proj", "model.layers.0.attn.q_proj"], "layers": [1]},
    {"targets": ["q_proj", "c_attn"], "layers": [1], "layers_pattern": "h"},
    {"targets": ["q_proj", "c_attn"], "layers": [0, 1], "layers_pattern": ["blocks", "layers"]},
    {"targets": ["score", "dense", "q_proj"], "modules_to_save": ["score"]},
]
PEFTS = {
    "targets": "target_modules", "exclude": "exclude_modules", "layers": "layers_to_transform",
    "layers_pattern": "layers_pattern", "modules_to_save": "modules_to_save",
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_paths_are_those_of_peft(rule):
    config = LoraConfig(**{PEFTS[key]: value for key, value in rule.items()})
    ours = [path for path in PATHS if is_selected(path, LoRA(**rule))]
    assert ours == [path for path in PATHS if check_target_module_exists(config, path)]


def test_a_name_is_a_whole_segment():
    assert is_selected("a.q_proj", LoRA(targets=["q_proj"]))
    assert not is_selected("a.q_proj", LoRA(targets=["proj"]))
    assert not is_selected("a.q_proj", LoRA(targets="q_proj"))


def test_the_layer_is_the_first_number():
    rule = LoRA(targets=["up"], layers=[1])
    assert is_selected("m.layers.1.experts.0.up", rule)
    assert not is_selected("m.layers.0.experts.1.up", rule)
    assert not is_selected("m.up", rule)


def test_the_first_pattern_that_fits_counts():
    patterns = {"q_proj": 4, r"layers\.0\..*": 2, "k_proj": 3}
    assert pattern_value("m.layers.0.q_proj", patterns, 8) == 4
    assert pattern_value("m.layers.0.k_proj", patterns, 8) == 2
    assert pattern_value("m.layers.1.k_proj", patterns, 8) == 3
    assert pattern_value("m.layers.1.my_q_proj", patterns, 8) == 8


def test_ranks_and_scales_by_pattern_are_those_of_peft():
    options = {"rank_pattern": {"up": 3, "layers.1.q_proj": 5}, "alpha_pattern": {"q_proj": 2}}
    for rslora in (False, True):
        ours = fw.adapt(model(), LoRA(targets=["q_proj", "up"], alpha=4, rslora=rslora, **options))
        config = LoraConfig(
            target_modules=["q_proj", "up"], lora_alpha=4, use_rslora=rslora, **options
        )
        theirs = LoraModel(model(), config, "default").model
        for layer, other in zip(adapter_layers(ours), find(theirs), strict=True):
            assert layer.lora_A["default"].shape == other.lora_A["default"].weight.shape
            assert layer.scaling["default"] == other.scaling["default"]


def find(adapted):
    return [m for m in adapted.modules() if hasattr(m, "lora_A")]


@pytest.mark.parametrize("make", [softmax_model, model], ids=["transformers", "torch"])
def test_all_linear_is_that_of_peft(make):
    config = LoraConfig(target_modules="All-Linear")
    theirs = LoraModel(make(), config, "default").model
    names = [name for name, m in theirs.named_modules() if hasattr(m, "lora_A")]
    assert selected_paths(make(), LoRA()) == names
    adapted = fw.adapt(make(), LoRA(rank=2))
    assert selected_paths(adapted, LoRA(targets="ALL-LINEAR")) == names


def test_all_linear_leaves_out_the_head_of_a_classifier():
    small = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    bert = BertForSequenceClassification(BertConfig(num_hidden_layers=1, **small))
    assert selected_paths(bert, LoRA())[-1] == "bert.pooler.dense"
    assert selected_paths(bert, LoRA(targets=None)) == [
        f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "value")
    ]


def test_all_linear_counts_quantized_layers():
    adapted = fw.quantize_(model(), "int8", group_size=32, skip=())
    assert "layers.0.q_proj" in selected_paths(adapted, LoRA())


def test_attention_of_torch_never_calls_its_projection():
    attention = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    assert selected_paths(attention, LoRA()) == ["up"]
    with pytest.raises(TypeError, match=r"expected mha\.out_proj to be nn.Linear"):
        fw.adapt(attention, LoRA(targets=["out_proj"]))


def test_a_shared_module_is_adapted_once():
    shared = nn.Linear(4, 4)
    twice = fw.adapt(nn.ModuleDict({"a": shared, "b": shared}), LoRA(rank=2))
    assert twice["a"] is twice["b"]
    assert twice["a"].base_layer is shared


def test_saved_modules_are_found_by_name():
    assert saved_paths(model(), LoRA(modules_to_save=["head"])) == ["head"]
    with pytest.raises(ValueError, match=r"modules_to_save=\['ead'\] to name modules of Model"):
        saved_paths(model(), LoRA(modules_to_save=["ead"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "x", "layers": [0]}, "LoRA: expected layers and layers_pattern with targets"),
        ({"targets": "x", "layers_pattern": "h"}, "LoRA: expected layers and layers_pattern with"),
        ({"targets": ["x"], "layers_pattern": "h"}, "expected layers with layers_pattern, got non"),
        ({"modules_to_save": "head"}, "expected modules_to_save to be a sequence"),
        ({"rank": 0}, "LoRA: expected rank >= 1, got 0"),
        ({"rank_pattern": {"up": -1}}, "LoRA: expected rank >= 1, got -1"),
        ({"dropout": 1.0}, "LoRA: expected 0 <= dropout < 1, got 1.0"),
        ({"bias": "some"}, "LoRA: expected bias in .* got 'some'"),
        ({"init": "zeros"}, "LoRA: expected init in .* got 'zeros'"),
        ({"dora": True, "lora_bias": True}, "LoRA: expected dora or lora_bias, got both"),
    ],
)
def test_rules_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**options)


def test_nothing_found_is_an_error():
    with pytest.raises(ValueError, match=r"expected targets=\['x'\] to name modules of Model"):
        fw.adapt(model(), LoRA(targets=["x"]))
    with pytest.raises(ValueError, match="expected targets for a model of type None, got None"):
        fw.adapt(model(), LoRA(targets=None))
    with pytest.raises(TypeError, match=r"expected layers\.0 to be nn.Linear, Conv1D of transf"):
        fw.adapt(model(), LoRA(targets=r"layers\.0"))
    assert torch.is_tensor(model()(torch.ones(1, 32)))
