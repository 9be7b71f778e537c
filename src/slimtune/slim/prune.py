"""Pruning: a model of the same class with less in it, written as a folder that `from_pretrained` loads.

Each kind of pruning is a file of its own with one function, from a model and calibration batches to the smaller model
and what was done; `KINDS` names them in the order in which they are applied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from slimtune.adapters.merge import compare_outputs, outputs, probe_inputs
from slimtune.console.progress import Watch
from slimtune.errors import ConfigError, DataError, MergeError
from slimtune.evaluate.domain_texts import read_texts, texts
from slimtune.evaluate.language_loss import passages
from slimtune.quantization.report import parts
from slimtune.recipe.validation import STRICT
from slimtune.slim.channels import drop_channels
from slimtune.slim.depth import drop_layers
from slimtune.slim.structure import Batch
from slimtune.slim.weights import WeightPruning, zero_weights
from slimtune.slim.width import drop_kv_groups, narrow_feed_forward
from slimtune.storage.atomic import staged
from slimtune.storage.source import no_weight_bar

REPORT = "slim_report.json"
CALIBRATION_TOKENS, WINDOW, LEAST_TOKENS = 8192, 512, 128


@dataclass(frozen=True)
class PruneConfig:
    """What is left of a model; None leaves it as it is.

    Attributes:
        layers: how many layers.
        ffn: which share of the feed-forward neurons.
        kv_heads: how many key-value heads, each with the query heads that read it.
        channels: which share of the channels of a convolutional network, by torch-pruning; in Python alone, as no
            config can say it.
        weights: which single weights become zero, after all others; the shapes stay.
    """

    layers: int | None = None
    ffn: float | None = None
    kv_heads: int | None = None
    channels: float | None = None
    weights: WeightPruning | None = None

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if all(getattr(self, field.name) is None for field in fields(self)):
            raise ConfigError("nothing was said to prune; give layers, ffn, kv_heads, channels or weights")

    @property
    def needs_data(self) -> bool:
        """Whether anything is chosen by what the model computes."""
        structured = (self.layers, self.ffn, self.kv_heads, self.channels)
        return any(value is not None for value in structured) or bool(self.weights and self.weights.needs_data)


Kind = Callable[[Any, Sequence[Batch], Any, Watch], tuple[Any, dict[str, Any]]]
KINDS: Mapping[str, Kind] = {
    "layers": drop_layers,
    "ffn": narrow_feed_forward,
    "kv_heads": drop_kv_groups,
    "channels": drop_channels,
    "weights": zero_weights,
}


@dataclass(frozen=True)
class PruneReport:
    """What was done, and how large the model was and is."""

    parameters_before: int
    parameters: int
    bytes_before: int
    bytes: int
    done: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return asdict(self)


def prune(
    model: Any,
    config: PruneConfig,
    batches: Sequence[Batch],
    watch: Watch = Watch(),  # noqa: B008 - it has no state
) -> tuple[Any, PruneReport]:
    """A smaller model from a plain one, which stays as it is.

    Args:
        batches: inputs of the model to calibrate on, without padding; `calibration` makes them of texts.

    Raises:
        ConfigError: values out of range, an adapter, weights in few bits, or a model of an unknown structure.
    """
    if getattr(model, "peft_config", None):
        raise ConfigError("the model carries an adapter, which has the shape of its layers; merge it first")
    if not all(tensor.is_floating_point() for tensor in model.parameters()):
        raise ConfigError(f"weights in few bits can't be pruned ({parts(model).line}); pass the model in 16 bits")
    smaller, done = model.eval(), {}
    for name, kind in KINDS.items():
        if (value := getattr(config, name)) is not None:
            smaller, done[name] = kind(smaller, batches, value, watch)
    sizes = [(sum(p.numel() for p in m.parameters()), sum(p.nbytes for p in m.parameters())) for m in (model, smaller)]
    (count, size), (left, bytes_left) = sizes
    return smaller, PruneReport(count, left, size, bytes_left, done)


def batches_for(config: PruneConfig, model: Any, tokenizer: Any, data: Path | None = None) -> list[Batch]:
    """What `prune` calibrates on: `calibration`, or nothing where nothing is chosen by it. Raises: as that."""
    return calibration(model, tokenizer, data) if config.needs_data else []


def calibration(model: Any, tokenizer: Any, data: Path | None = None) -> list[Batch]:
    """Texts as batches of one row each, 8,192 tokens in all; the shipped ones without a file.

    Raises:
        ConfigError: a model that doesn't read texts.
        DataError: the file has too few tokens to calibrate on.
    """
    if tokenizer is None or model.main_input_name != "input_ids":
        raise ConfigError(
            f"a {type(model).__name__} reads no texts; prune it in Python, with batches of its own inputs: "
            "slimtune.slim.prune.prune(model, config, batches)"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
    domains = texts() if data is None else {"data": read_texts(data)}
    rows = [
        one.encoded.input_ids
        for name, own in domains.items()
        for one in passages(name, own, tokenizer, min(WINDOW, positions))
    ]
    # Of all domains some, and the same at each call.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    chosen, tokens = [], 0
    for number in order:
        if tokens >= CALIBRATION_TOKENS:
            break
        chosen.append(
            {
                "input_ids": torch.tensor([rows[number]]),
                "attention_mask": torch.ones(1, len(rows[number]), dtype=torch.long),
            }
        )
        tokens += len(rows[number])
    if tokens < LEAST_TOKENS:
        raise DataError(f"{data} has {tokens} tokens to calibrate on, and {LEAST_TOKENS} are the least; pass more text")
    return chosen


def write_pruned(
    model: Any, tokenizer: Any, report: PruneReport, output: Path, probe: Batch | None = None, overwrite: bool = False
) -> None:
    """Write a plain model folder with its report, read it again and compare; nothing is written if they differ.

    Args:
        probe: what is compared on; pseudo-random inputs without it.

    Raises:
        OutputExistsError: the folder holds something.
        MergeError: what was read again computes something else, or no inputs are known for the model.
    """
    probe = probe_inputs(model) if probe is None else probe
    if probe is None:
        raise MergeError(
            f"no inputs are known for a {type(model).__name__}, so that what is written can't be compared; prune it in "
            "Python and save it with save_pretrained"
        )
    with staged(output, overwrite) as folder, no_weight_bar():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / REPORT).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
        again = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True).to(model.device).eval()
        inputs = {name: value.to(model.device) for name, value in probe.items()}
        drift = compare_outputs(outputs(model, inputs).flatten(0, -2), outputs(again, inputs).flatten(0, -2))
        if not drift.kl <= 1e-4:
            raise MergeError(
                f"the pruned model, written and read again, computes something else ({drift}); report this"
            )
