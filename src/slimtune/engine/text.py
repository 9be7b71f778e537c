"""The text of an answer while it grows: whole characters only, and nothing behind a stop string."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream

from slimtune.errors import ConfigError


def check_tokenizer(tokenizer: Any) -> None:
    """Raises: ConfigError, for a tokenizer that can't decode a token at a time."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"the engine decodes with the tokenizers library, which a {type(tokenizer).__name__} doesn't use; load "
            "the tokenizer with use_fast=True"
        )


class TextStream:
    """Text of the tokens that it is given.

    Attributes:
        text: what was given out so far.
        stopped: whether a stop string came; it is not part of the text.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.text, self.stopped = "", False
        # It decodes behind the tokens before: a character's missing bytes depend on them, and SentencePiece's first
        # space.
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._decoded = 0
        self._held = ""

    def push(self, token: int) -> str:
        """What this token adds; empty while a character or a stop string may be incomplete."""
        self._tokens.append(token)
        added = self._stream.step(self.tokenizer.backend_tokenizer, token) or ""
        self._decoded += len(added)
        return self._give(added, is_last=False)

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        if self.stopped:
            return ""
        # A stream gives no character whose last byte is missing; decoding the whole shows what there is of it.
        whole = self.tokenizer.backend_tokenizer.decode(self._tokens, skip_special_tokens=True)
        return self._give(whole[self._decoded :], is_last=True)

    def _give(self, added: str, is_last: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + added
        places = [place for place in (held.find(text) for text in self.stop) if place >= 0]
        if places:
            given, self._held, self.stopped = held[: min(places)], "", True
        elif is_last:
            given, self._held = held, ""
        else:
            # What may be the beginning of a stop string waits: text that was given out can't be taken back.
            keep = max((_overlap(held, text) for text in self.stop), default=0)
            given, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += given
        return given


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
