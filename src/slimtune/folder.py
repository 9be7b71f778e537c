"""What lies in the folder of an adapter or a model, read without loading a weight."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slimtune.errors import AdapterFileError, ModelNotFoundError, did_you_mean, listing
from slimtune.hub import fetched, is_id, parted

HEADER_LENGTH_BYTES = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file announces it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Folder:
    """A folder with a configuration and safetensors files."""

    path: Path
    config: dict[str, Any]
    tensors: list[StoredTensor]
    stored_bytes: int

    @property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter, and not a model."""
        return "peft_type" in self.config

    @cached_property
    def parameters(self) -> int:
        """All numbers stored."""
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors there are of each type of number."""
        return dict(Counter(tensor.dtype for tensor in self.tensors))


def read_folder(path: Path) -> Folder:
    """Read configuration and headers; raises ModelNotFoundError or AdapterFileError with what was found instead."""
    if not path.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        advice = did_you_mean(path.name, siblings) or "; pass the folder of an adapter or a model"
        raise ModelNotFoundError(f"no folder {path}{advice}")
    name = next((n for n in ("adapter_config.json", "config.json") if (path / n).is_file()), None)
    if name is None:
        found = listing(entry.name for entry in path.iterdir()) or "nothing"
        raise ModelNotFoundError(
            f"{path} holds neither an adapter nor a model: adapter_config.json and config.json are both missing "
            f"(found: {found})"
        )
    files = sorted(path.glob("adapter_model*.safetensors" if name.startswith("adapter") else "model*.safetensors"))
    if not files:
        _refuse_without_weights(path)
    tensors = [tensor for file in files for tensor in _header(file)]
    return Folder(path, _config(path / name), tensors, sum(file.stat().st_size for file in files))


def read_source(source: str) -> Folder:
    """As `read_folder`, for a repository of the Hub too, of whose weights no more than the headers are fetched."""
    path = Path(source)
    if path.exists() or path.parent.is_dir() or not is_id(source):
        return read_folder(path)
    folder = fetched(source, weights=False)
    if (folder / "adapter_config.json").is_file() or not (folder / "config.json").is_file():
        return read_folder(folder)
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    name, revision = parted(source)
    try:
        files = get_safetensors_metadata(name, revision=revision).files_metadata.values()
    except NotASafetensorsRepoError as error:
        raise ModelNotFoundError(f"{source} has no weights as safetensors on the Hub; save it as such first") from error
    headers = {name: tensor for file in files for name, tensor in file.tensors.items()}
    tensors = [StoredTensor(name, found.dtype, tuple(found.shape)) for name, found in headers.items()]
    return Folder(folder, _config(folder / "config.json"), tensors, sum(map(_bytes_of, headers.values())))


def _bytes_of(tensor: Any) -> int:
    first, behind = tensor.data_offsets
    return behind - first


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path} can't be read as JSON: {error}; restore the file") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"{path} is a {type(config).__name__}, not an object; restore the file")
    return config


def _refuse_without_weights(path: Path) -> None:
    pickles = [entry.name for entry in path.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".pkl")]
    if pickles:
        raise AdapterFileError(
            f"{path} holds only pickled weights ({listing(pickles)}), and unpickling can run any code; "
            f"save them again as safetensors"
        )
    raise AdapterFileError(f"{path} holds a configuration, but no safetensors weights; save it again")


def _header(file: Path) -> list[StoredTensor]:
    """The tensors that a safetensors file announces; raises AdapterFileError if it doesn't hold them."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
            if size < HEADER_LENGTH_BYTES or length > size - HEADER_LENGTH_BYTES:
                raise ValueError(f"it is {size:,} bytes, too short for its header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        announced = (
            HEADER_LENGTH_BYTES + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        )
        if announced != size:
            raise ValueError(f"it is {size:,} bytes, but announces {announced:,}")
        return [StoredTensor(name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise AdapterFileError(f"{file} is damaged: {error}; restore it or save it again") from error
