"""`generate` on softmax, linearised and quantized models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastweights as fw
from fastweights.generation.compiled import CompiledEngine, NotCompilable, Program, engine_for
from fastweights.generation.engine import ModuleEngine
from tiny_models import linear_model, quantized_model, softmax_model, tokenizer

PROMPT = [5, 9, 3, 17, 40, 2, 66]
RAGGED = [[3], PROMPT, [8, 9, 10], [60, 61, 62], list(range(2, 21))]


def test_greedy_is_what_hugging_face_generates() -> None:
    model = softmax_model()
    expected = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=9, do_sample=False, eos_token_id=None
    )
    assert (
        fw.generate(model, PROMPT, max_new_tokens=9, stop=()).ids
        == expected[0, len(PROMPT) :].tolist()
    )


@pytest.mark.parametrize("make", [softmax_model, linear_model, quantized_model])
def test_ragged_batches_equal_their_rows(make: Any) -> None:
    model = make()
    together = fw.generate(model, RAGGED, max_new_tokens=10, stop=())
    alone = [fw.generate(model, prompt, max_new_tokens=10, stop=()) for prompt in RAGGED]
    assert [row.ids for row in together] == [row.ids for row in alone]


@pytest.mark.parametrize("recipe", ["stable", "lolcats", "hedgehog"])
def test_reading_in_chunks_and_by_steps_is_reading_at_once(recipe: str) -> None:
    model = linear_model(recipe)
    tokens = torch.arange(2, 33)
    with torch.inference_mode():
        expected = model(tokens[None]).logits[0, -1]
        for chunk in (1, 5, 64):
            logits = ModuleEngine(model, chunk=chunk).read([tokens])[0]
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("recipe", ["stable", "lolcats"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_compiled_decoder_is_the_model(recipe: str, kind: str, tied: bool) -> None:
    # Activations in float: rounded to int8, a difference in the last bit may become one of a code.
    model = quantized_model(recipe, kind, activation="float", tie_word_embeddings=tied)
    prompts = [torch.tensor(prompt) for prompt in RAGGED]
    with torch.inference_mode():
        engine = engine_for(model, chunk=64, start=None)
        assert isinstance(engine, CompiledEngine)
        plain = ModuleEngine(model, chunk=64)
        torch.testing.assert_close(engine.read(prompts), plain.read(prompts))
        for token in range(2, 14):
            tokens = torch.full((len(RAGGED),), token)
            got, expected = engine.step(tokens), plain.step(tokens)
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
        for got, expected in zip(engine.state().layers, plain.state().layers, strict=True):
            torch.testing.assert_close(got.S, expected.S, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(got.k, expected.k, atol=1e-3, rtol=1e-3)
            assert torch.equal(got.position, expected.position)


@pytest.mark.parametrize("make", [softmax_model, linear_model, lambda: quantized_model("hedgehog")])
def test_other_models_run_as_modules(make: Any) -> None:
    model = make()
    with pytest.raises(NotCompilable):
        Program(model)
    assert type(engine_for(model, chunk=64, start=None)) is ModuleEngine


def test_a_model_that_computes_something_else_is_not_compiled() -> None:
    model = quantized_model()
    layer = model.model.layers[0]
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: 3 * forward(x)
    assert type(engine_for(model, chunk=64, start=None)) is ModuleEngine


@pytest.mark.parametrize("make", [linear_model, quantized_model])
def test_the_state_does_not_grow(make: Any) -> None:
    model = make()
    short = fw.prefill(model, list(range(2, 12)))
    long = fw.prefill(model, [2 + i % 90 for i in range(60)])
    assert [t.shape for t in short.tensors().values()] == [t.shape for t in long.tensors().values()]


@pytest.mark.parametrize("make", [linear_model, quantized_model, lambda: linear_model("hedgehog")])
def test_a_prompt_read_once_is_continued_any_number_of_times(make: Any) -> None:
    model = make()
    state = fw.prefill(model, PROMPT)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    for rest in ([7, 8], [30]):
        expected = fw.generate(model, PROMPT + rest, max_new_tokens=8, stop=())
        assert fw.generate(model, rest, state=state, max_new_tokens=8, stop=()).ids == expected.ids
    expected = fw.generate(model, PROMPT, max_new_tokens=8, stop=())
    assert (
        fw.generate(model, [[], []], state=state, max_new_tokens=8, stop=())[1].ids == expected.ids
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())


def test_a_conversation_goes_on_from_the_state_of_its_answer() -> None:
    model = quantized_model()
    first = fw.generate(model, PROMPT, max_new_tokens=6, stop=(), return_state=True)
    said = PROMPT + first.ids
    assert first.state is not None
    assert first.state.tokens.tolist() == [len(said)]
    expected = fw.generate(model, [*said, 11, 12], max_new_tokens=5, stop=())
    assert (
        fw.generate(model, [11, 12], state=first.state, max_new_tokens=5, stop=()).ids
        == expected.ids
    )


def test_stop_tokens_end_a_row_and_are_not_part_of_it() -> None:
    model = linear_model()
    free = fw.generate(model, RAGGED, max_new_tokens=12, stop=())
    end = free[1].ids[4]
    rows = fw.generate(model, RAGGED, max_new_tokens=12, stop=end)
    for row, reference in zip(rows, free, strict=True):
        cut = reference.ids.index(end) if end in reference.ids else 12
        assert row.ids == reference.ids[:cut]
        assert row.reason == ("stop" if cut < 12 else "length")


def test_the_models_own_end_token_is_the_default() -> None:
    model = linear_model()
    ids = fw.generate(model, PROMPT, max_new_tokens=12, stop=()).ids
    model.generation_config.eos_token_id = [ids[5], 1]
    assert fw.generate(model, PROMPT, max_new_tokens=12).ids == ids[: ids.index(ids[5])]


def test_streaming_gives_the_same_text_in_pieces() -> None:
    model, words = linear_model(), tokenizer()
    options = {"tokenizer": words, "max_new_tokens": 15, "temperature": 1.0, "seed": 4, "stop": ()}
    whole = fw.generate(model, ["Hello", "wor"], **options)
    pieces = list(fw.generate(model, ["Hello", "wor"], stream=True, **options))
    for row, result in enumerate(whole):
        assert "".join(p.text for p in pieces if p.row == row) == result.text == str(result)
        assert [p.id for p in pieces if p.row == row] == result.ids
    assert words.decode(whole[0].ids, skip_special_tokens=True) == whole[0].text


def test_a_stop_string_cuts_the_text() -> None:
    model, words = linear_model(), tokenizer()
    text = fw.generate(model, "Hello", tokenizer=words, max_new_tokens=15, stop=()).text
    end = text[6:8]
    cut = fw.generate(model, "Hello", tokenizer=words, max_new_tokens=15, stop=[end])
    assert cut.text == text[: text.index(end)]
    assert cut.reason == "stop"


def test_modes_are_left_between_pieces_and_restored() -> None:
    model = linear_model().train()
    for _ in fw.generate(model, PROMPT, max_new_tokens=2, stop=(), stream=True):
        assert not torch.is_inference_mode_enabled()
    assert model.training


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompts": "text"}, "expected a tokenizer"),
        ({"prompts": []}, "at least one token"),
        ({"prompts": [[1], []]}, "at least one token"),
        ({"prompts": torch.zeros(1, 2, 2, dtype=torch.int64)}, "integer vectors"),
        ({"prompts": [1], "max_new_tokens": -1}, "max_new_tokens >= 0"),
        ({"prompts": [1], "chunk": 0}, "chunk >= 1"),
        ({"prompts": [1], "stop": "x"}, "since stop holds strings"),
        ({"prompts": [[1], [2]], "return_state": True}, "expected one prompt"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"generate: expected.*{message}|generate: .*{message}"):
        fw.generate(linear_model(), **arguments)


def test_a_softmax_layer_has_no_state_to_keep() -> None:
    with pytest.raises(ValueError, match="all linear"):
        fw.prefill(softmax_model(), PROMPT)
