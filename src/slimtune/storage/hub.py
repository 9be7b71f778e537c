"""Models and adapters of the Hub: `organisation/name` or `organisation/name@revision`, brought into the cache."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimtune.errors import ModelNotFoundError

SMALL = (
    "*.json", "*.jinja", "*.txt", "*.model", "README.md", "recipe.yaml", "adapter_model.safetensors",
)  # fmt: skip
"""What tells of a model, with its tokenizer, and an adapter whole."""
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
"""The names of transformers; other copies of the weights that a repository may have are not fetched."""
CODE = ("*.py",)


def parted(source: str) -> tuple[str, str | None]:
    """The name and the revision that stands behind it, if one does; a folder may be called as it likes."""
    if not is_id(source) or Path(source).exists():
        return source, None
    name, _, revision = source.partition("@")
    return name, revision or None


def at_revision(name: str, revision: str | None) -> str:
    """The name with the revision behind it."""
    return f"{name}@{revision}" if revision else name


def is_id(source: str) -> bool:
    """Whether this can name a repository of the Hub, whether there is one or not."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", source)) and not source.startswith(".")


@functools.lru_cache
def fetched(source: str, weights: bool = True, code: bool = False) -> Path:
    """The folder in the cache with the files of a repository. Raises: ModelNotFoundError.

    Args:
        weights: those of a model too; an adapter's are always there.
        code: Python files, for who runs them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, revision = parted(source)
    # Without patterns a repository comes whole: original checkpoints, GGUF and ONNX copies, several times the model.
    patterns = [*SMALL, *(WEIGHTS if weights else ()), *(CODE if code else ())]
    try:
        with without_bars(not weights or not sys.stderr.isatty()):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        why, advice = "has conditions", f"accept them on its page of the Hub and log in with hf auth login ({name})"
        raise ModelNotFoundError(f"the model '{name}' {why}; {advice}") from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"'{name}' has no revision '{revision or 'main'}' on the Hub; name a branch, a tag or a commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"no model '{name}': it is neither a folder nor a packaged name, and the Hub has none of that id that it "
            "shows to you; check the id, or log in with hf auth login if it is private"
        ) from error
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ModelNotFoundError(
            f"no model '{name}': it is neither a folder nor a packaged name, and can't be had from the Hub ({reason}); "
            "go online, or pass a model folder"
        ) from error
    if weights and not any(folder.glob("*.safetensors")):
        raise ModelNotFoundError(
            f"'{source}' has no safetensors weights on the Hub, and pickled ones can run any code; load it where you "
            "trust it, and save it with save_pretrained"
        )
    return folder


@contextmanager
def without_bars(wanted: bool) -> Iterator[None]:
    """Without bars for what takes no time, or where nobody watches."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = wanted and not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
