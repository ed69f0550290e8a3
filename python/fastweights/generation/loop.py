"""`generate` and `prefill`: prompts in, tokens and text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastweights.generation.compiled import engine_for
from fastweights.generation.engine import Engine
from fastweights.generation.sampling import Sampler
from fastweights.generation.state import GenerationState, fingerprint
from fastweights.generation.text import TextStream

Prompt: TypeAlias = "str | Sequence[int] | Tensor"
Prompts: TypeAlias = "Prompt | Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor]"

# Tokens per forward call of a prompt: large enough for full-speed matrix products, small enough
# that a call's activations stay in the cache.
CHUNK = 512


@dataclass
class Generation:
    """One finished row.

    Attributes:
        ids: the tokens generated, without the prompt and without a stop token.
        text: the same as text, cut before a stop string; "" without a tokenizer.
        reason: why it ended: "stop" or "length".
        state: with `return_state`, what the model remembers of prompt and answer.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: Literal["stop", "length"] = "length"
    state: GenerationState | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Piece:
    """What one step adds to one row.

    Attributes:
        row: index of the prompt.
        id: the token.
        text: the text that the token settles: often a word, sometimes nothing; "" without a
            tokenizer.
    """

    row: int
    id: int
    text: str

    def __str__(self) -> str:
        return self.text


