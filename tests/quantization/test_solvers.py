"""What every solver shares: the walk over blocks, calibration, interruption, checkpoints."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fastweights import quantize_
from fastweights.functional import dequantize
from fastweights.nn import QuantizedLinear
from fastweights.quantization import AWQ, GPTQ, RoundToNearest, SmoothQuantPlus
from fastweights.quantization.calibrate import Solver
from fastweights.quantization.round_to_nearest import round_to_nearest
from fastweights.quantization.samples import read_samples
from fastweights.quantization.walk import Walk
from tiny_models import SIZES, linear_model, softmax_model, tokenizer

TARGET = {"format": "int4", "group_size": 32, "activation": "float"}
TOKENS = torch.randint(SIZES["vocab_size"], (3, 24), generator=torch.Generator().manual_seed(0))


def same(a, b):
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


class Branches(nn.Module):
    """Two lists of layers, a layer in between, one used twice, a head; inputs by keyword too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(2))
        self.bridge = nn.Linear(32, 48)
        self.decoder = nn.ModuleList(Cross() for _ in range(2))
        self.shared = nn.Linear(48, 48)
        self.head = nn.Linear(48, 8)

    def forward(self, x, gain=1.0):
        for layer in self.encoder:
            x = layer(x)
        memory = self.bridge(x)
        y = torch.relu(memory)
        for layer in self.decoder:
            y = layer(y, memory=memory)
        y = self.shared(torch.tanh(self.shared(y)))
        return self.head(gain * y)


class Cross(nn.Module):
    """A layer with a second argument, which all such layers share."""

    def __init__(self):
        super().__init__()
        self.own, self.other = nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, y, memory):
        return y + torch.tanh(self.own(y) + self.other(memory))


@dataclass(frozen=True)
class Spy(Solver):
    """Notes the inputs of every layer and rounds it."""

    seen: dict

    def solve(self, block, prepared):
        for names in block.shared_inputs():
            for name in names:
                key = f"{block.name}.{name}" if name else block.name
                self.seen[key] = torch.cat(list(block.inputs(name)))
                block.replace(name, round_to_nearest(block.linears[name].weight, **block.target))


def inputs_of(model, samples, kind=QuantizedLinear):
    """By hooks, what the layers of a finished model read."""
    seen = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, kind):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: seen.setdefault(name, []).append(
                        args[0].flatten(0, -2).float().clone()
                    )
                )
            )
    with torch.no_grad():
        for sample in samples:
            sample.run(model)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


class InPlace(nn.Module):
    """Lists of lists, layers that write to their input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleList([Adding(), nn.ModuleDict({"a": Adding(), "b": Adding()})])
            for _ in range(2)
        )

    def forward(self, x):
        x = x.clone()
        for first, others in self.layers:
            x = others["b"](others["a"](first(x)))
        return x


class Adding(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        x += self.down(torch.tanh(self.up(x)))
        return x


class Gained(nn.Module):
    """What lies between two layers depends on the sample."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x if len(x) != 1 else 2 * x)
        return x


CASES = {
    "by sample": (
        Gained,
        [torch.randn(n, 5, 32, generator=torch.Generator().manual_seed(n)) for n in (2, 1, 3)],
    ),
    "in place": (InPlace, torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))),
    "llama": (softmax_model, TOKENS),
    "linear": (linear_model, TOKENS),
    "lists": (Branches, torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))),
    "not chained": (
        lambda: nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48), nn.Linear(48, 8)),
        torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_layers_see_what_the_finished_model_gives(case):
    """However blocks hang together: a solver sees the inputs behind all earlier rounding."""
    make, calibration = CASES[case]
    model, seen = make(), {}
    quantize_(model, **TARGET, solver=Spy(seen), calibration=calibration, progress=False)
    expected = inputs_of(model, read_samples(calibration))
    assert seen.keys() == expected.keys()
    for name in seen:
        if name == "shared":  # its second call is calibrated behind its first as it was
            assert torch.equal(*(t[name].view(3, 2, -1)[:, 0] for t in (seen, expected)))
        else:
            assert torch.equal(seen[name], expected[name]), name


