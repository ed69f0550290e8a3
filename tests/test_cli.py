"""The command line, end to end on a tiny model."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fastweights as fw
from fastweights.cli import main, parser
from tiny_models import softmax_model, tokenizer

TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. " * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """original/ and text.txt, and what the first two commands make of them."""
    root = tmp_path_factory.mktemp("cli")
    model = softmax_model()
    model.save_pretrained(root / "original")
    tokenizer().save_pretrained(root / "original")
    (root / "text.txt").write_text(TEXT)
    arguments = ["--text", str(root / "text.txt"), "--minutes", "0.002", "--window", "4"]
    arguments += ["--length", "64"]
    out = ["--out", str(root / "linear"), "--json", str(root / "report.json")]
    assert main(["linearize", str(root / "original"), *out, *arguments]) == 0
    quantize = ["quantize", str(root / "linear"), "--out", str(root / "int4"), "--group-size", "32"]
    assert main(quantize) == 0
    return root


def test_linearize_writes_a_model_and_a_report(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["recipe"]["name"] == "stable"
    assert report["recipe"]["window"] == 4
    assert set(report["stages"]) == {"transfer_attention", "recover"}
    for stage in report["stages"].values():
        assert stage["steps"] == len(stage["losses"]) >= 1
    assert not (folder / "linear" / "checkpoints").exists()
    fw.load(folder / "linear")


def test_quantize_makes_it_smaller(folder: Path) -> None:
    def size(name: str) -> int:
        return sum(f.stat().st_size for f in (folder / name).glob("*.safetensors"))

    assert size("int4") < size("linear") / 2


@pytest.mark.parametrize("solver", ["gptq", "awq", "smoothquant+"])
def test_quantize_calibrates(folder: Path, tmp_path: Path, solver: str) -> None:
    command = ["quantize", str(folder / "linear"), "--out", str(tmp_path / "out")]
    command += ["--group-size", "32", "--checkpoint", str(tmp_path / "checkpoint")]
    assert main([*command, "--solver", solver, "--text", str(folder / "text.txt")]) == 0
    assert len(list((tmp_path / "checkpoint").glob("model.layers.*"))) == 2
    plain, calibrated = (fw.load(path)[0] for path in (folder / "int4", tmp_path / "out"))
    assert plain.lm_head.packed.equal(calibrated.lm_head.packed)
    layers = [model.model.layers[0].mlp.down_proj.packed for model in (plain, calibrated)]
    assert not layers[0].equal(layers[1])


def test_generate_streams_to_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(folder / "int4"), "--max-new-tokens", "8"]
    assert main([*command, "The quick"]) == 0
    one = capsys.readouterr()
    assert "tokens/s" in one.err
    model, words = fw.load(folder / "int4")
    assert one.out == f"{fw.generate(model, 'The quick', tokenizer=words, max_new_tokens=8)}\n"
    assert main([*command, "The quick", "brown"]) == 0
    assert capsys.readouterr().out.startswith(f"The quick{one.out}")
    assert main([*command, "--chat", "The quick"]) == 0
    chat = fw.generate(model, "[user] The quick\n", tokenizer=words, max_new_tokens=8)
    assert capsys.readouterr().out == f"{chat}\n"


def test_a_saved_state_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = str(folder / "prompt.state")
    command = ["generate", str(folder / "int4"), "--max-new-tokens"]
    assert main([*command, "0", "The quick", "--save-state", state]) == 0
    assert main([*command, "8", " brown", "--load-state", state]) == 0
    resumed = capsys.readouterr().out
    assert main([*command, "8", "The quick brown"]) == 0
    assert resumed == capsys.readouterr().out
    assert main([*command, "3", "The quick", "--save-state", state]) == 0
    assert main([*command, "3", "--load-state", state]) == 0


def test_perplexity(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "short.txt").write_text(TEXT[:600])
    command = ["perplexity", str(folder / "linear"), "--text", str(folder / "short.txt")]
    assert main(command) == 0
    assert 1 < float(capsys.readouterr().out) < 96**2
    assert main([*command, "--by-position"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["0-512"]


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """What `finetune` makes of original/ over 4 bits."""
    out = folder / "adapter"
    command = ["finetune", str(folder / "original"), "--text", str(folder / "text.txt")]
    command += ["--base", "nf4", "--rank", "4", "--steps", "6", "--length", "32", "--lr", "0.02"]
    assert main([*command, "--evaluate-every", "4", "--out", str(out)]) == 0
    return out


def test_finetune_writes_an_adapter_and_what_it_did(adapter: Path) -> None:
    assert sorted(file.name for file in adapter.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "training.json",
    ]  # fmt: skip
    report = json.loads((adapter / "training.json").read_text())
    assert report["base"] == "nf4" and report["rank"] == 4 and report["steps"] == 6
    assert len(report["losses"]) == 6 and list(report["held_out"]) == ["0", "4", "6"]
    assert report["held_out"]["6"] < report["held_out"]["0"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(adapter.parent / "original")
    assert config["task_type"] == "CAUSAL_LM"


def test_an_adapter_of_finetune_is_used_over_its_base(
    folder: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "held_out.txt").write_text(TEXT[:200])
    original, base = str(folder / "original"), ["--base", "nf4"]
    measure = ["perplexity", original, "--text", str(folder / "held_out.txt"), "--length", "64"]

    def measured(*arguments: str) -> float:
        assert main([*measure, *arguments]) == 0
        return float(capsys.readouterr().out)

    plain, quantized = measured(), measured(*base)
    assert plain == measured("--base", "float32") != quantized
    assert measured(*base, "--adapter", str(adapter)) < 0.95 * quantized
    model, words = fw.load(folder / "original")
    fw.adapters.load_peft(fw.quantize_(model, "nf4"), adapter)
    expected = fw.generate(model, "The quick", tokenizer=words, max_new_tokens=8)
    write = ["generate", original, "The quick", "--max-new-tokens", "8", "--adapter", str(adapter)]
    assert main([*write, *base]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_peft_opens_an_adapter_of_finetune(folder: Path, adapter: Path) -> None:
    from peft import PeftModel

    ours, theirs = (fw.load(folder / "original")[0] for _ in range(2))
    fw.adapters.load_peft(ours, adapter)
    theirs = PeftModel.from_pretrained(theirs, adapter)
    tokens = torch.arange(2, 34)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_finetune_goes_on_where_ctrl_c_stopped_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["finetune", str(folder / "original"), "--text", str(folder / "text.txt")]
    command += ["--rank", "2", "--steps", "5", "--length", "16", "--precision", "float32"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0

    original, calls = torch.optim.AdamW.step, []

    def step(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([*command, "--out", str(tmp_path / "cut")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert [file.name for file in (tmp_path / "cut").iterdir()] == ["checkpoint"]
    assert main([*command, "--out", str(tmp_path / "cut")]) == 0
    assert len(calls) == 5
    whole, cut = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")
    )
    assert whole == cut


@pytest.mark.parametrize("method", ["dora", "pissa"])
def test_finetune_knows_other_methods(folder: Path, tmp_path: Path, method: str) -> None:
    command = ["finetune", str(folder / "original"), "--text", str(folder / "text.txt")]
    command += ["--adapter", method, "--base", "bfloat16", "--rank", "2", "--steps", "1"]
    command += ["--held-out", str(folder / "text.txt"), "--length", "16", "--dropout", "0.1"]
    command += ["--optimizer", "adamw8bit", "--lora-plus", "4", "--recompute", "--alpha", "4"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    model, _ = fw.load(folder / "original")
    fw.adapters.load_peft(model, tmp_path)
    layer = model.model.layers[0].self_attn.q_proj
    assert len(layer.lora_A["default"]) == (2 if method == "dora" else 4)
    assert ("default" in layer.lora_magnitude_vector) == (method == "dora")


def test_info_lists_the_ops(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "cpu level" in out
    assert "quantized_linear" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("linearize {0}/nothing --out {0}/x", "found nothing at"),
        ("linearize {0}/text.txt --out {0}/x", ""),
        ("linearize {0}/linear --out {0}/x --minutes 0", "converted already"),
        ("linearize {0}/original --out {0}/text.txt", "cannot write into"),
        ("linearize {0}/original --out {0}/x --text {0}/nothing", "expected a text file"),
        ("linearize {0}/original --out {0}/x --minutes -1", "expected --minutes"),
        ("quantize {0}/linear --out {0}/linear", "another folder"),
        (
            "quantize {0}/linear --out {0}/x --text {0}/text.txt",
            "with another --solver",
        ),
        ("generate {0}/original", "expected a PROMPT"),
        ("generate {0}/original a b --save-state {0}/x", "expected one PROMPT"),
        ("generate {0}/original a --save-state {0}/x", "all linear"),
        ("generate {0}/int4 a --load-state {0}/text.txt", "state text.txt: cannot be read"),
        ("generate {0}/int4 a --top-p 3 --temperature 1", "expected 0 < top_p <= 1"),
        ("perplexity {0} --text {0}/text.txt", "config.json"),
        ("perplexity {0}/original --text {0}/text.txt --adapter {0}/nothing", "an adapter folder"),
        ("generate {0}/original a --adapter {0}/original", "adapter_config.json"),
        ("finetune {0}/nothing --text {0}/text.txt --out {0}/y", "found nothing at"),
        ("finetune {0}/original --text {0}/text.txt --out {0}/original", "another folder"),
        ("finetune {0}/original --text {0}/nothing --out {0}/y", "expected a text file"),
        ("finetune {0}/original --text {0}/text.txt --out {0}/y --rank 0", "expected rank >= 1"),
        (
            "finetune {0}/original --text {0}/text.txt --out {0}/y --steps 0 --length 16",
            "expected steps > 0",
        ),
        (
            "finetune {0}/original --text {0}/text.txt --out {0}/y --adapter pissa --base int4",
            "expected a float --base",
        ),
        (
            "finetune {0}/original --text {0}/text.txt --out {0}/y --length 1000",
            "held-out tokens",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    words = [word.format(folder) for word in arguments.split()]
    assert main(words) == 2
    *progress, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastweights {words[0]}: ")
    assert message in line
    assert not any("Traceback" in text for text in progress)


def test_an_unsupported_architecture_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        folder / "gpt2"
    )
    tokenizer().save_pretrained(folder / "gpt2")
    assert main(["linearize", str(folder / "gpt2"), "--out", str(folder / "x")]) == 2
    assert "GPT2LMHeadModel" in capsys.readouterr().err.splitlines()[-1]


def test_unknown_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["info", "what"], ["generate", "DIR", "--what"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["", "linearize", "quantize", "finetune", "generate", "perplexity", "bench", "info"]
)
def test_help_reads_well(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parser().parse_args([*([command] if command else []), "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: fastweights")
    assert "None" not in text
