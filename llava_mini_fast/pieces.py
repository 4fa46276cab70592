"""An answer's text as its tokens come."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

from tokenizers.decoders import DecodeStream
from torch import Tensor


class Pieces:
    """A streamer for transformers' `generate`, read in another thread as an iterator of text.

    transformers' own streamer holds text back until a space comes, which some answers never have. Special tokens are left
    out. The pieces joined are the decoded answer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._ids: list[int] = []
        self._text = ""

    def put(self, ids: Tensor) -> None:
        """New token ids, any shape; `generate` calls it once a step, and first with a prompt that is empty here."""
        for token in ids.flatten().tolist():
            self._ids.append(token)
            self._add(self._stream.step(self._tokenizer.backend_tokenizer, token))

    def end(self) -> None:
        """The answer is over: what was held back, such as half a character, comes out as `decode` shows it."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if whole.startswith(self._text):
            self._add(whole[len(self._text) :])
        self._pieces.put(None)

    def _add(self, piece: str | None) -> None:
        if piece:
            self._text += piece
            self._pieces.put(piece)

    def __iter__(self) -> Iterator[str]:
        yield from iter(self._pieces.get, None)