def test_blocks_are_the_entries_of_lists_and_what_is_outside():
    model = Branches()
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    walk = Walk(model, names, read_samples(CASES["lists"][1]), TARGET)
    assert walk.names == [
        "encoder.0", "encoder.1", "bridge", "decoder.0", "decoder.1", "shared", "head",
    ]  # fmt: skip
    groups = [block.shared_inputs() for block in walk.blocks()]
    assert groups[3] == [["own"], ["other"]]
    walk = Walk(softmax_model(), ["model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"],
        read_samples(TOKENS), TARGET)  # fmt: skip
    assert next(walk.blocks()).shared_inputs() == [
        ["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"],
    ]  # fmt: skip


def test_layers_keep_their_own_masks():
    """Qwen2 with one full layer and two sliding ones: each is calibrated under its own mask."""
    model = softmax_model(
        "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1, num_hidden_layers=3
    )
    assert len(set(model.config.layer_types)) == 2
    seen = {}
    quantize_(model, **TARGET, solver=Spy(seen), calibration=TOKENS, progress=False)
    expected = inputs_of(model, read_samples(TOKENS))
    assert all(torch.equal(seen[name], expected[name]) for name in seen)


def test_exact_inputs_are_those_of_the_float_model():
    @dataclass(frozen=True)
    class Compare(Solver):
        seen: dict
        compares = True

        def solve(self, block, prepared):
            block.shared_inputs()
            for name in block.linears:
                self.seen[f"{block.name}.{name}".rstrip(".")] = torch.cat(
                    list(block.exact_inputs(name))
                )
            for name, linear in block.linears.items():
                block.replace(name, round_to_nearest(linear.weight, **block.target))

    for case in ("llama", "lists", "in place", "by sample"):
        make, calibration = CASES[case]
        seen = {}
        quantize_(make(), **TARGET, solver=Compare(seen), calibration=calibration, progress=False)
        expected = inputs_of(make(), read_samples(calibration), nn.Linear)
        for name in seen:
            assert torch.equal(seen[name], expected[name]), name


def batches():
    return [
        TOKENS[:1],
        (TOKENS[1:2],),
        {"input_ids": TOKENS[2:], "attention_mask": torch.ones_like(TOKENS[2:])},
    ]


def test_forms_of_calibration_agree():
    models = []
    for calibration in (TOKENS, batches(), iter(batches())):
        model = softmax_model()
        quantize_(model, **TARGET, solver=GPTQ(), calibration=calibration, progress=False)
        models.append(model)
    assert same(models[0], models[1])
    assert same(models[0], models[2])


def test_texts_become_sequences():
    (sample,) = read_samples(["Some text.", "More of it."], tokenizer())
    assert tokenizer().decode(sample.args[0][0]).startswith("Some text.")
    assert len(read_samples(["abcd" * 300], tokenizer())) == 2
    assert read_samples("abcd" * 300, tokenizer())[0].args[0].shape == (1, 512)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "quantize_: expected calibration with GPTQ, got None"),
        ([], "quantize_: expected calibration with at least one sample, got none"),
        (torch.zeros(0, 8).long(), "quantize_: expected calibration with at least one sample"),
        (torch.arange(8), r"quantize_: expected calibration of shape \[samples, ...\], got \[8\]"),
        (["text"], "quantize_: expected a tokenizer with texts as calibration, got None"),
        (3, "quantize_: expected calibration to be a tensor, texts or batches, got int"),
        ([3], "quantize_: expected every batch of calibration to be a tensor, .* got int"),
    ],
)
def test_bad_calibration(calibration, message):
    with pytest.raises((ValueError, TypeError), match=message):
        quantize_(softmax_model(), solver=GPTQ(), calibration=calibration, progress=False)


