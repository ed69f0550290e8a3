"""`fastweights generate`: text from a model."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any, cast

from fastweights._cli.base import add_adapter, open_adapted
from fastweights._cli.terminal import existing, say

if TYPE_CHECKING:
    from fastweights.generation.loop import Generation
    from fastweights.generation.state import GenerationState


def add_parser(commands: Any) -> None:
    """Adds the command."""
    p = commands.add_parser(
        "generate",
        help="continue prompts",
        description="Continue prompts; the text goes to stdout as it is made, the speed to "
        "stderr. A prompt read once can be kept: its state has the same size whatever its length.",
        epilog="read a long text once, ask about it at once:\n"
        '  fastweights generate DIR "$(cat manual.txt)" --save-state FILE --max-new-tokens 0\n'
        '  fastweights generate DIR "In short:" --load-state FILE\n',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", metavar="DIR", help="a model folder or a .gguf file")
    p.add_argument(
        "prompts", metavar="PROMPT", nargs="*", help="text to continue; - reads it from stdin"
    )
    p.add_argument(
        "--chat",
        action="store_true",
        help="each prompt is a question, put through the chat template",
    )
    p.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="most tokens per prompt (default: 256)",
    )
    p.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)"
    )
    p.add_argument("--top-k", type=int, metavar="N", help="draw among the N likeliest tokens")
    p.add_argument(
        "--top-p",
        type=float,
        metavar="X",
        help="draw among the likeliest tokens with this much probability",
    )
    p.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    p.add_argument("--seed", type=int, metavar="N", help="makes the draws repeatable")
    p.add_argument("--load-state", metavar="FILE", help="continue a saved state")
    p.add_argument(
        "--save-state", metavar="FILE", help="save the state after the prompt and what it generated"
    )
    add_adapter(p)
    p.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Does it."""
    source = existing(options.model, "a model folder")
    if options.load_state:
        existing(options.load_state, "a state file")
    prompts = [sys.stdin.read() if p == "-" else p for p in options.prompts]
    if not prompts and not options.load_state:
        raise ValueError("expected a PROMPT or --load-state")
    prompts = prompts or [""]
    if options.save_state and len(prompts) != 1:
        raise ValueError(f"expected one PROMPT with --save-state, got {len(prompts)}")

    import fastweights as fw

    model, tokenizer = open_adapted(source, options)
    if options.chat:
        prompts = [_chat(tokenizer, prompt) for prompt in prompts]
    state = fw.load_state(model, options.load_state) if options.load_state else None
    if options.save_state and options.max_new_tokens == 0:
        fw.prefill(model, prompts[0], tokenizer=tokenizer, state=state).save(options.save_state)
        return 0
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
        "state": state,
    }
    if options.stop:
        settings["stop"] = [*_end_tokens(model), *options.stop]
    if options.save_state:
        result = cast("Generation", fw.generate(model, prompts[0], return_state=True, **settings))
        print(result)
        cast("GenerationState", result.state).save(options.save_state)
    elif len(prompts) == 1:
        _stream(fw.generate(model, prompts[0], stream=True, **settings))
    else:
        texts = cast("list[Generation]", fw.generate(model, prompts, **settings))
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"{prompt}{text}\n")
    return 0


def _stream(pieces: Any) -> None:
    """Prints the pieces of one row as they come, and the speed of the steps after the prompt."""
    first, count = 0.0, -1
    for piece in pieces:
        if count < 0:
            first = time.perf_counter()
        count += 1
        print(piece, end="", flush=True)
    print()
    if count > 0:
        say(f"{count / (time.perf_counter() - first):.1f} tokens/s")


def _chat(tokenizer: Any, prompt: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("expected a model with a chat template for --chat, got one without")
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