def generate(
    model: nn.Module,
    prompts: Prompts,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | str | Sequence[int | str] | None = None,
    stream: bool = False,
    seed: int | None = None,
    state: GenerationState | None = None,
    return_state: bool = False,
    chunk: int = CHUNK,
) -> Generation | list[Generation] | Iterator[Piece]:
    """Continue prompts with a causal language model.

    Prompts are read in parallel, `chunk` tokens at a time; then every step reads one token per row.
    On a model made by `linearize` a step costs the same time and memory whatever the length of the
    context, and no tensor grows; if it is quantized too, a step is a single op, `decode_step`. Any
    other Hugging Face model runs with its own cache.

    Args:
        model: a causal language model; it runs in inference mode and without dropout.
        prompts: one prompt or a list of them: text, token ids, or an int64 tensor `[T]`; an int64
            tensor `[B, T]` is B prompts. Lengths may differ.
        tokenizer: turns text into ids and back. None takes `model.tokenizer` if there is one;
            prompts must then be ids.
        max_new_tokens: most tokens per row, >= 0.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits /
            temperature).
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the likeliest tokens that together have this probability, 0 < top_p <= 1.
        stop: token ids and strings that end a row; None takes the model's end-of-sequence tokens,
            () none.
        stream: return an iterator of `Piece`s, as they are made, instead of the finished rows.
        seed: of the draws; row r of a batch draws the same whatever the other rows are. None:
            torch's generator decides.
        state: from `prefill`: every prompt continues it, and it stays as it is. A prompt may then
            be empty.
        return_state: also return the state after the last token; for one prompt, without `stream`.
        chunk: tokens per forward call of a prompt.

    Returns:
        A `Generation` for one prompt, a list for several; an iterator with `stream`.

    Raises:
        ValueError: an argument out of its range, text without a tokenizer, an empty prompt, a state
            of another model.

    Example:
        >>> import fastweights as fw
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
        >>> layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, **layers))
        >>> len(fw.generate(model, [1, 2, 3], max_new_tokens=5, stop=()).ids)
        5
    """
    if max_new_tokens < 0:
        raise ValueError(f"generate: expected max_new_tokens >= 0, got {max_new_tokens}")
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    single, ids = _encode("generate", prompts, tokenizer, continues=state is not None)
    if return_state and (stream or len(ids) != 1):
        raise ValueError("generate: expected one prompt and no stream with return_state")
    stop_ids, stop_strings = _stops(model, stop)
    if stop_strings and tokenizer is None:
        raise ValueError("generate: expected a tokenizer, since stop holds strings, got None")
    sampler = Sampler(len(ids), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    rows = [Generation() for _ in ids]
    texts = [None if tokenizer is None else TextStream(tokenizer, stop_strings) for _ in ids]
    engine = _engine("generate", model, chunk, state)
    pieces = _loop(model, engine, ids, rows, texts, sampler, max_new_tokens, stop_ids)
    if stream:
        return pieces
    for _ in pieces:
        pass
    if return_state:
        with _evaluation(model), torch.inference_mode():
            rows[0].state = _state_after(engine, rows[0], reached=_tokens(state) + len(ids[0]))
    return rows[0] if single else rows


def prefill(
    model: nn.Module,
    prompt: Prompt,
    *,
    tokenizer: Any = None,
    state: GenerationState | None = None,
    chunk: int = CHUNK,
) -> GenerationState:
    """Read a prompt once; `generate(..., state=...)` continues it any number of times, at once.

    Args:
        model: a linearised model.
        prompt: text, token ids or an int64 tensor `[T]`.
        tokenizer: turns text into ids; None takes `model.tokenizer`.
        state: what comes before the prompt, from another `prefill`; it stays as it is.
        chunk: tokens per forward call.

    Returns:
        A state of constant size: `state.save(path)` writes it, `load_state(model, path)` reads it.

    Raises:
        ValueError: an empty prompt, text without a tokenizer, or a model with softmax layers.
    """
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    single, ids = _encode("prefill", prompt, tokenizer, continues=state is not None)
    if not single:
        raise ValueError(f"prefill: expected one prompt, got {len(ids)}")
    engine = _engine("prefill", model, chunk, state)
    with _evaluation(model), torch.inference_mode():
        engine.read(ids)
        return engine.state().select([0])


def load_state(model: nn.Module, path: str | PathLike[str]) -> GenerationState:
    """Read a state that `GenerationState.save` wrote for this model.

    The file is checked and never trusted.

    Raises:
        ValueError: no state file, a damaged one, or the state of another model.
    """
    return prefill(model, [0]).restore(path)


def _loop(
    model: nn.Module,
    engine: Engine,
    prompts: list[Tensor],
    rows: list[Generation],
    texts: list[TextStream | None],
    sampler: Sampler,
    max_new_tokens: int,
    stop_ids: frozenset[int],
) -> Iterator[Piece]:
    """Generates into `rows`, yielding every piece.

    Modes of torch are left while the caller has control.
    """
    running, step = set(range(len(rows))), 0
    with _evaluation(model):
        with torch.inference_mode():
            tokens = sampler(engine.read(prompts))
        while running and step < max_new_tokens:
            if step:
                with torch.inference_mode():
                    tokens = sampler(engine.step(tokens))
            step += 1
            for row, token in enumerate(tokens.tolist()):
                if row in running:
                    last = step == max_new_tokens
                    yield _take(row, token, rows[row], texts[row], last, token in stop_ids)
                    if rows[row].reason == "stop":
                        running.discard(row)


def _state_after(engine: Engine, row: Generation, *, reached: int) -> GenerationState:
    """The state after all of `row`, whose last token has not been read if nothing followed it."""
    if int(engine.state().tokens) < reached + len(row.ids):
        engine.step(torch.tensor(row.ids[-1:]))
    return engine.state().select([0])


def _tokens(state: GenerationState | None) -> int:
    return 0 if state is None else int(state.tokens)


def _take(
    row: int, token: int, out: Generation, text: TextStream | None, last: bool, stop: bool
) -> Piece:
    """Adds a token to a row; `stop` says that it ends the row, `last` that none may follow."""
    piece = ""
    if not stop:
        out.ids.append(token)
        piece = "" if text is None else text.push(token)
    if stop or (text is not None and text.stopped):
        out.reason = "stop"
    if text is not None:
        if last or out.reason == "stop":
            piece += text.finish()
        out.text = text.text
    return Piece(row, token, piece)


def _engine(op: str, model: nn.Module, chunk: int, state: GenerationState | None) -> Engine:
    if chunk < 1:
        raise ValueError(f"{op}: expected chunk >= 1, got {chunk}")
    if state is not None and len(state.tokens) != 1:
        raise ValueError(f"{op}: expected a state of one row, got {len(state.tokens)}")
    if state is not None and state.model != fingerprint(model):
        raise ValueError(f"{op}: expected a state of this model, got one of another model")
    return engine_for(model, chunk=chunk, start=state)


def _encode(
    op: str, prompts: Prompts, tokenizer: Any, *, continues: bool
) -> tuple[bool, list[Tensor]]:
    """Whether a single prompt came, and the prompts as int64 vectors."""
    if isinstance(prompts, Tensor):
        single = prompts.dim() == 1
        listed: list[Any] = [prompts] if single else list(prompts)
    else:
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        listed = [prompts] if single or len(prompts) == 0 else list(prompts)
        single = single or len(prompts) == 0
    return single, [_ids(op, prompt, tokenizer, continues) for prompt in listed]


def _ids(op: str, prompt: Any, tokenizer: Any, continues: bool) -> Tensor:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{op}: expected a tokenizer, since a prompt is text, got None")
        prompt = tokenizer(prompt, add_special_tokens=not continues)["input_ids"] if prompt else []
    ids = torch.as_tensor(prompt if len(prompt) else torch.empty(0, dtype=torch.int64))
    if ids.dim() != 1 or ids.is_floating_point():
        raise ValueError(
            f"{op}: expected prompts as text or integer vectors [T], got shape {list(ids.shape)}"
        )
    if len(ids) == 0 and not continues:
        raise ValueError(f"{op}: expected a prompt of at least one token, got none")
    return ids.to(torch.int64)


def _stops(
    model: nn.Module, stop: int | str | Sequence[int | str] | None
) -> tuple[frozenset[int], list[str]]:
    if stop is None:
        config = getattr(model, "generation_config", None)
        eos = getattr(config, "eos_token_id", None)
        stop = [] if eos is None else eos
    items = [stop] if isinstance(stop, int | str) else list(stop)
    return frozenset(s for s in items if isinstance(s, int)), [
        s for s in items if isinstance(s, str) and s
    ]


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
