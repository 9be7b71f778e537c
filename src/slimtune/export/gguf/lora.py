"""A LoRA adapter as a GGUF file that llama.cpp lays over its base.

llama.cpp computes alpha / r * B A with one alpha for the file, and 1 * B A where alpha is 0. So alpha is 0 and the
scale of each module stands in its B, which expresses rsLoRA and a rank or an alpha of a module's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.adapters.adapter import adopted_modules, get_peft_model_state_dict
from slimtune.core.frozen import deltas_of
from slimtune.errors import ConfigError, MergeError, listing
from slimtune.export.gguf.architectures import Place, architecture_of, places_of
from slimtune.export.gguf.quantize import decoded, encoded
from slimtune.export.gguf.writer import Entry, require_gguf, write_file

LORA_FILE = "adapter.gguf"
LORA_KINDS = ("F32", "F16")
_BOUNDS = {"F32": 1e-6, "F16": 2e-3}
"""The largest relative error of an update that is read again."""
_MERGE = "merge it instead (--to gguf)"


def export_gguf_lora(model: Any, folder: Path, kind: str) -> float:
    """Write the active adapter of a model as `adapter.gguf` into a folder.

    Returns:
        The largest relative error of an update s B A, read again.

    Raises:
        ConfigError: the adapter has something that the format has no place for.
        MergeError: the file isn't what the adapter is.
    """
    require_gguf()
    if kind not in LORA_KINDS:
        raise ConfigError(f"the matrices of an adapter are small: write {' or '.join(LORA_KINDS)}, not {kind}")
    architecture = architecture_of(model)
    _check_plain(model)
    pairs = _pairs(model)
    places = places_of(architecture, model.config, [f"{path}.weight" for path in pairs])
    entries = []
    for path, (a, b) in pairs.items():
        place = places[f"{path}.weight"]
        for suffix, matrix in zip(("lora_a", "lora_b"), _to_file(place, a, b), strict=True):
            entries.append(_entry(f"{place.name}.{suffix}", matrix, kind))
    metadata = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 0.0}
    write_file(folder / LORA_FILE, architecture.name, metadata, entries)
    return _read_error(folder / LORA_FILE, pairs, places, kind)


def _entry(name: str, matrix: Tensor, kind: str) -> Entry:
    return Entry(name, tuple(matrix.shape), kind, lambda: encoded(name, matrix, kind))


def _check_plain(model: Any) -> None:
    """See that the adapter is made of LoRA matrices alone. Raises: ConfigError."""
    config = model.peft_config[model.active_adapter]
    if config.peft_type != "LORA":
        raise ConfigError(f"llama.cpp lays LoRA over a model, and this adapter is {config.peft_type}; {_MERGE}")
    if config.use_dora:
        raise ConfigError(f"llama.cpp has no DoRA: the magnitudes have no place in its file; {_MERGE}")
    stored = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    others = [name for name in stored if not any(part in name for part in ("lora_A", "lora_B", "lora_embedding_"))]
    others += [name for name in stored if name.endswith("lora_B.bias")]
    if others:
        raise ConfigError(
            f"llama.cpp's adapter file holds LoRA matrices alone, and this one also has {listing(others, 3)}; {_MERGE}"
        )


def _pairs(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, in) and s B (out, r) of each module. Raises: ConfigError."""
    pairs = {}
    for path, module in adopted_modules(model):
        if model.active_adapter in deltas_of(module):
            delta: Any = deltas_of(module)[model.active_adapter]
            a, b = delta.pair
            pairs[path] = a.detach().float(), delta.scaling * b.detach().float()
    ends = [path for path in pairs if path.endswith(("lm_head", "embed_tokens", "wte"))]
    if ends and getattr(model.config, "tie_word_embeddings", False):
        raise ConfigError(
            f"in llama.cpp embedding and head are one tensor where they are tied, and an adapter of {listing(ends)} "
            f"would change both; {_MERGE}"
        )
    return pairs


def _to_file(place: Place, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if place.name == "token_embd.weight":
        # Looked up by rows there: A is (vocabulary, r).
        return a.T, b
    # B's rows are outputs, and follow the weight's rows of q and k into llama.cpp's order; A's columns are inputs and
    # stay.
    rows = place.rows(len(b))
    return a, b if rows is None else b[rows.to(b.device)]


def _read_error(
    path: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], places: Mapping[str, Place], kind: str
) -> float:
    import gguf

    stored = {tensor.name: decoded(tensor.data, kind) for tensor in gguf.GGUFReader(path).tensors}
    largest = 0.0
    for own, (a, b) in pairs.items():
        place = places[f"{own}.weight"]
        read_a, read_b = (stored[f"{place.name}.{suffix}"] for suffix in ("lora_a", "lora_b"))
        read_a = read_a.T if place.name == "token_embd.weight" else read_a
        rows = place.rows(len(read_b))
        read_b = read_b if rows is None else read_b[rows.argsort()]
        a, b = a.cpu(), b.cpu()
        # ||BA - B'A'|| / ||BA|| by r x r products, without a matrix of the weight's size.
        # B A - B' A' = [B, -B'] [A; A'] is of rank 2 r.
        gap = _norm(torch.cat([b, -read_b], 1), torch.cat([a, read_a], 0))
        largest = max(largest, float(gap / _norm(b, a).clamp_min(1e-30)) if b.any() else float(read_b.abs().max()))
    if not largest <= _BOUNDS[kind]:
        raise MergeError(
            f"an update in {LORA_FILE}, read again, is off by {largest:.1e} of its norm, beyond {_BOUNDS[kind]:.0e}; "
            "write F32"
        )
    return largest


def _norm(b: Tensor, a: Tensor) -> Tensor:
    """||BA||, which is sqrt(tr(A A^T B^T B)); in float64, for what is subtracted is nearly equal."""
    a, b = a.double(), b.double()
    return ((a @ a.T) * (b.T @ b)).sum().clamp_min(0).sqrt()
