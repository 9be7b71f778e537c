"""A model, a user's data and a device in; what fits, what it takes, and what to choose, out."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from slimtune.data.lengths import PERCENTILES, Lengths
from slimtune.data.settings import DataSettings
from slimtune.errors import ConfigError, ModelNotFoundError, check_number, check_whole
from slimtune.plan.build import build, config_of
from slimtune.plan.calibrate import rates_of
from slimtune.plan.classic import SIZES
from slimtune.plan.data import ASSUMED_EXAMPLES, measure, uniform
from slimtune.plan.devices import Device, find
from slimtune.plan.memory import MemoryPlan
from slimtune.plan.recommend import Choice, Wish, recommend
from slimtune.plan.rules import Case
from slimtune.plan.setting import DTYPES, Precision, Setting
from slimtune.plan.time import Rates

TRAIN_LENGTH = 1024
"""The longest example that `slimtune train` takes without being asked."""
MODELS = Path(__file__).with_name("models")


@dataclass(frozen=True)
class Report:
    """The answer: choices in the order in which to consider them, those that fit first.

    Attributes:
        data: the file, None where none was given.
        cut: examples that are longer than the maximum length.
        stored_dtype: of the base on disk.
    """

    model: str
    data: str | None
    wish: Wish
    case: Case
    choices: tuple[Choice, ...]
    rates: Rates
    cut: int
    stored_dtype: str

    @property
    def best(self) -> Choice | None:
        """The first choice, None if nothing fits."""
        return next((choice for choice in self.choices if choice.fits), None)

    def command(self, choice: Choice, output: str = "tuned") -> str:
        """What to type to run a choice."""
        setting = choice.setting
        words = ["slimtune", "train", self.model, self.data or "DATA.jsonl", "--output", output]
        words += ["--method", choice.method]
        words += ["--rank", choice.rank] if choice.rank else []
        words += ["--quantize", choice.base] if choice.base != "dense" else []
        words += ["--dtype", self.wish.dtype] if self.wish.dtype != self.stored_dtype else []
        words += ["--learning-rate", f"{choice.learning_rate:g}", "--batch-size", setting.batch]
        words += ["--gradient-accumulation", setting.accumulation] if setting.accumulation > 1 else []
        words += ["--gradient-checkpointing"] if setting.gradient_checkpointing else []
        words += ["--epochs", f"{self.wish.epochs:g}"] if self.wish.epochs != Wish.epochs else []
        words += ["--max-length", setting.sequence] if self.cut or setting.sequence > TRAIN_LENGTH else []
        words += ["--too-long", "truncate"] if self.cut else []
        return shlex.join(str(word) for word in words)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain types, for JSON."""
        lengths, device = self.wish.lengths, asdict(self.wish.device)
        data = {
            "file": self.data,
            "examples": lengths.examples,
            "tokens": lengths.total,
            "learned_tokens": lengths.learned,
            "longest": lengths.longest,
            "percentiles": {str(share): lengths.percentile(share) for share in PERCENTILES},
            "cut": self.cut,
            "labels": list(lengths.labels),
        }
        return {
            "model": self.model,
            "device": device | {"room_bytes": self.wish.device.room_bytes},
            "goal": self.wish.goal,
            "data": data if self.data else None,
            "assumed": None if self.data else {"examples": lengths.examples, "tokens_each": self.wish.sequence},
            "rates": asdict(self.rates),
            "fits": self.best is not None,
            "choices": [self._choice(choice) for choice in self.choices],
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        setting, peak = choice.setting, choice.plan.peak
        batch = setting.batch
        return {
            "method": choice.method,
            "base": choice.base,
            "fits": choice.fits,
            "peak_bytes": choice.parts.total,
            "needed_bytes": choice.needed_bytes,
            "parts": choice.parts.named(),
            "peak_at": {"phase": peak.phase, "module": peak.module, "operation": peak.operation},
            "parameters": choice.plan.parameters,
            "trainable": choice.plan.trainable,
            "adapter_bytes": choice.adapter_bytes,
            "rank": choice.rank,
            "alpha": 2 * choice.rank if choice.rank else None,
            "learning_rate": choice.learning_rate,
            "batch_size": batch,
            "gradient_accumulation": setting.accumulation,
            "gradient_checkpointing": setting.gradient_checkpointing,
            "max_length": setting.sequence,
            "padding_waste": self.wish.lengths.padding_waste(batch),
            "packing_gain": self.wish.lengths.packing_gain(setting.sequence, batch),
            "time": asdict(choice.duration),
            "reasons": [
                {"rule": r.name, "text": r.text, "evidence": r.evidence, "against": r.against} for r in choice.reasons
            ],
            "engines": [asdict(verdict) for verdict in choice.engines],
            "notes": list(choice.plan.notes),
            "command": self.command(choice),
        }


def plan(
    model: Any,
    data: str | Path | DataSettings | None = None,
    device: str | Device = "auto",
    goal: str = "task",
    methods: Sequence[str] | None = None,
    bases: Sequence[Precision] | None = None,
    rank: int | None = None,
    batch_size: int | None = None,
    gradient_accumulation: int | None = None,
    gradient_checkpointing: bool | None = None,
    max_length: int | None = None,
    epochs: float = 3.0,
    dtype: str = "auto",
    devices: int = 1,
    served_on: str | Device | None = None,
    memory_gb: float | None = None,
    price_per_hour: float | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """What tuning a model takes on a device, by method, and which to choose. No weights are read and no GPU is needed.

    Args:
        model: a folder with a config.json, a Hub id, a packaged name, one of the classic table's models, or a config.
        data: the file to train on; without one, a thousand examples of `max_length` tokens.
        device: by name, "auto" or "cpu".
        goal: "task", "quality", "fast", "domain" or "tiny".
        methods: names of `slimtune methods`; None for those that the goal suggests.
        bases: "dense", "nf4", "int8"; None for all.
        devices: GPUs that share the training.
        served_on: where the result has to run, if that is tighter.

    Raises:
        ModelNotFoundError: no configuration, or one that needs code from the model's folder.
        ConfigError: an unknown device, method or goal, or settings that can't be.
        DataError: data that can't be read or lacks the fields.
    """
    _check(rank, batch_size, gradient_accumulation, max_length, epochs, devices)
    chosen = _device(device).changed(memory_gb, price_per_hour)
    config = read_config(model, trust_remote_code)
    positions = getattr(config, "max_position_embeddings", None)
    lengths, limit = _lengths(model, data, max_length, positions, trust_remote_code)
    if lengths.labels:
        config.num_labels = len(lengths.labels)
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    task_type = "SEQ_CLS" if lengths.labels else "CAUSAL_LM"
    parameters, numbers_per_rank = count(config, task_type)
    wish = Wish(
        device=chosen,
        lengths=lengths.within(limit),
        sequence=min(lengths.longest, limit),
        goal=goal,
        has_data=data is not None,
        epochs=epochs,
        methods=methods,
        bases=bases,
        rank=rank,
        batch=batch_size,
        accumulation=gradient_accumulation,
        checkpointing=gradient_checkpointing,
        dtype=_dtype(dtype, stored, chosen),
        task_type=task_type,
        devices=devices,
        parameters=parameters,
        served_on=_device(served_on) if served_on else None,
    )
    rates = rates_of(chosen)
    case, choices = recommend(wish, simulation(config), rates, numbers_per_rank)
    named = model if isinstance(model, str) else str(getattr(config, "name_or_path", "") or "MODEL")
    said = data.train[0].path if isinstance(data, DataSettings) else None if data is None else str(data)
    return Report(named, said, wish, case, tuple(choices), rates, lengths.over(limit), stored)


def simulation(config: Any) -> Callable[[Setting], MemoryPlan]:
    """The simulator for one model."""
    from slimtune.plan.simulate import simulate

    def run(setting: Setting) -> MemoryPlan:
        others = {field.name: getattr(setting, field.name) for field in fields(setting) if field.name != "method"}
        return simulate(config, setting.method, **others)

    return run


def read_config(model: Any, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, those of the classic table included; raises as `plan`."""
    if isinstance(model, str) and model in SIZES.values():
        from transformers import AutoConfig

        return AutoConfig.for_model(**json.loads((MODELS / f"{model}.json").read_text(encoding="utf-8")))
    return config_of(model, trust_remote_code)


def count(config: Any, task_type: str) -> tuple[int, int]:
    """Parameters of the model, and of LoRA of rank 1 on all its linear layers."""
    import torch

    from slimtune import get_peft_model
    from slimtune.methods.lora import LoraConfig

    parameters, trained = 0, []
    for rank in (1, 2):
        with torch.device("meta"):
            model = build(copy.deepcopy(config), Setting(), task_type)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            get_peft_model(model, LoraConfig(r=rank, task_type=task_type))
        trained.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    # A new head counts in both.
    return parameters, trained[1] - trained[0]


def _check(
    rank: int | None, batch: int | None, accumulation: int | None, length: int | None, epochs: float, devices: int
) -> None:
    named = {"rank": rank, "batch_size": batch, "gradient_accumulation": accumulation, "devices": devices}
    for name, value in named.items():
        if value is not None:
            check_whole(name, value)
    if length is not None:
        check_whole("max_length", length, 2)
    check_number("epochs", epochs, 0, 1e6)
    if epochs == 0:
        raise ConfigError("epochs must be above 0, found 0")


def _device(device: str | Device) -> Device:
    return device if isinstance(device, Device) else find(device)


def _dtype(wanted: str, stored: str, device: Device) -> str:
    """As asked; else as stored on a processor, and in the type that a GPU computes in."""
    if wanted != "auto":
        if wanted not in DTYPES:
            from slimtune.errors import did_you_mean

            raise ConfigError(f"no dtype '{wanted}'; pass auto, {', '.join(DTYPES)}{did_you_mean(wanted, DTYPES)}")
        return wanted
    return stored if device.is_cpu and stored in DTYPES else device.half_precision


def _lengths(
    model: Any,
    data: str | Path | DataSettings | None,
    max_length: int | None,
    positions: int | None,
    trust_remote_code: bool,
) -> tuple[Lengths, int]:
    """The lengths of the data and the maximum: as asked, or the longest example, within the model's positions."""
    if data is None:
        length = min(n for n in (max_length or TRAIN_LENGTH, positions) if n is not None)
        return uniform(length, ASSUMED_EXAMPLES), length
    lengths = measure(data, tokenizer_of(model, trust_remote_code))
    return lengths, min(n for n in (max_length or lengths.longest, positions) if n is not None)


def tokenizer_of(model: Any, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lengths are measured with. Raises: ModelNotFoundError."""
    from slimtune.loading import PACKAGED, load_tokenizer, resolve

    folder = resolve(model) if model in PACKAGED else str(model)
    tokenizer = None if model in SIZES.values() else load_tokenizer(folder, trust_remote_code)
    if tokenizer is None:
        raise ModelNotFoundError(
            f"'{model}' has no tokenizer here, which the lengths of the data need; pass the model's folder, or leave "
            "the data out and give --max-length"
        )
    return tokenizer
