"""Tokens to text as they come, and the strings that end a generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Decodes one row's tokens into text that only ever grows.

    A token may be part of a character, or of a stop string that is not complete yet: such text is
        held back until it
    is settled.

    Args:
        tokenizer: has `decode(ids, skip_special_tokens=...)`, as Hugging Face tokenizers do.
        stop: strings that end the text; neither they nor what follows is part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        # decode(ids[start:]) begins with the text already emitted of ids[start:read]. One settled
        # piece is kept as context, since some tokenizers drop a leading space at the start of a
        # sequence.
        self._start = self._read = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; the text that it settles, which may be empty."""
        self._ids.append(token)
        before = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self._ids))
        if now.endswith("�"):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._settle(self._held + now[len(before) :], final=False)

    def finish(self) -> str:
        """The text still held back, at the end of the row."""
        if self.stopped:
            return ""
        before = self._decode(self._start, self._read)
        rest = self._decode(self._start, len(self._ids))[len(before) :]
        self._read = len(self._ids)
        return self._settle(self._held + rest, final=True)

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))

    def _settle(self, text: str, *, final: bool) -> str:
        cuts = [i for i in (text.find(s) for s in self._stop) if i >= 0]
        if cuts:
            text, self._held, self.stopped = text[: min(cuts)], "", True
        else:
            held = 0 if final else max((_overlap(text, s) for s in self._stop), default=0)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0
    )