class Experts(nn.Module):
    """A router that sends tokens to one of three experts; some get none of a sample."""

    def __init__(self):
        super().__init__()
        self.norm, self.router = nn.LayerNorm(32), nn.Linear(32, 3)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        h = self.norm(x)
        chosen = self.router(h).argmax(-1)
        y = x.clone()
        for i, expert in enumerate(self.experts):
            if bool((chosen == i).any()):
                y[chosen == i] += expert(h[chosen == i])
        return y


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Experts() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "solver", [GPTQ(), GPTQ(asymmetric=0.25), AWQ(steps=2), SmoothQuantPlus(alphas=(0.25, 0.5))]
)
def test_experts_that_get_no_tokens(solver):
    x = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(1))
    model = Routed()
    exact = model(x).detach()
    quantize_(model, "int8", group_size=32, solver=solver, calibration=x, progress=False)
    assert sum(type(m) is QuantizedLinear for m in model.modules()) == 8
    torch.testing.assert_close(model(x), exact, atol=0.05, rtol=0.05)


def test_a_layer_that_is_never_reached():
    model = Branches()
    model.unused = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="expected calibration to reach unused, which it does not"):
        quantize_(model, **TARGET, solver=GPTQ(), calibration=CASES["lists"][1], progress=False)


@dataclass(frozen=True)
class Interrupted(GPTQ):
    """Stops in the middle of a block."""

    at: str = ""

    def solve(self, block, prepared):
        if block.name == self.at:
            name, linear = next(iter(block.linears.items()))
            block.replace(name, round_to_nearest(linear.weight, **block.target))
            block.module.input_layernorm.weight.data = torch.zeros(64)
            raise KeyboardInterrupt
        super().solve(block, prepared)


def test_interrupted_it_leaves_whole_blocks():
    model, before = softmax_model(), softmax_model()
    model.train()
    with pytest.raises(KeyboardInterrupt):
        quantize_(
            model, **TARGET, solver=Interrupted(at="model.layers.1"), calibration=TOKENS,
            progress=False,
        )  # fmt: skip
    assert all(module.training for module in model.modules())
    first, second = model.model.layers
    assert type(first.mlp.up_proj) is QuantizedLinear
    assert same(second, before.model.layers[1])
    # The rest can be done afterwards.
    quantize_(model.eval(), **TARGET, solver=GPTQ(), calibration=TOKENS, progress=False)
    assert same(model, quantized())


def quantized(solver=None, **options):
    return quantize_(
        softmax_model(), **TARGET, solver=solver or GPTQ(), calibration=TOKENS, progress=False,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"static_groups": False}, {"asymmetric": 0.25}])
def test_resumes_from_a_checkpoint(tmp_path, options):
    expected = quantized(GPTQ(**options))
    assert same(quantized(GPTQ(**options), checkpoint=tmp_path), expected)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["model.layers.0.safetensors", "model.layers.1.safetensors",
        "prepared.safetensors"]  # fmt: skip
    (tmp_path / files[1]).unlink()
    stamp = (tmp_path / files[0]).stat().st_mtime_ns
    assert same(quantized(GPTQ(**options), checkpoint=tmp_path), expected)
    assert (tmp_path / files[0]).stat().st_mtime_ns == stamp
    assert (tmp_path / files[1]).exists()


def test_refuses_a_checkpoint_of_another_run(tmp_path):
    quantized(checkpoint=tmp_path)
    for change, what in (
        ({"solver": GPTQ(damping=0.1)}, "solver"),
        ({"group_size": 64}, "group_size"),
        ({"calibration": TOKENS[:2]}, "calibration"),
    ):
        options = {**TARGET, "solver": GPTQ(), "calibration": TOKENS} | change
        with pytest.raises(ValueError, match=f"expected a checkpoint of the same {what}; .* is of"):
            quantize_(softmax_model(), **options, checkpoint=tmp_path, progress=False)
    other = softmax_model()
    other.model.layers[0].mlp.up_proj.weight.data += 1
    with pytest.raises(ValueError, match="expected a checkpoint of the same weights"):
        quantize_(other, **TARGET, solver=GPTQ(), calibration=TOKENS, checkpoint=tmp_path,
            progress=False)  # fmt: skip


def test_refuses_a_damaged_checkpoint(tmp_path):
    quantized(checkpoint=tmp_path)
    path = tmp_path / "model.layers.0.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is not a checkpoint of a solver, or is damaged"):
        quantized(checkpoint=tmp_path)


