"""A model of transformers as a GGUF file, written tensor by tensor and read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimtune.errors import ConfigError, check_choice, require
from slimtune.export.gguf.architectures import Architecture, Place, context_limit, places_of, rope_factors
from slimtune.export.gguf.quantize import KINDS, Blocks, byte_shape, decoded, encoded, kind_of
from slimtune.export.gguf.tokenizer import vocabulary_of

_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""What `general.file_type` says."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: what it is called there, how it is stored, and where its bytes come from."""

    name: str
    shape: tuple[int, ...]
    kind: str
    data: Callable[[], np.ndarray[Any, Any]]


def require_gguf() -> None:
    """Raises: MissingDependencyError, where the `gguf` package isn't installed."""
    require("gguf", extra="gguf", purpose="writing GGUF")


def tensors_of(model: Any) -> dict[str, Tensor]:
    """The tensors of a model by their names; one that is tied to another before it is left out.

    The weights of all experts of a layer are one tensor, as in the model; those of gates and of values, which the model
    has in one, are two views of it.
    """
    seen: set[tuple[int, int]] = set()
    tensors = {}
    for name, tensor in _by_projection(model.state_dict()):
        # By address and offset: views into one buffer are different tensors unless they begin alike.
        place = tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
        if place not in seen or not tensor.numel():
            tensors[name] = tensor
        seen.add(place)
    return tensors


def _by_projection(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        module, _, own = name.rpartition(".")
        if module.endswith(".experts") and own == "gate_up_proj":
            # (experts, 2 out, in), the gates first.
            gates, values = tensor.chunk(2, dim=1)
            yield f"{module}.gate_proj.weight", gates
            yield f"{module}.up_proj.weight", values
        else:
            yield f"{name}.weight" if module.endswith(".experts") and own == "down_proj" else name, tensor


def write_model(
    path: Path,
    architecture: Architecture,
    config: Any,
    tensors: Mapping[str, Tensor | Blocks],
    tokenizer: Any,
    kind: str = "F16",
    name: str = "model",
    eos_ids: Sequence[int] = (),
) -> list[str]:
    """Write a GGUF file that llama.cpp runs.

    Args:
        tensors: by their names in transformers, as `tensors_of` gives them; those that are `Blocks` go into the file
            with the very codes that they have.
        kind: how the other matrices are stored, one of `KINDS`.
        eos_ids: tokens at which the model stops, beside the tokenizer's own.

    Returns:
        What a reader should know: matrices that are stored otherwise, a context that was cut.

    Raises:
        ConfigError: the format has no place for a tensor, or no word for the tokenizer.
    """
    check_choice("the type of a GGUF file", kind, KINDS)
    places = places_of(architecture, config, list(tensors))
    embedding = next(tensors[own] for own, place in places.items() if place.name == "token_embd.weight")
    vocabulary = vocabulary_of(tokenizer, embedding.shape[0], list(eos_ids))
    metadata = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[_most(tensors) or kind],
        "general.quantization_version": 2,
        **{f"{architecture.name}.{key}": value for key, value in architecture.describe(config).items()},
        **vocabulary.metadata(),
    }
    if architecture.name == "bert":
        metadata["tokenizer.ggml.token_type_count"] = config.type_vocab_size
    entries = [*_entries(architecture, config, tensors, places, kind)]
    write_file(path, architecture.name, metadata, entries)
    return _notes(config, entries, kind)


def _most(tensors: Mapping[str, Tensor | Blocks]) -> str | None:
    """The type of most matrices that come in blocks."""
    kinds = Counter(tensor.kind for tensor in tensors.values() if isinstance(tensor, Blocks))
    return kinds.most_common(1)[0][0] if kinds else None


def _entries(
    architecture: Architecture,
    config: Any,
    tensors: Mapping[str, Tensor | Blocks],
    places: Mapping[str, Place],
    kind: str,
) -> Iterator[Entry]:
    for own, place in places.items():
        yield _entry(own, tensors[own], place, kind)
        if architecture.needs_head and place.name == "token_embd.weight" and "lm_head.weight" not in tensors:
            yield _entry(own, tensors[own], Place("output.weight"), kind)
    for name, factors in rope_factors(architecture, config).items():
        # Bound as defaults: a closure would see the loop's last values when the bytes are written.
        yield Entry(name, tuple(factors.shape), "F32", lambda n=name, f=factors: encoded(n, f, "F32"))


def _entry(own: str, tensor: Tensor | Blocks, place: Place, kind: str) -> Entry:
    if isinstance(tensor, Blocks):
        if place.offset:
            raise ConfigError(f"'{own}' has something added in GGUF, so that its codes can't be kept")
        # Blocks are (out, in) already, whichever way round transformers has the matrix.
        rows = place.rows(tensor.shape[0])
        data = tensor.data if rows is None else tensor.data[rows.numpy()]
        return Entry(place.name, tensor.shape, tensor.kind, lambda: data)
    shape = tuple(tensor.shape[::-1] if place.is_transposed else tensor.shape)
    stored = kind_of(place.name, shape, kind)
    # Encoded when it is its turn: one tensor in float32 at a time, not the model twice.
    return Entry(place.name, shape, stored, lambda: encoded(own, place.to_file(tensor.float()), stored))


def write_file(path: Path, architecture: str, metadata: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """Write a GGUF file with these keys and tensors, of which one at a time is in memory."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _set(writer, key, value)
    for entry in entries:
        stored_shape = byte_shape(entry.shape, entry.kind)
        raw = gguf.GGMLQuantizationType[entry.kind]
        # In bytes, of which the package finds the shape in numbers again.
        writer.add_tensor_info(entry.name, stored_shape, np.dtype(np.uint8), int(np.prod(stored_shape)), raw)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(np.ascontiguousarray(entry.data()))
    finally:
        writer.close()


def _set(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        # llama.cpp reads its settings as unsigned 32 bits and refuses another width of the same number.
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _notes(config: Any, entries: Sequence[Entry], kind: str) -> list[str]:
    notes = []
    half = [entry.name for entry in entries if entry.kind == "F16"] if kind in ("Q8_0", "Q4_0") else []
    if half:
        notes.append(f"{len(half)} matrices have rows that are no multiple of 32 and stay F16, such as {half[0]}")
    limit = context_limit(config)
    if limit:
        notes.append(
            f"the context is {limit:,} tokens, the window that the model looks back: beyond it, llama.cpp would answer "
            "differently"
        )
    return notes


def read_tensors(
    path: Path, architecture: Architecture, config: Any, names: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file by their names in transformers, in float32, one after the other."""
    import gguf

    places = places_of(architecture, config, list(names))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for own, place in places.items():
        tensor = stored[place.name]
        yield own, place.from_file(decoded(tensor.data, tensor.tensor_type.name)).to(torch.float32)
