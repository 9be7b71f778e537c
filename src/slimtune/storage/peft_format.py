"""An adapter on disk, in the format that `peft` writes: `adapter_config.json` and `adapter_model.safetensors`.

There is never half an adapter on disk. Both files are written beside their final names, synced and read back; then the
weights are renamed, then the config. The weights carry the config's checksum, so that a load that finds a save cut off
between the two renames takes the config that belongs to the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from slimtune.errors import AdapterFileError, ConfigError, did_you_mean
from slimtune.storage.atomic import sync
from slimtune.storage.foreign import open_tensors, reading_files, refuse_special_files
from slimtune.storage.permissions import write_tensors
from slimtune.storage.text_files import read_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
MODEL_NAME = "model.safetensors"
KEY_PREFIX = "base_model.model."
_PENDING = ".new"
_PENDING_FOLDER = ".saving"


def save_adapter(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter; what the folder held before stays whole until the new one is.

    Args:
        tensors: by their names on disk, `base_model.model.<path>.lora_A.weight` and so on.

    Raises:
        AdapterFileError: what was written doesn't read back equal, or the disk didn't take it.
    """
    folder = Path(folder)
    contiguous = _apart({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    # Before anything touches the disk: a value that JSON can't hold must not cost the old adapter.
    text = config_text(config)
    metadata = {"format": "pt", "config_sha256": _sha256(text.encode()), "tensors_sha256": checksum(contiguous)}
    # In a folder of its own: the writer's temporary files, which a kill leaves behind, go with the next save.
    weights, pending = folder / _PENDING_FOLDER / WEIGHTS_NAME, folder / (CONFIG_NAME + _PENDING)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _whole_config(folder) == pending:
            # A save that was cut off between its two renames is finished first.
            pending.replace(folder / CONFIG_NAME)
        shutil.rmtree(weights.parent, ignore_errors=True)
        weights.parent.mkdir()
        pending.write_text(text)
        write_tensors(weights, contiguous, metadata)
        _sort_metadata(weights)
        sync(pending)
        # Both on the disk before either is renamed: a crash may reorder writes, never past this.
        sync(weights)
        _verify(weights, metadata["tensors_sha256"], set(contiguous))
        # Weights first: from here on their metadata names the config that waits beside.
        weights.replace(folder / WEIGHTS_NAME)
        pending.replace(folder / CONFIG_NAME)
        weights.parent.rmdir()
        # The folder's entries are data of their own; without this the renames may be lost with the power.
        sync(folder)
    except (OSError, _safetensor_error()) as error:
        shutil.rmtree(weights.parent, ignore_errors=True)
        with contextlib.suppress(OSError):
            pending.unlink(missing_ok=True)
        raise AdapterFileError(
            f"the adapter was not saved to '{folder}': {error}; what was there before is unharmed"
        ) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without any two in the same memory, which a file can't have."""
    seen: set[int] = set()
    return {
        # By address: tied embeddings and views of a shared buffer are refused by safetensors' writer.
        name: tensor.clone() if tensor.data_ptr() in seen or seen.add(tensor.data_ptr()) else tensor
        for name, tensor in tensors.items()
    }


def key(path: str, disk_name: str) -> str:
    """The key in the file of what the delta at a module calls by this name; one that starts with a slash stands alone.

    Args:
        path: of the module; empty for the model itself.
    """
    if disk_name.startswith("/"):
        return disk_name[1:]
    return f"{KEY_PREFIX}{path}.{disk_name}" if path else KEY_PREFIX + disk_name


@reading_files()
def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter by their names on disk.

    Raises:
        AdapterFileError: no weights, pickled, empty or damaged ones, or some that no training leaves behind.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise AdapterFileError(_why_missing(folder))
    tensors = read_tensors(path)[0]
    for name, tensor in tensors.items():
        _check_sound(path, name, tensor)
    return tensors


def _check_sound(path: Path, name: str, tensor: Tensor) -> None:
    """See that a tensor holds real, finite numbers; counts, which running statistics have, are whole ones."""
    import torch

    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise AdapterFileError(
            f"'{name}' in '{path}' is of {tensor.dtype}, which no method trains; copy the adapter again or restore it"
        )
    # Types of 8 bits have no test of their own.
    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    # What isn't finite makes the sum so, in a quarter of the time; a sum may be infinite without it, too.
    if not math.isfinite(wide.sum()) and not torch.isfinite(wide).all():
        bad = tensor.numel() - int(torch.isfinite(wide).sum())
        raise AdapterFileError(
            f"'{name}' in '{path}' has {bad:,} values of {tensor.numel():,} that are infinite or NaN: its training "
            "diverged or the file is damaged; go back to an earlier checkpoint"
        )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata. Raises: AdapterFileError, for an empty or damaged one."""
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not tensors:
        raise AdapterFileError(
            f"'{path}' holds no tensors: the adapter was saved empty; save it again from the trained model"
        )
    expected = metadata.get("tensors_sha256")
    if expected and checksum(tensors) != expected:
        raise AdapterFileError(
            f"the tensors in '{path}' don't match the checksum that was saved with them: the file was "
            "damaged or changed; copy or download it again"
        )
    return tensors, metadata


@reading_files()
def read_config(model_id: str | Path, subfolder: str | None = None, **hub: Any) -> dict[str, Any]:
    """The fields of an adapter's config.

    Raises:
        AdapterFileError: no config, or not a readable one.
    """
    folder = adapter_folder(model_id, subfolder, **hub)
    path = _whole_config(folder)
    if not path.is_file():
        raise AdapterFileError(_why_no_config(folder))
    return read_fields(path)


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a config from this very file. Raises: AdapterFileError."""
    try:
        fields = read_json(path)
    except (ValueError, OSError) as error:
        raise AdapterFileError(f"'{path}' is not JSON ({error}); write the adapter again") from error
    if not isinstance(fields, dict):
        raise AdapterFileError(f"'{path}' holds a {type(fields).__name__}, not the fields of a config")
    # `peft` leaves it out of its files, too: it is about a run and not about the adapter.
    fields.pop("runtime_config", None)
    return fields


def write_config(folder: str | Path, config: Mapping[str, Any]) -> None:
    """Write `adapter_config.json` alone, whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pending = folder / (CONFIG_NAME + _PENDING)
    pending.write_text(config_text(config))
    sync(pending)
    pending.replace(folder / CONFIG_NAME)


@reading_files()
def adapter_folder(model_id: str | Path, subfolder: str | None = None, **hub: Any) -> Path:
    """The local folder of an adapter: the folder itself, or a Hub repository's files in the cache.

    Args:
        hub: what `huggingface_hub.hf_hub_download` takes (revision, token, cache_dir, ...).

    Raises:
        AdapterFileError: neither a folder nor a repository that can be reached.
        ConfigError: an argument that the Hub's client doesn't take.
    """
    if hub:
        from huggingface_hub import hf_hub_download

        known = inspect.signature(hf_hub_download).parameters
        for name in hub.keys() - known.keys():
            raise ConfigError(f"loading an adapter takes no argument {name!r}{did_you_mean(name, known)}")
    folder = Path(model_id, subfolder or "")
    if folder.is_dir():
        refuse_special_files(folder, AdapterFileError)
        return folder
    if folder.exists():
        raise AdapterFileError(f"'{folder}' is a file; give the folder that holds {CONFIG_NAME}")
    return _from_hub(str(model_id), subfolder, **hub)


def config_text(config: Mapping[str, Any]) -> str:
    """The config as `peft` lays it out."""
    try:
        return json.dumps(dict(config), indent=2, sort_keys=True)
    except TypeError as error:
        raise ConfigError(f"the config holds a value that JSON can't: {error}") from error


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 over names, shapes, dtypes and bytes."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.numel():
            # Through uint8, because numpy has no bfloat16; `.data` is a view, no copy of the bytes.
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_adapter_name(name: str) -> None:
    """Raises: ConfigError, for a name that can't be a module's and a folder's."""
    reserved = name.startswith("__") or name in _MODULE_DICT_ATTRIBUTES()
    if not name or name != name.strip() or any(c in name for c in "./\\\0") or reserved:
        raise ConfigError(
            f"{name!r} can't name an adapter: it names a folder and a module; use letters, digits, '-' and '_'"
        )


def _MODULE_DICT_ATTRIBUTES() -> set[str]:  # noqa: N802
    from torch import nn

    return set(dir(nn.ModuleDict()))


def _whole_config(folder: Path) -> Path:
    """The config that belongs to the weights: the pending one if a save was cut off between its two renames."""
    path, pending, weights = folder / CONFIG_NAME, folder / (CONFIG_NAME + _PENDING), folder / WEIGHTS_NAME
    if not pending.is_file() or not weights.is_file():
        return path
    from safetensors import safe_open

    with contextlib.suppress(OSError, _safetensor_error()), safe_open(weights, framework="pt") as file:
        if (file.metadata() or {}).get("config_sha256") == _sha256(pending.read_bytes()):
            return pending
    return path


def _from_hub(repository: str, subfolder: str | None, **hub: Any) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    path = Path()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            path = Path(hf_hub_download(repository, name, subfolder=subfolder, **hub))
        except (HFValidationError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise AdapterFileError(
                f"'{repository}' is no folder here and its {name} can't be had from the Hub ({reason}); check the path"
            ) from error
    return path.parent


def _verify(path: Path, expected: str, names: set[str]) -> None:
    from safetensors.torch import load_file

    written = load_file(path)
    if set(written) != names or checksum(written) != expected:
        raise OSError(f"{path.name} read back other than it was written")


def _sort_metadata(path: Path) -> None:
    """Give the file's metadata a fixed order, so that the same adapter is the same file; the writer draws one."""
    with path.open("r+b") as file:
        # The format: 8 bytes of length, a JSON header of that length, padded with spaces, then the tensors.
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise OSError(f"the header of {path.name} has a form that isn't known")
        file.seek(8)
        file.write(text.ljust(length))


def _why_missing(folder: Path) -> str:
    if (folder / PICKLE_NAME).is_file():
        return (
            f"'{folder / PICKLE_NAME}' is a pickle, which can run code when it is read, and is refused; convert it "
            f"where you trust it: load the adapter with peft and save it again as {WEIGHTS_NAME}"
        )
    return f"'{folder}' holds no {WEIGHTS_NAME}; is the adapter in a subfolder, or was it not saved?"


def _why_no_config(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return f"'{folder}' is a whole model, not an adapter: it holds no {CONFIG_NAME}; load it with transformers"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    hint = f"; there are adapters in its subfolders: {', '.join(inside[:8])}" if inside else ""
    return f"'{folder}' holds no {CONFIG_NAME}{hint}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _safetensor_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the Trainer names its checkpoints so."""
    return re.fullmatch(r"checkpoint-\d+", Path(folder).name) is not None


def offer_to_trainer(folder: str | Path, adapter_folder: str | Path) -> None:
    """Give the adapter's weights the second name that the Trainer reads a model's state dict from.

    It reads an adapter by its own name only for models of `peft`. A link takes no room; where the file system has
    none, the adapter is copied.
    """
    name, pending = Path(folder, MODEL_NAME), Path(folder, MODEL_NAME + ".new")
    pending.unlink(missing_ok=True)
    try:
        os.link(Path(adapter_folder, WEIGHTS_NAME), pending)
    except OSError:
        shutil.copyfile(Path(adapter_folder, WEIGHTS_NAME), pending)
    pending.replace(name)
