"""The configuration and the tensors of an adapter or a model, read from its files without loading a weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.errors import AdapterFileError, ModelNotFoundError, listing
from slimtune.storage.foreign import reading_files
from slimtune.storage.hub import parted
from slimtune.storage.text_files import parse_json, read_json

HEADER_LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000
"""What safetensors itself takes."""


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


@reading_files()
def read_folder(path: Path, config_name: str, weights: str) -> Folder:
    """Read the configuration and the headers of the files that `weights` matches; raises AdapterFileError."""
    files = sorted(path.glob(weights))
    if not files:
        _refuse_without_weights(path)
    tensors = [tensor for file in files for tensor in read_header(file)]
    return Folder(path, read_object(path / config_name), tensors, sum(file.stat().st_size for file in files))


def read_from_hub(source: str, folder: Path) -> Folder:
    """The model of a Hub id, of whose weights no more than the headers are fetched; raises ModelNotFoundError.

    Args:
        folder: the cache's, which has its small files.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    name, revision = parted(source)
    try:
        files = get_safetensors_metadata(name, revision=revision).files_metadata.values()
    except NotASafetensorsRepoError as error:
        raise ModelNotFoundError(f"{source} has no weights as safetensors on the Hub; save it as such first") from error
    headers = {name: tensor for file in files for name, tensor in file.tensors.items()}
    tensors = [StoredTensor(name, header.dtype, tuple(header.shape)) for name, header in headers.items()]
    stored_bytes = sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in headers.values())
    return Folder(folder, read_object(folder / "config.json"), tensors, stored_bytes)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises AdapterFileError."""
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path} can't be read as JSON: {error}; restore the file") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{path} is a {type(value).__name__}, not an object; restore the file")
    return value


@reading_files()
def read_header(file: Path) -> list[StoredTensor]:
    """The tensors that a safetensors file announces; raises AdapterFileError if it doesn't hold them."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
            # A damaged length could ask for exabytes: it is compared before it is read.
            if size < HEADER_LENGTH_BYTES or length > size - HEADER_LENGTH_BYTES:
                raise ValueError(f"it is {size:,} bytes, too short for its header")
            if length > MOST_HEADER_BYTES:
                raise ValueError(f"its header is {length:,} bytes, and {MOST_HEADER_BYTES:,} are the most")
            header = parse_json(stream.read(length))
        header.pop("__metadata__", None)
        _check_offsets(header.values(), size - HEADER_LENGTH_BYTES - length)
        return [StoredTensor(name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise AdapterFileError(f"{file} is damaged: {error}; restore it or save it again") from error


def _check_offsets(entries: Iterable[dict[str, Any]], size: int) -> None:
    """See that each tensor has just the room that its shape needs, one behind the other. Raises: ValueError."""
    end = 0
    for entry in sorted(entries, key=lambda entry: entry["data_offsets"]):
        # "BF16", "F8_E4M3", "I64": the first number is the width in bits; BOOL has none and takes a byte.
        bits = re.search(r"\d+", entry["dtype"])
        width = int(bits[0]) if bits else 8
        needed = math.prod(entry["shape"]) * width
        begin, its_end = entry["data_offsets"]
        if begin != end or min(entry["shape"], default=0) < 0 or needed != 8 * (its_end - begin):
            raise ValueError(f"{its_end - begin:,} bytes for a {entry['dtype']} of the shape {entry['shape']}")
        end = its_end
    if end != size:
        raise ValueError(f"it holds {size:,} bytes of tensors, but announces {end:,}")


def _refuse_without_weights(path: Path) -> None:
    pickles = [entry.name for entry in path.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".pkl")]
    if pickles:
        raise AdapterFileError(
            f"{path} holds only pickled weights ({listing(pickles)}), and unpickling can run any code; "
            f"save them again as safetensors"
        )
    raise AdapterFileError(f"{path} holds a configuration, but no safetensors weights; save it again")
