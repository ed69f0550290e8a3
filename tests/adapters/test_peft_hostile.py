"""Folders that are not what they say: refused in one line before the model is touched."""

import json
import os
import pickle
import random
import re
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastweights as fw
from adapters.models import model as bare
from adapters.models import shake
from fastweights.adapters import LoRA, PiSSA, adapter_names, load_peft, save_peft
from mutations import mutate

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Q = "base_model.model.layers.0.q_proj"
MUTATIONS = 400


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What a good folder has: its settings and its tensors."""
    folder = tmp_path_factory.mktemp("adapter")
    model = fw.adapt(bare(), LoRA(rank=2, targets=["q_proj", "down"], modules_to_save=["head"]))
    shake(model)
    save_peft(model, folder)
    return json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)


@pytest.fixture
def put(written, tmp_path):
    """Writes that folder with changes."""

    def put(settings=(), tensors=(), without=(), text=None):
        values, own = written
        own = {k: v for k, v in (own | dict(tensors)).items() if k not in without}
        kept = {k: v for k, v in (values | dict(settings)).items() if k not in without}
        (tmp_path / CONFIG).write_text(json.dumps(kept) if text is None else text)
        save_file(own, tmp_path / TENSORS)
        return tmp_path

    return put


def state(model):
    return {
        k: (id(type(model.get_submodule(k.rpartition(".")[0]))), v.clone())
        for k, v in model.state_dict().items()
    }


def refused(folder, match, model=None, **options):
    """One line, the right one, and a model as it was."""
    model = bare() if model is None else model
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=match) as caught:
        load_peft(model, folder, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    after = state(model)
    assert before.keys() == after.keys()
    for key, (kind, value) in before.items():
        assert after[key][0] == kind and torch.equal(after[key][1], value)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_the_good_one_is_read(put):
    assert adapter_names(load_peft(bare(), put())) == ["default"]


# ---- settings -----------------------------------------------------------------------------------

WRONG = {
    "r": ["8", 0, -1, True, 2.0, 1 << 40, None, [8]],
    "lora_alpha": ["8", None, True, [1], float("nan"), float("inf"), 10**400],
    "lora_dropout": [1, 1.5, -0.1, "0", float("nan"), True],
    "target_modules": [7, True, {"q_proj": 1}, [1], [["q_proj"]], ["q" * 5000]],
    "exclude_modules": [7, [None]],
    "layers_to_transform": ["0", [True], [-1], 1.5, [1 << 40]],
    "layers_pattern": [3, [3]],
    "modules_to_save": ["head", [4], {"head": 1}],
    "rank_pattern": [[], {"q_proj": "2"}, {"q_proj": 0}, {"q_proj": True}, {"q_proj": 1 << 40}],
    "alpha_pattern": [None, {"q_proj": None}, {"q_proj": float("inf")}],
    "use_rslora": ["true", 1, None],
    "use_dora": ["", 0],
    "lora_bias": ["no"],
    "bias": ["some", None, True, ["none"]],
    "init_lora_weights": ["pisa", 1, None, ["pissa"], "pissa_niter_", "pissa_niter_99999", {}],
    "peft_type": ["IA3", "lora", None, 1, ["LORA"], {}],
    "task_type": ["anything", 1, ["CAUSAL_LM"]],
    "base_model_name_or_path": [1, ["x"], "x" * 5000],
    "auto_mapping": ["x", [1]],
    "inference_mode": ["yes"],
    "fan_in_fan_out": [1],
}


@pytest.mark.parametrize("key", WRONG)
def test_settings_of_a_wrong_kind(key, put):
    for value in WRONG[key]:
        refused(put({key: value}), rf"{CONFIG}: expected {key} to be .*, got ")


@pytest.mark.parametrize(
    "key, value",
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 1}),
        ("ensure_weight_tying", True),
        ("kasa_config", {"beta": 1}),
        ("layer_replication", [[0, 2]]),
        ("megatron_config", {"x": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("target_parameters", ["experts.down_proj"]),
        ("trainable_token_indices", [1]),
        ("use_bdlora", {"target_modules_bd_a": []}),
        ("use_qalora", True),
        ("velora_config", {"x": 1}),
    ],
)
def test_variants_that_are_not_supported(key, value, put):
    refused(put({key: value}), f"{key} is not supported, got ")


def test_settings_of_a_later_peft(put):
    refused(put({"use_magic": 0.5}), "unknown setting 'use_magic' = 0.5; a later PEFT may have")
    refused(put({"use_magic": "x" * 10000}), "unknown setting 'use_magic'")
    with pytest.warns(UserWarning, match="unknown setting 'use_magic' is left out, which is None"):
        load_peft(bare(), put({"use_magic": None}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_peft(bare(), put({"runtime_config": {"ephemeral_gpu_offload": True}}))


def test_settings_that_do_not_go_together(put):
    refused(put({"target_modules": ".*q_proj", "layers_to_transform": 1}), "expected layers and")
    refused(put({"layers_pattern": "layers"}), "expected layers with layers_pattern")
    refused(put({"use_dora": True, "lora_bias": True}), "expected dora or lora_bias, got both")
    refused(put({"init_lora_weights": "loftq"}), "'loftq' changed the base when it was made")
    for init in ("corda", "lora_ga"):
        refused(put({"init_lora_weights": init}), "took something out of the base")
    refused(put(without=["peft_type"]), "expected peft_type to be 'LORA', got none")


def test_modules_that_are_not_there_or_cannot_be_adapted(put):
    refused(put({"target_modules": ["nothing"]}), "to name modules of Model, found none")
    refused(put({"target_modules": None}), "expected targets for a model of type None")
    refused(put({"modules_to_save": ["nothing"]}), "to name modules of Model, found none")
    refused(put({"target_modules": ["layers"]}), "expected layers to be nn.Linear.*got ModuleList")
    refused(put({"target_modules": ["layers.0"], "init_lora_weights": "pissa"}), "got Block")


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "[a",
        "*",
        "(a+)+$",
        "((a*)b)*",
        r"(\w+\s?)*x",
        "(.*.*.*.*.*.*.*)x",
        "(" * 3000,
        "a{2,1}",
    ],
)
def test_regular_expressions_that_are_none_or_never_end(pattern, put):
    begin = time.perf_counter()
    refused(put({"target_modules": pattern}), "expected target_modules to be ")
    refused(put({"exclude_modules": pattern}), "expected exclude_modules to be ")
    for key in ("rank_pattern", "alpha_pattern"):
        refused(put({key: {pattern: 2}}), f"expected {key} to be ")
    refused(put({"modules_to_save": ["head", pattern]}), "expected modules_to_save to be ")
    refused(
        put({"layers_pattern": pattern, "layers_to_transform": 0}), "expected layers_pattern to be "
    )
    assert time.perf_counter() - begin < 30  # where the pattern runs, it runs for years


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down).*?)"
        r"|(?:\blayers\.[\d]{1,}\.(?:(?:q_proj|down)))",
        r"layers\.(0|[1-9]\d*)\.(q_proj|down)",
        r"^(?!.*head).*\.(q_proj|down)$",
    ],
)
def test_regular_expressions_that_people_use(pattern, put):
    assert adapter_names(load_peft(bare(), put({"target_modules": pattern})))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"LORA"', "\ufeff{}", "[" * 100000, '{"a":' * 100000,
     '{"peft_type": "LORA", "r": 2, "r": 64}', '{"peft_type": "LORA", "x": ' + "9" * 5000 + "}"],
    ids=range(11),
)  # fmt: skip
def test_json_that_is_none(text, put):
    refused(put(text=text), f"{CONFIG}")


def test_json_without_end(put):
    folder = put(text='{"peft_type": "LORA", "x": "' + "x" * (1 << 20) + '"}')
    refused(folder, "is damaged: expected at most 1048576 bytes")


def test_bytes_that_are_no_text(put):
    folder = put()
    (folder / CONFIG).write_bytes(b'{"peft_type": "\xff\xfe"}')
    refused(folder, "is damaged")


# ---- tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", [f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", "base_model.model.head.bias"]
)
def test_tensors_that_do_not_fit(key, put, written):
    good = written[1][key]
    name = re.escape(key.removeprefix("base_model.model."))
    for shape in (
        [*good.shape, 1],
        [],
        [0],
        [good.shape[0], 0],
        [3, *good.shape[1:]],
        [1 << 20, 0],
    ):
        refused(put(tensors={key: torch.zeros(shape)}), rf"expected {name} of shape .*, got ")
    for dtype in (torch.int64, torch.uint8, torch.bool):
        refused(put(tensors={key: good.to(dtype)}), rf"expected {name} to be floating-point numb")
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = good.clone()
        broken.view(-1)[-1] = bad
        refused(put(tensors={key: broken}), rf"{name} has values that are not finite")
    large = good.double()
    large.view(-1)[0] = 1e300
    refused(put(tensors={key: large}), rf"{name} has values that are not finite")
    refused(put(without=[key]), rf"lacks 1 tensors, the first is {name}")
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        load_peft(bare(), put(tensors={key: good.to(dtype)}))


def test_tensors_that_have_no_place(put, written):
    extra = torch.zeros(2)
    for key in ("lora_A.weight", f"{Q}.lora_C.weight", f"{Q}.lora_A.default.weight", "head.extra",
                f"{Q}.weight", f"{Q}.base_layer.weight", f"{Q}.base_layer.bias", "x" * 300,
                "../../etc/passwd", f"{Q}.lora_magnitude_vector"):  # fmt: skip
        refused(put(tensors={key: extra}), "has an unknown tensor")
    a = f"{Q}.lora_A.weight"
    short = a.removeprefix("base_model.model.")
    refused(
        put(tensors={short: written[1][a].clone()}), "twice, with base_model.model. and without"
    )


def test_a_rank_that_the_tensors_do_not_have(put):
    """Nothing of that size is made."""
    for settings in ({"r": 1 << 20}, {"rank_pattern": {"q_proj": 1 << 20}}):
        refused(put(settings), r"of shape \[1048576, 32\]|of shape \[1048576, 64\]")
    refused(put({"r": 64, "init_lora_weights": "pissa"}), "expected a rank up to 32 and alpha > 0")
    refused(
        put({"lora_alpha": 0, "init_lora_weights": "olora"}), "expected a rank up to .*alpha > 0"
    )


def test_truncated_and_other_files(put):
    folder = put()
    data = (folder / TENSORS).read_bytes()
    for damaged in (
        b"",
        data[:7],
        data[:100],
        data[:-1],
        b"\xff" * 100,
        data + b"x",
        pickle.dumps(1),
    ):
        (folder / TENSORS).write_bytes(damaged)
        refused(folder, f"{TENSORS} is truncated or damaged")
    os.remove(folder / TENSORS)
    refused(folder, f"has neither {TENSORS} nor {PICKLE}")


class Runs:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_run_nothing(put, written):
    folder = put()
    os.remove(folder / TENSORS)
    key = f"{Q}.lora_A.weight"
    for value in (
        Runs(folder / "trace"),
        {key: Runs(folder / "trace")},
        nn.Linear(2, 2),
        [1],
        {1: torch.zeros(1)},
        {key: 3},
        {key: [torch.zeros(1)]},
        {key: torch.zeros(2, 32).to_sparse()},
        {key: torch.zeros(1).expand(1 << 40, 1 << 20)},
        {key: torch.empty(2, 32, device="meta")},
        {key: torch.zeros(2, 32, dtype=torch.complex64)},
    ):
        torch.save(value, folder / PICKLE)
        refused(folder, f"{PICKLE}")
    for data in (b"", b"x", pickle.dumps(Runs(folder / "trace")), pickle.dumps({key: 1})):
        (folder / PICKLE).write_bytes(data)
        refused(folder, f"{PICKLE}")
    assert not (folder / "trace").exists()
    torch.save(written[1], folder / PICKLE)
    load_peft(bare(), folder)


# ---- folders ------------------------------------------------------------------------------------


def test_paths_that_lead_elsewhere(put, tmp_path):
    elsewhere = put()
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    for subfolder in ("..", "../..", "sub/../..", str(elsewhere), "/etc", ""):
        refused(inside, "expected a subfolder of|has no adapter_config.json", subfolder=subfolder)
    refused(inside, "expected a folder, got", subfolder="nothing")
    refused(tmp_path / "nothing", "expected a folder, got")
    refused(elsewhere / CONFIG, "expected a folder, got")
    for name in ("..", "a.b", "", "training", "forward"):
        refused(elsewhere, "expected a name without dots", name=name)
    refused(inside, "expected a subfolder of", name=str(elsewhere))
    (inside / "linked").symlink_to(elsewhere)
    refused(inside, "expected a subfolder of", subfolder="linked")
    refused(inside, "expected a subfolder of", name="linked")


@pytest.mark.parametrize("name", [CONFIG, TENSORS, PICKLE])
def test_links_that_lead_elsewhere(name, put, tmp_path, tmp_path_factory):
    folder, other = put(), tmp_path_factory.mktemp("other")
    if name == PICKLE:
        os.rename(folder / TENSORS, other / "file")
    else:
        os.rename(folder / name, other / "file")
    for target in (
        other / "file",
        "/dev/zero",
        "/etc/passwd",
        other,
        other / "nothing",
        folder / name,
    ):
        if os.path.lexists(folder / name):
            os.remove(folder / name)
        (folder / name).symlink_to(target)
        refused(folder, "to be a file within its folder|cannot be read")


def test_what_is_no_file(put):
    folder = put()
    os.remove(folder / TENSORS)
    os.mkfifo(folder / TENSORS)
    refused(folder, "to be a file within its folder")
    os.remove(folder / TENSORS)
    (folder / TENSORS).mkdir()
    refused(folder, "to be a file within its folder")


def test_the_cache_of_hugging_face_is_all_links(put, tmp_path_factory):
    folder, cache = put(), tmp_path_factory.mktemp("models--x--y")
    (cache / "blobs").mkdir()
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in (CONFIG, TENSORS):
        os.rename(folder / name, cache / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert adapter_names(load_peft(bare(), snapshot)) == ["default"]


def test_other_adapters_stay_as_they_were(put):
    model = fw.adapt(bare(), LoRA(rank=3, targets=["up"]), name="first")
    refused(put({"r": 5}), "of shape", model, name="second")
    refused(put(), "expected a name other than", model, name="first")
    assert adapter_names(model) == ["first"] and model.layers[0].up.active == ("first",)
    load_peft(model, put(), name="second")
    assert adapter_names(model) == ["second", "first"]


def test_what_cannot_be_written(tmp_path):
    model = fw.adapt(bare(), LoRA(), name="a/b")
    with pytest.raises(ValueError, match="expected a name that a folder can have, got 'a/b'"):
        save_peft(model, tmp_path, name="a/b")
    with pytest.raises(ValueError, match="expected names of adapters in"):
        save_peft(model, tmp_path)
    with pytest.raises(ValueError, match="expected an adapter that changed the base, got 'a'"):
        save_peft(fw.adapt(bare(), LoRA(), name="a"), tmp_path, name="a", residual=True)
    with pytest.raises(ValueError, match="expected residual=True for 'default', which has DoRA"):
        save_peft(fw.adapt(bare(), PiSSA(rank=2, targets=["up"], dora=True)), tmp_path)
    assert not list(tmp_path.iterdir())


# ---- chance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [CONFIG, TENSORS, PICKLE])
def test_random_damage(which, put, written):
    """Read, or refused by one line; nothing else."""
    folder = put()
    if which == PICKLE:
        os.remove(folder / TENSORS)
        torch.save(written[1], folder / PICKLE)
    good = (folder / which).read_bytes()
    header = {CONFIG: len(good), TENSORS: 900, PICKLE: len(good)}[which]
    draw, model, read = random.Random(3), bare(), 0
    names = iter(range(10 * MUTATIONS))
    for _ in range(MUTATIONS if which != PICKLE else MUTATIONS // 2):
        (folder / which).write_bytes(mutate(good, draw, header))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_peft(model, folder, name=f"n{next(names)}")
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith(("load_peft: ", "load: "))
        else:
            read += 1
            model = bare()
    assert 0 < read < MUTATIONS * 0.8
