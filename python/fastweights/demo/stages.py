"""The stages of the demo and of the report, each done once and kept."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastweights import linearize, load, recover, save, transfer_attention
from fastweights._cli.quantize import quantize_for_decoding
from fastweights.demo.model import Text, drift, is_linear, perplexities, smollm2
from fastweights.demo.results import Results
from fastweights.demo.speed import measure
from fastweights.quantization import GPTQ
from fastweights.training.precision import resolve_precision

# Minutes of training in the demo, which together with everything else takes 15 on two cores.
TRANSFER_MINUTES, RECOVER_MINUTES = 2.0, 4.0

# Twice the default: 1.02 times the original's perplexity at T=512 instead of 1.11 times.
WINDOW = 128

OURS = (128, 1024, 8192, 32768)
THEIRS = (128, 1024, 8192)
_QUESTION = "Explain in three sentences what a mutex is and when a program needs one."


class Interrupted(Exception):
    """Ctrl-C ended a training; what it reached is kept."""


class Pipeline:
    """Models, texts and results of one run.

    Args:
        folder: where models and results are kept between runs.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.original, self.text = folder / "original", folder / "text.safetensors"
        self.results = Results(folder / "results.json")

    def demo(self) -> None:
        """The main job and its figures."""
        stage, path = self.results.stage, self.folder
        stage("prepare", self._prepare)
        stage("original", lambda: self._measured(self.original))
        stage("transfer", lambda: self._train(self.original, path / "transferred", _transfer))
        stage("after transfer", lambda: self._measured(path / "transferred"))
        stage("recover", lambda: self._train(path / "transferred", path / "recovered", _recover))
        stage("after LoRA", lambda: self._measured(path / "recovered"))
        stage("quantize", lambda: self._quantize(path / "recovered", path / "int4"))
        stage("after 4 bits", lambda: self._measured(path / "int4"))
        stage("speed of ours", lambda: measure(path / "int4", self.text, OURS))
        stage("speed of transformers", lambda: measure(self.original, self.text, THEIRS))
        stage("sample", lambda: _answer(path / "int4"))

    def report(self) -> None:
        """The demo, and what tells recovery from what merely looks like it."""
        self.demo()
        stage, path, original = self.results.stage, self.folder, self.original
        if resolve_precision("auto") == "bfloat16":
            bf16 = partial(measure, self.original, self.text, THEIRS, dtype="bfloat16")
            stage("speed of transformers, bfloat16", bf16)
        if importlib.util.find_spec("xllamacpp"):
            stage("speed of llama.cpp", self._llama_cpp)
        stage("drift", lambda: self._drift(path / "recovered"))
        stage("swapped", lambda: self._control(_linear))
        stage("window only", lambda: self._control(_window_only))
        # The same steps as in the demo, not the same minutes.
        transfer, recover = self._again("transfer", _transfer), self._again("recover", _recover)
        for name, change in (("window only", _window_only), ("original", _unchanged)):
            folder = path / f"{name} with LoRA".replace(" ", "-")
            stage(
                f"{name}, recover",
                lambda folder=folder, change=change: self._train(original, folder, recover, change),
            )
            stage(
                f"{name} after LoRA",
                lambda folder=folder, change=change: self._measured(folder, change=change),
            )
        published = path / "published-transferred"
        stage("published, transfer", lambda: self._train(original, published, transfer, _published))
        stage("published after transfer", lambda: self._measured(published))
        done = path / "published"
        stage("published, recover", lambda: self._train(published, done, recover))
        stage("published after LoRA", lambda: self._measured(done))

    def _again(self, name: str, training: Callable[..., Any]) -> Callable[..., Any]:
        """`training` for as many steps as the stage `name` took."""
        return partial(training, steps=self.results.get(name)["steps"], minutes=None)

    def _prepare(self) -> dict[str, int]:
        """The model as a folder, which opens faster than its GGUF file, and the text as tokens."""
        model, tokenizer = load(smollm2(), dequantize=True)
        save(model, tokenizer, self.original)
        text = Text.of(tokenizer)
        text.save(self.text)
        return {"training tokens": len(text.train), "held-out tokens": len(text.held_out)}

    def _measured(
        self, source: Path, *, change: Callable[[Any], Any] | None = None
    ) -> dict[str, float]:
        model, _ = load(source)
        if change is not None:
            model = change(model)
        return perplexities(model, Text.load(self.text).held_out)

    def _llama_cpp(self) -> dict[str, dict[str, float]]:
        return measure(smollm2(), self.text, THEIRS, runner="fastweights.demo.llama_cpp")

    def _drift(self, source: Path) -> dict[str, float]:
        return drift(load(source)[0], Text.load(self.text).held_out)

    def _control(self, change: Callable[[Any], Any]) -> dict[str, float]:
        return self._measured(self.original, change=change)

    def _train(
        self,
        source: Path,
        target: Path,
        training: Callable[..., Any],
        change: Callable[[Any], Any] | None = None,
    ) -> dict[str, Any]:
        """Loads `source`, which `change` prepares unless it is converted, trains and saves it."""
        model, tokenizer = load(source)
        if not is_linear(model):
            model = (change or _linear)(model)
        checkpoint = target.with_suffix(".checkpoint")
        log = training(model, Text.load(self.text).train, checkpoint=checkpoint)
        if log.interrupted:
            raise Interrupted
        save(model, tokenizer, target)
        checkpoint.unlink()
        return {"steps": log.steps, "tokens": log.tokens, "losses": log.losses}

    def _quantize(self, source: Path, target: Path) -> dict[str, float]:
        model, tokenizer = load(source)
        # The file's weights lie on a 4-bit grid of groups of 32: what LoRA left alone stays exact.
        text = Text.load(self.text).train
        quantize_for_decoding(model, group_size=32, solver=GPTQ(), calibration=text)
        save(model, tokenizer, target)
        return {"MB": sum(f.stat().st_size for f in target.glob("*.safetensors")) / 1e6}


def _transfer(
    model: Any, tokens: Any, minutes: float | None = TRANSFER_MINUTES, **options: Any
) -> Any:
    return transfer_attention(model, tokens, minutes=minutes, **options)


def _recover(
    model: Any, tokens: Any, minutes: float | None = RECOVER_MINUTES, **options: Any
) -> Any:
    return recover(model, tokens, minutes=minutes, **options)


def _linear(model: Any) -> Any:
    return linearize(model, window=WINDOW)


def _published(model: Any) -> Any:
    return linearize(model, "lolcats")


def _unchanged(model: Any) -> Any:
    return model


def _window_only(model: Any) -> Any:
    """The same weights under softmax over the window alone: Mistral is Llama with one."""
    from transformers import MistralConfig, MistralForCausalLM

    values = model.config.to_dict()
    values.pop("model_type")
    values.pop("architectures", None)
    changed = MistralForCausalLM(MistralConfig(**values | {"sliding_window": WINDOW}))
    changed.load_state_dict(model.state_dict())
    return changed.eval()


def _answer(source: Path) -> dict[str, str]:
    from fastweights.generation import generate

    model, tokenizer = load(source)
    messages = [{"role": "user", "content": _QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    answer = generate(model, prompt, tokenizer=tokenizer, max_new_tokens=96)
    return {"question": _QUESTION, "answer": str(answer)}
