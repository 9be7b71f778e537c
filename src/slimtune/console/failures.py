"""What a failure means to a person, in one sentence: mistakes, files, and memory that ran out."""

from __future__ import annotations

from slimtune.console.screen import one_line
from slimtune.errors import SlimtuneError, first_line, is_out_of_device_memory, is_out_of_memory


def sentence_of(error: BaseException) -> str | None:
    """The sentence for a person, on one line; None for an error of slimtune itself, whose traceback tells more."""
    if isinstance(error, SlimtuneError):
        return one_line(str(error)) or type(error).__name__
    if is_out_of_device_memory(error):
        return "the device has not enough memory; lower --batch-size or --max-length"
    if is_out_of_memory(error):
        return "main memory ran out; lower --batch-size or --max-length, or take a smaller model"
    if isinstance(error, ImportError) and not (error.name or "").startswith("slimtune"):
        # Installed, for what isn't has its own sentence: in a version that doesn't go with another library.
        return one_line(f"a library can't be imported: {first_line(error)}; slimtune doctor shows what is installed")
    if isinstance(error, OSError):
        # `strerror` and not `str(error)`, which begins with a number of the system's that says nothing to most.
        return one_line(f"{error.filename or 'the file system'}: {error.strerror or error}")
    return None
