"""Nested values with tensors in them on disk, to the bit and without pickle: JSON beside safetensors.

NAME.json                     the values; a tensor is {"tensor": "7"}
NAME-00001.safetensors ...    the tensors by number, at most 2 GiB a file, so that few are in memory twice
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.storage.permissions import write_tensors

_MAX_BYTES = 2**31
_SUBCLASSES = ("torchao.optim.",)
"""Where the classes of tensors live that may be made from a file."""


def write_tree(folder: Path, name: str, tree: Any) -> list[Path]:
    """Write nested dicts, lists and tuples of tensors, numbers, texts and None; gives back the files.

    Raises:
        OSError, SafetensorError: the disk didn't take it, or it reads back other than it was written.
        TypeError: a value of another type.
    """
    tensors: list[Tensor] = []
    path = folder / f"{name}.json"
    path.write_text(json.dumps(_encoded(tree, tensors)), encoding="utf-8")
    return [path, *_write_tensors(folder, name, tensors)]


def read_tree(folder: Path, name: str) -> Any:
    """What `write_tree` wrote, with the tensors on the CPU. Raises: OSError, ValueError, SafetensorError."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{name}-*.safetensors")):
        tensors |= load_file(path)
    return _decoded(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), tensors)


def _write_tensors(folder: Path, name: str, tensors: list[Tensor]) -> Iterator[Path]:
    from safetensors import safe_open

    for number, group in enumerate(_groups(tensors), 1):
        path = folder / f"{name}-{number:05d}.safetensors"
        # Clones: optimizer states may share storage, which the format can't express.
        here = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in group.items()}
        write_tensors(path, here)
        with safe_open(path, framework="pt") as file:
            if not all(_same(file.get_tensor(key), tensor) for key, tensor in here.items()):
                raise OSError(f"{path.name} read back other than it was written")
        yield path


def _groups(tensors: list[Tensor]) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    taken = 0
    for number, tensor in enumerate(tensors):
        if group and taken + tensor.nbytes > _MAX_BYTES:
            yield group
            group, taken = {}, 0
        group[str(number)] = tensor
        taken += tensor.nbytes
    if group:
        yield group


def _same(one: Tensor, other: Tensor) -> bool:
    # By their bytes: a number that is none equals nothing.
    return one.shape == other.shape and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def _encoded(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return _encoded_tensor(value, tensors)
    if isinstance(value, Mapping):
        # Pairs and not an object: an optimizer's states are keyed by whole numbers, which JSON would turn into texts.
        return {"map": [[key, _encoded(inside, tensors)] for key, inside in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encoded(inside, tensors) for inside in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} can't be stored: {value!r:.80}")


def _encoded_tensor(value: Tensor, tensors: list[Tensor]) -> dict[str, Any]:
    if type(value) in (Tensor, torch.nn.Parameter):
        tensors.append(value)
        return {"tensor": str(len(tensors) - 1)}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if not kind.startswith(_SUBCLASSES):
        raise TypeError(f"a tensor of the type {kind} can't be stored")
    names, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
    inside = {name: _encoded(getattr(value, name), tensors) for name in names}
    # A dtype is the only thing of torchao's contexts that JSON doesn't hold.
    known = [str(item) if isinstance(item, torch.dtype) else item for item in context]
    return {"subclass": kind, "inside": inside, "context": known}


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "subclass" in value:
        return _decoded_subclass(value, tensors)
    kind, inside = next(iter(value.items()))
    readers: dict[str, Callable[[], Any]] = {
        "tensor": lambda: tensors[inside],
        "map": lambda: {key: _decoded(item, tensors) for key, item in inside},
        "list": lambda: [_decoded(item, tensors) for item in inside],
        "tuple": lambda: tuple(_decoded(item, tensors) for item in inside),
    }
    if kind not in readers:
        raise ValueError(f"an unknown kind of value: {kind!r}")
    return readers[kind]()


def _decoded_subclass(value: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    import importlib

    kind = value["subclass"]
    if not kind.startswith(_SUBCLASSES):
        raise ValueError(f"a file may not make a {kind}")
    module, _, name = kind.rpartition(".")
    inside = {key: _decoded(item, tensors) for key, item in value["inside"].items()}
    context = [_dtype(item) if isinstance(item, str) else item for item in value["context"]]
    return getattr(importlib.import_module(module), name).__tensor_unflatten__(inside, context)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no type of number: {name!r}")
    return dtype
