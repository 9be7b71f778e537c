"""What a failure means to a person, in one sentence: mistakes, files, and memory that ran out."""

from __future__ import annotations

from slimtune.console.screen import one_line
from slimtune.errors import SlimtuneError

_OUT_OF_MEMORY = (
    "allocate memory", "not enough memory", "bad_alloc", "failed to map segment", "can't start new thread",
    "without setting an exception", "without exception set",
)  # fmt: skip
"""What torch, the loader of libraries and the system say where main memory, or the limit set on it, is used up."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether main memory ran out; by the text, for torch raises a bare RuntimeError, an import an ImportError."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def sentence_of(error: BaseException) -> str | None:
    """The sentence for a person, on one line; None for an error of slimtune itself, whose traceback tells more."""
    if isinstance(error, SlimtuneError):
        return one_line(str(error)) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":
        return "the device has not enough memory; lower --batch-size or --max-length"
    if is_out_of_memory(error):
        return "main memory ran out; lower --batch-size or --max-length, or take a smaller model"
    if isinstance(error, OSError):
        return one_line(f"{error.filename or 'the file system'}: {error.strerror or error}")
    return None
