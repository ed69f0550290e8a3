"""The command line, end to end on a tiny model: linearize, quantize, generate, perplexity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
    "command", ["", "linearize", "quantize", "generate", "perplexity", "bench", "info"]
)
def test_help_reads_well(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parser().parse_args([*([command] if command else []), "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: fastweights")
    assert "None" not in text
