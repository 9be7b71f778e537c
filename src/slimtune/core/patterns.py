"""Regular expressions over the names of modules, from configs that a stranger may have written.

An expression can be made to take for ever on a name of forty letters. The engine used here stops when it has had its
time; its syntax is that of Python's `re`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import regex

from slimtune.errors import ConfigError

_SECONDS = 5.0
"""What all the matching with one expression may take; an honest one takes microseconds a name."""


class Pattern:
    """A compiled expression with a limit on the time that all its matches take together.

    Raises:
        ConfigError: it is no expression.
    """

    def __init__(self, expression: str) -> None:
        self.expression, self._left = expression, _SECONDS
        try:
            self._compiled = regex.compile(expression)
        except (regex.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{expression!r} is no regular expression: {error}; mend it, or list names") from error

    def match(self, text: str, whole: bool = False) -> Any:
        """The match at the beginning of the text, or of the whole of it; else None. Raises: ConfigError."""
        return self._timed(self._compiled.fullmatch if whole else self._compiled.match, text)

    def sub(self, replacement: str, text: str) -> str:
        """The text with each match replaced. Raises: ConfigError."""
        return self._timed(functools.partial(self._compiled.sub, replacement), text)

    def _timed(self, work: Callable[..., Any], text: str) -> Any:
        began = time.monotonic()
        try:
            # Never below zero, which `regex` takes for no limit at all.
            result = work(text, timeout=max(self._left, 0.01))
        except (TimeoutError, MemoryError) as error:
            raise ConfigError(
                f"matching {self.expression!r} against names such as {text!r} takes longer than {_SECONDS:.0f} s: it "
                "has repetitions inside repetitions; write it without, or list names"
            ) from error
        except (regex.error, IndexError) as error:
            raise ConfigError(f"{self.expression!r} can't be replaced: {error}") from error
        taken = time.monotonic() - began
        # Only slow matches are charged: thousands of names at a microsecond each are no attack.
        if taken > 0.01:
            self._left -= taken
        return result


@functools.lru_cache(maxsize=512)
def compiled(expression: str) -> Pattern:
    """The compiled expression. Raises: ConfigError."""
    return Pattern(expression)


def matching(expression: str, names: Iterable[str]) -> list[str]:
    """The names that the expression means as a whole. Raises: ConfigError."""
    return [name for name in names if compiled(expression).match(name, whole=True)]


def means(key: str, name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern`, a name or expression, means the module of that path."""
    # As `peft` builds it: a key means an ending of the path that begins at a dot, unless it begins with `^`.
    return compiled(rf"(.*\.)?({key})$").match(name) is not None


def by_pattern(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that means the module of that path."""
    return next((value for key, value in patterns.items() if means(key, name)), otherwise)
