"""Every error that a user can cause, and the way to warn.

Each error is also the standard type that fits, so `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class SlimtuneError(Exception):
    """Base of all errors of slimtune: one sentence with what is wrong, what was found and what to do."""

    def __str__(self) -> str:
        # KeyError would show the repr of the sentence, quotes and all.
        return str(self.args[0]) if self.args else ""


class ConfigError(SlimtuneError, ValueError):
    """A configuration that can't be used: an unknown field, a value out of range, fields that exclude each other."""


class UnknownFieldError(ConfigError, TypeError):
    """A config's field that doesn't exist; a TypeError as well, as of any call with an unknown keyword."""


class TargetError(SlimtuneError, ValueError):
    """A pattern that matches no module, or a module that the method can't attach to."""


class AdapterNotFoundError(SlimtuneError, KeyError, ValueError):
    """No adapter of that name is attached; `peft` raises a ValueError for it, or a KeyError."""


class AdapterExistsError(SlimtuneError, ValueError):
    """An adapter of that name is attached already."""


class AdapterFileError(SlimtuneError, ValueError):
    """An adapter on disk that is missing, damaged, unsafe or not what it claims to be."""


class BaseMismatchError(SlimtuneError, ValueError, RuntimeError):
    """An adapter that was made for another base model; torch raises a RuntimeError for tensors that don't fit."""


class MergeError(SlimtuneError, RuntimeError, ValueError):
    """A merge that can't be done or strays too far, or what can't be done while merged, a ValueError of `peft`'s."""


class TrainingError(SlimtuneError, RuntimeError):
    """Training that can't start or must not go on: nothing to train, a loss that is not a number."""


class DataError(SlimtuneError, ValueError):
    """Training data that can't be read or from which nothing would be learned."""


class ModelNotFoundError(SlimtuneError, FileNotFoundError):
    """A base model that is neither a folder, nor on the Hub, nor packaged."""


class DamagedBaseError(SlimtuneError, ValueError):
    """A quantized base model whose stored weights don't fit together."""


class PlanError(ConfigError):
    """What can't be planned, though a training of it may work."""


class DoesNotFitError(SlimtuneError, MemoryError):
    """A training that needs more memory than the device has."""


class RefusedStepError(SlimtuneError, RuntimeError):
    """A step that made a model smaller and lost more than it may."""

    exit_code = 1


class PushError(SlimtuneError, RuntimeError):
    """What the Hub did not take, or what must not be pushed to it."""

    exit_code = 1


class OutputExistsError(SlimtuneError, FileExistsError):
    """An output folder that already holds something."""


class MissingDependencyError(SlimtuneError, ImportError):
    """An optional library that the feature needs."""


_MODULES = {"scikit-learn": "sklearn"}
"""Of libraries whose module has another name than the package, but for hyphens."""


def require(library: str, *, extra: str, purpose: str, otherwise: str = "") -> None:
    """See that an optional library is there, before anything is read or computed.

    Args:
        library: the name of its package.
        extra: the extra of this package that brings it.
        purpose: what needs it, the beginning of the sentence.
        otherwise: what else can be done, the end of the sentence.

    Raises:
        MissingDependencyError: it isn't installed.
    """
    if not has_library(library):
        raise MissingDependencyError(f"{purpose} {needs(library, extra)}{otherwise}")


def has_library(library: str) -> bool:
    """Whether a library is installed; it is looked for and not imported, which takes some seconds."""
    return find_spec(_MODULES.get(library, library.replace("-", "_"))) is not None


def needs(library: str, extra: str) -> str:
    """The clause that names a missing library and the extra that brings it."""
    return f"needs {library}: run `pip install 'slimtune[{extra}]'`"


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The clause `; did you mean 'x'?` for the option nearest to `word`, or an empty string."""
    # Cut: a word can be a client's text of megabytes, over which the comparison would take seconds.
    near = difflib.get_close_matches(word[:200], list(options), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """`a, b, c and 12 more`: names for an error message, never more than `limit` of them."""
    unique = sorted(set(names))
    shown = ", ".join(unique[:limit])
    return shown if len(unique) <= limit else f"{shown} and {len(unique) - limit} more"


def counted(count: int, noun: str) -> str:
    """`1 row`, `2,000 rows`: a number with its noun."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raises: ConfigError, for anything but a whole number, and for one below the least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, found {value!r}")


def check_number(name: str, value: Any, least: float = -math.inf, below: float = math.inf) -> None:
    """Raises: ConfigError, for anything but a number in [least, below)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < below:
        bounds = "" if (least, below) == (-math.inf, math.inf) else f" in [{least}, {below})"
        raise ConfigError(f"{name} must be a number{bounds}, found {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises: ConfigError, for what is none of the choices."""
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        words = [choice for choice in choices if isinstance(choice, str)]
        near = did_you_mean(str(value), words)
        raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}, found {value!r}{near}")


def first_line(error: BaseException) -> str:
    """What another library's error says first, without a full stop, to go into a sentence."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


_OUT_OF_MEMORY = (
    "allocate memory", "not enough memory", "bad_alloc", "failed to map segment", "can't start new thread",
    "without setting an exception", "without exception set",
)  # fmt: skip
"""What torch, the loader of libraries and the system say where main memory, or the limit set on it, is used up."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether main memory ran out; by the text, for torch raises a bare RuntimeError, an import an ImportError."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def is_out_of_device_memory(error: BaseException) -> bool:
    """Whether the memory of a device ran out, as torch says it."""
    return type(error).__name__ == "OutOfMemoryError"


_PACKAGE = f"{Path(__file__).parent}{os.sep}"
_PASSING_ON = (f"{os.sep}contextlib.py", f"{os.sep}_contextlib.py")
"""Files of Python and torch whose functions stand between a decorated one and its caller."""


def warn(message: str) -> None:
    """Warn at the caller's line that led here, however deep in this library the reason was found."""
    outermost, depth, frame = 1, 0, sys._getframe()
    while frame is not None:
        depth += 1
        file = frame.f_code.co_filename
        # Not the first frame of others: between those of this library may be torch's and a user's own method's.
        if file.startswith(_PACKAGE) or (depth == outermost + 1 and file.endswith(_PASSING_ON)):
            outermost = depth
        frame = frame.f_back
    warnings.warn(message, stacklevel=outermost + 1)
