"""A quantized model as a folder, with a report of what it lost: `slim_report.json` and `slim_report.md` beside it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.adapters.merge import Drift, compare_outputs, outputs, probe_inputs
from slimtune.bases import base_of
from slimtune.console.progress import Watch
from slimtune.core.frozen import Base, walk
from slimtune.errors import MergeError
from slimtune.evaluate.language_loss import has_language_loss
from slimtune.models.load import read_as_stored
from slimtune.quantization.report import parts
from slimtune.slim.data import measured_ids
from slimtune.slim.engines import engines_by_format, engines_of
from slimtune.slim.quantize import QuantizeConfig, quantize_
from slimtune.storage.atomic import staged
from slimtune.storage.compressed import ZERO
from slimtune.storage.source import no_weight_bar

_COMPARED = 512
"""Tokens whose logits are kept to compare; those of many would weigh more than the model."""
_REREAD = 1e-3
"""How far the written model may lie from the one that was written, of the logits' norm."""


@dataclass(frozen=True)
class Measured:
    """A model as it is.

    Attributes:
        megabytes: of its tensors.
        perplexity: on the shipped prose; None for a model that predicts no next token.
    """

    megabytes: float
    perplexity: float | None


@dataclass(frozen=True)
class QuantizeReport:
    """What quantization did to a model.

    Attributes:
        before: the model as it was loaded.
        after: as it was written.
        drift: the outputs before and after, on the same inputs.
        bits_per_weight: of the quantized layers, scales included.
        layers: how many were quantized.
        seconds: what quantizing took.
        readers: the programs that read the folder.
        notes: what to know before it is used.
    """

    config: QuantizeConfig
    before: Measured
    after: Measured
    drift: Drift
    bits_per_weight: float
    layers: int
    seconds: float
    readers: Sequence[str]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            ("", "before", "after"),
            ("MB", f"{self.before.megabytes:,.1f}", f"{self.after.megabytes:,.1f}"),
            *(
                [("perplexity on prose", f"{self.before.perplexity:.2f}", f"{self.after.perplexity:.2f}")]
                if self.before.perplexity is not None and self.after.perplexity is not None
                else []
            ),
        ]
        lines = [f"{name:<20} {first:>10} {second:>10}" for name, first, second in rows]
        how = f"{self.config.scheme} by {self.config.method}"
        return "\n".join(
            [
                f"{self.layers:,} layers, {how}, {self.bits_per_weight:.2f} bits a weight, {self.seconds:.0f} s",
                *lines,
                f"outputs: {self.drift}",
                f"read by {', '.join(self.readers)}",
                *self.notes,
            ]
        )


@torch.no_grad()
def quantize_to_folder(
    model: Any,
    tokenizer: Any,
    output: Path,
    config: QuantizeConfig,
    batches: Sequence[Mapping[str, Any]] = (),
    overwrite: bool = False,
    watch: Watch = Watch(),  # noqa: B008 - it has no state
) -> QuantizeReport:
    """Quantize a model in place, write it, read it again and say what was lost.

    Raises:
        ConfigError, DataError: as `quantize_`.
        MergeError: what was written isn't read as it was written; nothing is left then.
        OutputExistsError: the folder holds something.
    """
    with staged(output, overwrite) as folder:
        inputs = _inputs(model, tokenizer)
        before, expected = _measured(model, inputs)
        start = time.perf_counter()
        quantize_(model, config, batches, watch)
        seconds = time.perf_counter() - start
        after, got = _measured(model, inputs)
        with no_weight_bar():
            model.save_pretrained(folder)
            _check_reread(model, folder, inputs[0], got)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        layers, bits = _stored(model)
        readers = engines_of(folder, model, inputs[0])
        drift = compare_outputs(expected, got)
        report = QuantizeReport(config, before, after, drift, bits, layers, seconds, readers, _notes(config, model))
        (folder / "slim_report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
        (folder / "slim_report.md").write_text(f"# Quantized\n\n```text\n{report}\n```\n", encoding="utf-8")
    return report


def _inputs(model: Any, tokenizer: Any) -> list[dict[str, Tensor]]:
    """What the model is measured on: shipped prose, or for what isn't a language model a probe."""
    if tokenizer is not None and has_language_loss(model):
        return [{"input_ids": row.to(model.device)} for row in measured_ids(tokenizer).split(2)]
    probe = probe_inputs(model)
    if probe is None:
        raise MergeError(
            f"no inputs are known for {type(model).__name__}, so that its outputs can't be compared; quantize it in "
            "Python with slimtune.quantize_ and compare them on inputs of your own"
        )
    return [probe]


def _measured(model: Any, inputs: Sequence[dict[str, Tensor]]) -> tuple[Measured, Tensor]:
    """The model's figures and its outputs on the first tokens, a row each."""
    megabytes = parts(model).bytes / 1e6
    first = outputs(model, inputs[0]).flatten(0, -2)[:_COMPARED]
    if len(inputs) == 1 or "input_ids" not in inputs[0]:
        return Measured(megabytes, None), first
    total, count = 0.0, 0
    for batch in inputs:
        ids = batch["input_ids"]
        logits = outputs(model, batch)[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    return Measured(megabytes, math.exp(total / count)), first


def _check_reread(model: Any, folder: Path, inputs: dict[str, Tensor], expected: Tensor) -> None:
    config = type(model.config).from_pretrained(folder)
    options: dict[str, Any] = {"dtype": model.dtype, "use_safetensors": True}
    again = read_as_stored(type(model), str(folder), config, str(model.device), **options)
    got = outputs(again, inputs).flatten(0, -2)[:_COMPARED]
    # Written so that outputs that are no numbers are refused as well.
    if not (got - expected).norm() <= _REREAD * expected.norm():
        raise MergeError(
            "the quantized model, written and read again, gives other outputs than before; nothing was written: please "
            "report the model"
        )


def _stored(model: nn.Module) -> tuple[int, float]:
    """How many linear layers hold codes, and the bits that each of their weights takes."""
    held: list[tuple[Any, Base]] = [(m, base_of(m)) for _, m in walk(model) if base_of(m).dequantizer(m) is not None]
    linear = [(m, base) for m, base in held if base.kind == "linear"]
    weights = sum(math.prod(base.features(m)) for m, base in linear)
    stored = sum(t.nbytes for m, _ in linear for t in (m.weight, m.weight_scale, m._buffers.get(ZERO)) if t is not None)
    return len(linear), 8 * stored / max(1, weights)


def _notes(config: QuantizeConfig, model: Any) -> list[str]:
    notes = []
    if config.head == "int8":
        notes.append("vLLM and transformers have no embedding in int8; for those, quantize with --head keep")
    elif engines_by_format(model):
        doubt = "it" if config.rounds_inputs else "whether their kernels take negative scales"
        notes.append(f"vLLM and SGLang read the format too; {doubt} wasn't tried")
    if "awq" in str(config.method):
        notes.append(
            "AWQ scaled weights and norms: an adapter that was trained on the model before doesn't fit this one; merge "
            "it first"
        )
    return notes