def test_the_same_bits_for_any_number_of_threads():
    expected = quantized()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert same(quantized(), expected)
    finally:
        torch.set_num_threads(threads)


def test_embeddings_and_tied_layers_stay_with_nearest_rounding():
    model = softmax_model(tie_word_embeddings=True)
    quantize_(model, **TARGET, embedding_format="int8", solver=GPTQ(), calibration=TOKENS,
        progress=False)  # fmt: skip
    assert model.lm_head.format == "int8"
    assert model.lm_head.packed is model.model.embed_tokens.packed
    assert model.model.layers[0].mlp.up_proj.format == "int4"


def test_a_progress_bar_names_the_block(capsys):
    quantize_(softmax_model(), **TARGET, solver=GPTQ(), calibration=TOKENS)
    err = capsys.readouterr().err
    assert "GPTQ: 100%" in err
    assert "model.layers.1" in err


def test_nearest_rounding_needs_no_calibration():
    model = quantize_(softmax_model(), **TARGET, solver=RoundToNearest(), progress=False)
    assert same(model, quantize_(softmax_model(), **TARGET))


@pytest.mark.parametrize("rule", ["minmax", "mse"])
def test_zero_is_a_level(rule):
    w = torch.randn(16, 100, generator=torch.Generator().manual_seed(0)) + 0.5
    w[:, 7], w[3] = 0, 0
    q = dequantize(round_to_nearest(w, "int4", group_size=32, rule=rule))
    torch.testing.assert_close(q[:, 7], torch.zeros(16), atol=2e-3, rtol=0)
    assert q.shape == w.shape
    assert q[3].abs().max() < 1e-3


def snr(w, q):
    return 10 * float((w.square().sum() / (w - q).square().sum()).log10())


@pytest.mark.parametrize(("group_size", "expected"), [(32, 21.86), (64, 20.82), (128, 19.95)])
def test_error_of_the_official_rule(group_size, expected):
    """The sheet's table of errors on N(0, 1)."""
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    plain, mse, search = (
        snr(w, dequantize(round_to_nearest(w, "int4", group_size=group_size, rule=rule)))
        for rule in ("minmax", "mse", "search")
    )
    assert plain == pytest.approx(expected, abs=0.05)
    assert plain < mse < search


def test_eight_bits():
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    for rule in ("minmax", "mse", "search"):
        assert snr(w, dequantize(round_to_nearest(w, "int8", rule=rule))) > 40
    model = quantize_(softmax_model(), "int8", solver=GPTQ(), calibration=TOKENS, progress=False)
    with torch.no_grad():
        assert snr(softmax_model()(TOKENS).logits, model(TOKENS).logits) > 30


def test_bad_rules():
    for call in (lambda: RoundToNearest("best"), lambda: round_to_nearest(torch.eye(4), rule="x")):
        with pytest.raises(ValueError, match=r"expected rule in \['search', 'minmax', 'mse'\]"):
            call()
    with pytest.raises(ValueError, match="expected format in"):
        round_to_nearest(torch.eye(4), "int1", rule="mse")


@pytest.mark.parametrize("rule", ["minmax", "mse", "search"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e7])
@pytest.mark.parametrize("make", [RoundToNearest, lambda rule: GPTQ(rule=rule)])
def test_weights_that_no_scale_fits(make, value, rule):
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].weight.data[5, 7] = value
    with pytest.raises(RuntimeError, match="expected finite w within the range of float16, got"):
        quantize_(model, "int4", solver=make(rule), calibration=torch.eye(32), progress=False)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "solver", [GPTQ(), GPTQ(asymmetric=0.25), AWQ(steps=4), SmoothQuantPlus(alphas=(0.5,))]
)
def test_models_of_other_dtypes(solver, dtype):
    model = copy.deepcopy(softmax_model()).to(dtype)
    with torch.no_grad():
        exact = model(TOKENS).logits
        quantize_(model, "int8", solver=solver, calibration=TOKENS, progress=False)
        found = model(TOKENS).logits
    assert found.dtype == dtype
    assert snr(exact.float(), found.float()) > 24  # rounding to bfloat16 alone costs 30
