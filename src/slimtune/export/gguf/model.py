"""A model, with its adapter merged, as a GGUF file that was read again and compared."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slimtune.adapters.merge import Drift, compare_outputs
from slimtune.bases.int8 import LinearW8A8
from slimtune.errors import ConfigError, MissingDependencyError, check_choice
from slimtune.export.gguf.architectures import architecture_of
from slimtune.export.gguf.codes import holds_codes, tensors_with_codes
from slimtune.export.gguf.quantize import KINDS
from slimtune.export.gguf.writer import read_tensors, require_gguf, tensors_of, write_model
from slimtune.export.program import run_program
from slimtune.models.export import outputs_on, probe_batches, refuse_beyond
from slimtune.quantization.dequantize import dequantize
from slimtune.storage.source import no_weight_bar

K_QUANTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
"""Types that llama.cpp's own `llama-quantize` makes out of a file in F16."""

_MAX_KL = {"F32": 1e-4, "F16": 0.01, "BF16": 0.02, "Q8_0": 0.05}
_MAX_KL_FEW_BITS = 1.0
"""How far the answers may drift by default: what the numbers of a type cost, with room."""

MODEL_FILE = "model.gguf"


@dataclass(frozen=True)
class GgufReport:
    """What was written and how near it is; without a drift where nothing could be compared."""

    drift: Drift | None
    notes: list[str] = field(default_factory=list)


def check_kind(kind: str | None) -> None:
    """See that a type can be written on this machine. Raises: ConfigError, MissingDependencyError."""
    require_gguf()
    if kind is None:
        return
    check_choice("the type of a GGUF file", kind, (*KINDS, *K_QUANTS))
    if kind in K_QUANTS:
        _quantizer()


def export_gguf(
    model: Any, tokenizer: Any, folder: Path, kind: str | None, max_kl: float | None, converter: Path | None = None
) -> GgufReport:
    """Write `model.gguf` into a folder; the model can't be used any more then.

    Args:
        model: with adapters, which are merged.
        kind: one of `KINDS` or `K_QUANTS`; None for F16, with the codes of weights that are codes kept as they are.
        max_kl: how far the answers may drift; by default as the type allows.
        converter: llama.cpp's `convert_hf_to_gguf.py`, to be run in place of the writer here.

    Raises:
        ConfigError: the format has no place for the architecture, a tensor or the tokenizer.
        MergeError: the file's answers drift further.
    """
    check_kind(kind)
    if tokenizer is None:
        raise ConfigError("a GGUF file holds its tokenizer, and this model has none; save one into its folder")
    architecture = None if converter else architecture_of(model)
    # Before the merge: what is compared at the end includes what merging loses.
    inputs = probe_batches(model, tokenizer)
    before = outputs_on(model, inputs)
    if hasattr(model, "peft_config"):
        model = model.merge_and_unload()
    path = folder / MODEL_FILE
    full = folder / "full.gguf" if kind in K_QUANTS else path
    written = "F16" if kind is None or kind in K_QUANTS else kind
    # A model whose inputs are rounded has other answers in a file that says nothing of it.
    rounds_inputs = any(isinstance(module, LinearW8A8) for module in model.modules())
    if converter is not None:
        _convert(dequantize(model), tokenizer, full, written, converter)
        notes = ["converted by llama.cpp's own script; its answers were not compared"]
    else:
        assert architecture is not None
        name = os.path.basename(str(getattr(model.config, "_name_or_path", ""))) or "model"
        # bitsandbytes' codes are of other grids than those of blocks.
        tensors, notes = tensors_with_codes(model, kind) if holds_codes(model) else (tensors_of(dequantize(model)), [])
        notes += write_model(full, architecture, model.config, tensors, tokenizer, written, name, _eos_ids(model))
    if kind in K_QUANTS:
        run_program([_quantizer(), str(full), str(path), kind], "llama-quantize")
        full.unlink()
        notes.append(f"quantized by {_quantizer()}")
    if architecture is None:
        return GgufReport(None, notes)
    with torch.no_grad():
        own = tensors_of(dequantize(model))
        for name, tensor in read_tensors(path, architecture, model.config, list(own)):
            # Into the model itself, as the file's numbers decode: transformers then computes what the file says,
            # without llama.cpp.
            own[name].copy_(tensor)
    drift = compare_outputs(before, outputs_on(model, inputs))
    bound = _MAX_KL.get("Q8_0" if rounds_inputs and kind is None else written, _MAX_KL_FEW_BITS)
    bound = max_kl if max_kl is not None else _MAX_KL_FEW_BITS if kind in K_QUANTS else bound
    refuse_beyond(
        bound, drift, f"the model in {kind or 'GGUF'}, written and read again,", "take a type with more bits (--type)"
    )
    return GgufReport(drift, notes)


def _eos_ids(model: Any) -> list[int]:
    """The tokens at which generation stops."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return ids if isinstance(ids, list) else []


def _quantizer() -> str:
    program = shutil.which("llama-quantize")
    if program is None:
        raise MissingDependencyError(
            f"K-quants are made by llama.cpp's llama-quantize, which is not on the PATH; install llama.cpp, or take "
            f"one of {', '.join(KINDS)}"
        )
    return program


def _convert(model: Any, tokenizer: Any, path: Path, kind: str, converter: Path) -> None:
    if not converter.is_file():
        raise ConfigError(f"no converter {converter}; pass llama.cpp's convert_hf_to_gguf.py")
    if kind == "Q4_0":
        raise ConfigError("llama.cpp's converter writes no Q4_0; take F16 or Q8_0, or a K-quant")
    plain = path.with_name("plain")
    with no_weight_bar():
        model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    arguments = [str(plain), "--outfile", str(path), "--outtype", kind.lower()]
    run_program([sys.executable, str(converter), *arguments], converter.name)
    shutil.rmtree(plain)
