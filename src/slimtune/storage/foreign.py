"""Files that anybody may have written, where other libraries read them: what goes wrong is one sentence.

transformers, tokenizers and safetensors raise what they like for a damaged file: KeyError, TypeError, a panic of Rust.
`reading` stands around their calls alone. What our own code raises inside of such a call stays the traceback it is.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from slimtune.errors import (
    AdapterFileError,
    ModelNotFoundError,
    SlimtuneError,
    first_line,
    is_out_of_device_memory,
    is_out_of_memory,
)

_PLAIN = (OSError, ValueError, SlimtuneError)
"""Errors whose text is a sentence; that of others, as a KeyError's, needs the name of the error to be understood."""


MEND = "fetch the model again, or save it with save_pretrained"


class reading(contextlib.AbstractContextManager[None]):  # noqa: N801 - read in place: `with reading(...)`
    """Have whatever another library raises while it reads a foreign file be one error with one sentence.

    Our own errors, those of memory and of a keyboard pass, and so does what was raised with our code on the way.

    Args:
        failure: how the sentence begins: what can't be read.
        advice: how it ends: what to do.
        kind: the error to raise.
    """

    def __init__(self, failure: str, advice: str, kind: type[SlimtuneError] = ModelNotFoundError) -> None:
        self.failure, self.advice, self.kind = failure, advice, kind

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises: the error of this reading."""
        if error is None or not is_foreign(error, trace):
            return
        # safetensors complains of a file's bytes alone.
        damaged = "the file is damaged: " if type(error).__module__.startswith("safetensors") else ""
        raise self.kind(f"{self.failure}: {damaged}{described(error)}; {self.advice}") from error


class reading_model(reading):  # noqa: N801 - read in place
    """Let transformers read something of a model. Raises: ModelNotFoundError, for whatever it stumbles over."""

    def __init__(self, what: str, source: str) -> None:
        super().__init__(f"{what} '{source}' can't be loaded", MEND)
        self.source = source

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Raises: ModelNotFoundError."""
        if error is not None:
            refuse_code(self.source, error)
        super().__exit__(kind, error, trace)


def refuse_code(source: str, error: BaseException) -> None:
    """Raises: ModelNotFoundError, where an error of transformers says that the model needs code of its own."""
    if isinstance(error, OSError | ValueError) and "trust_remote_code" in str(error):
        raise ModelNotFoundError(
            f"'{source}' can't be loaded without Python code that comes with it, which is not run unasked; pass "
            "--trust-remote-code (in Python trust_remote_code=True) if you trust it"
        ) from error


def is_foreign(error: BaseException, trace: TracebackType | None) -> bool:
    """Whether another library raised an error that tells of its input, with none of our code below the first frame."""
    # By its name: a panic of Rust is a class of its own in each library, and no Exception.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return False
    if isinstance(error, SlimtuneError) or is_out_of_memory(error) or is_out_of_device_memory(error):
        return False
    # The first frame is that of the `with` block, which is ours in any case.
    frames = [frame for frame, _ in traceback.walk_tb(trace)]
    return not any(str(frame.f_globals.get("__name__")).startswith("slimtune.") for frame in frames[1:])


def described(error: BaseException) -> str:
    """What an error of another library says, for the middle of a sentence."""
    text = first_line(error)
    return text if isinstance(error, _PLAIN) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def reading_files(kind: type[SlimtuneError] = AdapterFileError) -> Iterator[None]:
    """Have a file or folder that the system doesn't let read be one error with one sentence. Raises: `kind`.

    `with reading_files():` stands around what looks for files itself, `@reading_files()` over a whole function.
    """
    try:
        yield
    except OSError as error:
        # Some of our own are also errors of the system.
        if isinstance(error, SlimtuneError):
            raise
        what = f"'{error.filename}' can't be read" if error.filename else "a file can't be read"
        raise kind(
            f"{what} ({error.strerror or first_line(error)}); see that it is as it was written, and that this user may "
            "read it"
        ) from error


def refuse_special_files(folder: str | os.PathLike[str], kind: type[SlimtuneError] = ModelNotFoundError) -> None:
    """See that a folder, whose files another library will open, holds no pipes and devices. Raises: `kind`."""
    with reading_files(kind):
        for entry in sorted(Path(folder).iterdir()):
            if entry.exists() and not entry.is_dir() and not entry.is_file():
                raise kind(f"'{entry}' is a pipe or a device, not a file; put the file itself there")


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str], device: str = "cpu") -> Iterator[Any]:
    """A safetensors file. Raises: AdapterFileError, also while it is read, for a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        if not Path(path).is_file():
            # A pipe that nobody writes to would have the reader wait.
            raise OSError("it is no file")
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"'{path}' is no whole safetensors file ({error}); copy or download it again") from error


@contextlib.contextmanager
def read_not_mapped() -> Iterator[None]:
    """Let transformers read tensors, not map their files: what is mapped stays in memory as long as the model does.

    transformers has no option for it, but does the same on Windows. Another load at the same time is read as well.
    """
    import safetensors
    import transformers.modeling_utils

    def reading(*arguments: Any, **options: Any) -> Any:
        return safetensors.safe_open(*arguments, **options | {"backend": "pread"})

    library: Any = transformers.modeling_utils
    # transformers holds the function by its own name; nothing else of the library is touched.
    library.safe_open = reading
    try:
        yield
    finally:
        library.safe_open = safetensors.safe_open
