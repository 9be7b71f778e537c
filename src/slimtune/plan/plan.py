"""A model, a user's data and a device in; what fits, what it takes, and what to choose, out."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from slimtune.data.lengths import PERCENTILES
from slimtune.data.settings import DataSettings
from slimtune.errors import ConfigError, ModelNotFoundError, check_choice, check_number, check_whole, did_you_mean
from slimtune.models.device import is_emulated, reason_for_float32
from slimtune.models.load import computing_dtype_of, dtype_named_by
from slimtune.plan.beginnings import Beginnings, can_share
from slimtune.plan.build import build, config_of, positions_of, task_of
from slimtune.plan.data import ASSUMED_EXAMPLES, MeasuredData, measure, uniform
from slimtune.plan.devices import AUTO, CPU, Device, find
from slimtune.plan.memory import DRAWN_TOKENS, DTYPES, FSDP2, MemoryPlan, Precision, Setting, Sharing
from slimtune.plan.recommend import BASES, Choice, PlanRequest, recommend
from slimtune.plan.rules import Case
from slimtune.plan.simulate import simulate
from slimtune.plan.table import SIZES
from slimtune.plan.time import Rates, rates_of
from slimtune.quantization.config import is_installed, require_for
from slimtune.recipe.optimizers import DEFAULT
from slimtune.recipe.preference import PREFERENCE_TASKS
from slimtune.storage.source import CLASSIC, PACKAGED

TRAIN_LENGTH = 1024
"""The longest example that `slimtune train` takes by default."""
MODELS = Path(__file__).with_name("models")
TASK_TYPES: dict[str, str | None] = {
    "text": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "seq2seq": "SEQ_2_SEQ_LM",
    "images": None,
}
"""By task of a recipe; the tasks of preferences are for models that write text."""
TASKS = ("text", "classification", "token-classification", "seq2seq", *PREFERENCE_TASKS)


@dataclass(frozen=True)
class PlanReport:
    """The answer: choices in the order in which to consider them, those that fit first.

    Attributes:
        data: the file, None where none was given.
        cut: examples that are longer than the maximum length.
        fields: names of columns, and what they are called in the data.
        stored_dtype: of the base on disk.
        in_16_bits: what would fit in that dtype, where nothing does in float32, which is planned in its place because
            the processor only emulates 16 bits.
        left_out: precisions of the base that weren't planned, because the library that makes them isn't installed.
    """

    model: str
    data: str | None
    request: PlanRequest
    case: Case
    choices: tuple[Choice, ...]
    rates: Rates
    cut: int
    stored_dtype: str
    fields: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[Precision, ...] = ()
    in_16_bits: Choice | None = None

    @property
    def best(self) -> Choice | None:
        """The first choice, None if nothing fits."""
        return next((choice for choice in self.choices if choice.fits), None)

    @property
    def why_float32(self) -> str | None:
        """Why it is planned in float32, in words, where the base is stored in 16 bits that the processor emulates."""
        is_so = self.request.dtype == "float32" and self.request.device.is_cpu and is_emulated(self.stored_dtype, CPU)
        return reason_for_float32(self.stored_dtype) if is_so else None

    def command(self, choice: Choice, output: str = "tuned") -> str:
        """What to type to run a choice."""
        setting = choice.setting
        words = [
            "slimtune",
            "train",
            CLASSIC.get(self.model, self.model),
            self.data or "DATA.jsonl",
            *self._task_words(),
            "--output",
            output,
        ]
        words += [word for name, column in self.fields.items() for word in ("--field", f"{name}={column}")]
        words += ["--method", choice.method]
        words += ["--rank", choice.rank] if choice.rank else []
        words += ["--quantize", choice.base] if choice.base != "dense" else []
        # What is stored, and float32 in place of what is only emulated, are taken by themselves.
        is_auto = self.request.dtype == self.stored_dtype or self.why_float32
        words += [] if is_auto else [f"model.dtype={self.request.dtype}"]
        words += ["--learning-rate", f"{choice.learning_rate:g}", "--batch-size", setting.batch]
        # The batches of a step are those of all devices, which divide them.
        batches = setting.accumulation * self.request.devices
        words += [f"training.gradient_accumulation={batches}"] if batches > 1 else []
        words += ["training.gradient_checkpointing=true"] if setting.gradient_checkpointing else []
        if self.request.share_prefixes is not None:
            words += [f"training.share_prefixes={str(self.request.share_prefixes).lower()}"]
        words += ["training.group_prefixes=true"] if self.request.group_prefixes else []
        words += [f"training.optim={setting.optimizer}"] if setting.optimizer != DEFAULT else []
        words += ["--epochs", f"{self.request.epochs:g}"] if self.request.epochs != PlanRequest.epochs else []
        words += ["--max-length", setting.sequence] if self.cut or setting.sequence > TRAIN_LENGTH else []
        words += [f"data.too_long={'drop' if self.request.task == 'grpo' else 'truncate'}"] if self.cut else []
        return shlex.join(str(word) for word in words)

    def _task_words(self) -> list[str]:
        """The settings of a task that the data doesn't show."""
        request = self.request
        words = [f"task={request.task}"] if request.task in ("seq2seq", *PREFERENCE_TASKS) else []
        if request.task == "grpo":
            words += [f"preferences.generations={request.generations}"]
            words += [f"preferences.max_new_tokens={request.answer}"] if request.answer else []
        return words

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain types, for JSON."""
        lengths, device = self.request.lengths, asdict(self.request.device)
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
            "device": device | {"room_bytes": self.request.device.room_bytes, "margin": self.request.device.margin},
            "devices": self.request.devices,
            "sharing": self.request.sharing.label if self.request.devices > 1 else None,
            "goal": self.request.goal,
            "task": self.request.task,
            "data": data if self.data else None,
            "assumed": None if self.data else {"examples": lengths.examples, "tokens_each": self.request.sequence},
            "rates": asdict(self.rates),
            "fits": self.best is not None,
            "left_out": list(self.left_out),
            "dtype": self.request.dtype,
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
            "is_tight": choice.is_tight,
            "needed_bytes": choice.needed_bytes,
            "runtime_bytes": choice.runtime_bytes,
            "parts": choice.parts.named(),
            "merge_bytes": choice.merge_bytes,
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
            "computed_share": setting.shared.share if setting.shared else None,
            "max_length": setting.sequence,
            "padding_waste": self.request.lengths.padding_waste(batch),
            "packing_gain": self.request.lengths.packing_gain(setting.sequence, batch),
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
    sharing: Sharing = FSDP2,
    served_on: str | Device | None = None,
    memory_gb: float | None = None,
    price_per_hour: float | None = None,
    trust_remote_code: bool = False,
    task: str = "auto",
    max_new_tokens: int | None = None,
    generations: int | None = None,
    optim: str = DEFAULT,
    attention: str | None = None,
    evaluation: bool = False,
    merge: bool = False,
    share_prefixes: bool | None = None,
    group_prefixes: bool = False,
) -> PlanReport:
    """What tuning a model takes on a device, by method, and which to choose. No weights are read and no GPU is needed.

    Args:
        model: a folder with a config.json, a Hub id, a packaged name, one of the classic table's models, or a config.
        data: the file to train on; without one, a thousand examples of `max_length` tokens.
        device: by name, "auto" or "cpu".
        goal: "task", "quality", "fast", "domain" or "tiny".
        methods: names of `slimtune methods`; None for those that the goal suggests.
        bases: "dense", or what `quantize` takes in `slimtune.load`; None for dense, NF4 and int8.
        devices: GPUs that share the training; what they exchange and hold is an estimate.
        sharing: how they share it: FSDP2, or a copy for each.
        served_on: where the result has to run, if that is tighter.
        task: as a recipe names it; auto is found by looking at the data, or by the model where there is none.
        max_new_tokens: of an answer that grpo draws (512), or a decoder writes (as many as the data has).
        generations: answers that grpo draws to each prompt (8).
        optim: the optimizer, as `training.optim` of a recipe names it.
        attention: "sdpa" or "eager"; None for what transformers takes.
        evaluation: count an evaluation step too, on batches of the same size.
        merge: simulate merging the adapter too.
        share_prefixes: whether what rows begin with alike is computed once; None where it pays, as in training.
        group_prefixes: whether batches are drawn of examples that begin alike.

    Raises:
        ModelNotFoundError: no configuration, or one that needs code from the model's folder.
        ConfigError: an unknown device, method or goal, or settings that can't be.
        MissingDependencyError: what is asked for is made by a library that isn't installed.
        DataError: data that can't be read or lacks the fields.
    """
    _check(rank, batch_size, gradient_accumulation, max_length, epochs, devices)
    chosen = _device(device).changed(memory_gb, price_per_hour)
    # Asked first: a device without a link is a mistake that needs no simulation to tell.
    if devices > 1:
        chosen.link()
    config = read_config(model, trust_remote_code)
    stored = _stored_dtype(config)
    is_stored_quantized = getattr(config, "quantization_config", None) is not None
    bases, left_out = _installed(bases) if not is_stored_quantized else (bases, ())
    measured = _measured(model, config, data, task, max_length, trust_remote_code)
    _check_answers(measured.task, max_new_tokens, generations)
    limit = _limit(config, measured, max_length, max_new_tokens)
    lengths, task_type = measured.lengths, task_type_of(measured.task)
    if lengths.labels:
        config.num_labels = len(lengths.labels)
    parameters, numbers_per_rank = count(config, task_type, trust_remote_code)
    request = PlanRequest(
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
        dtype=_dtype(dtype, config, chosen),
        task=measured.task,
        task_type=task_type,
        answer=max_new_tokens or measured.answer,
        generations=generations or Setting.generations,
        optim=optim,
        attention=attention,
        devices=devices,
        is_stored_quantized=is_stored_quantized,
        sharing=sharing,
        parameters=parameters,
        beginnings=beginnings_of(config, measured, limit, share_prefixes, group_prefixes, trust_remote_code),
        share_prefixes=share_prefixes,
        group_prefixes=group_prefixes,
        served_on=_device(served_on) if served_on else None,
        trust_remote_code=trust_remote_code,
    )
    rates = rates_of(chosen)
    simulated = simulation(config, evaluation=evaluation, merge=merge)
    case, choices = recommend(request, simulated, rates, numbers_per_rank)
    named = model if isinstance(model, str) else str(getattr(config, "name_or_path", "") or "MODEL")
    settings = data if isinstance(data, DataSettings) else None
    file = settings.train[0].path if settings else None if data is None else str(data)
    columns = settings.train[0].fields if settings else {}
    report = PlanReport(
        named, file, request, case, tuple(choices), rates, lengths.over(limit), stored, columns, left_out
    )
    if dtype != AUTO or report.best is not None or report.why_float32 is None:
        return report
    smaller = recommend(replace(request, dtype=stored), simulated, rates, numbers_per_rank)[1]
    return replace(report, in_16_bits=next((choice for choice in smaller if choice.fits), None))


def _installed(bases: Sequence[Precision] | None) -> tuple[Sequence[Precision] | None, tuple[Precision, ...]]:
    """The bases to plan, and those of a goal that are left out, because their library isn't installed.

    Raises:
        MissingDependencyError: the library of one that was named.
    """
    for base in bases or ():
        require_for(base)
    if bases is not None:
        return bases, ()
    left_out: tuple[Precision, ...] = tuple(base for base in BASES if not is_installed(base))
    return (tuple(base for base in BASES if base not in left_out) if left_out else None), left_out


def simulation(config: Any, evaluation: bool = False, merge: bool = False) -> Callable[[Setting], MemoryPlan]:
    """The simulator for one model."""

    def run(setting: Setting) -> MemoryPlan:
        others = {field.name: getattr(setting, field.name) for field in fields(setting) if field.name != "method"}
        return simulate(config, setting.method, evaluation=evaluation, merge=merge, **others)

    return run


def read_config(model: Any, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, those of the classic table included; raises as `plan`."""
    if isinstance(model, str) and model in SIZES.values():
        from transformers import AutoConfig

        return AutoConfig.for_model(**json.loads((MODELS / f"{model}.json").read_text(encoding="utf-8")))
    # Organisations on the Hub may have models of such names.
    is_bare = isinstance(model, str) and "/" not in model and model not in PACKAGED and not Path(model).exists()
    if is_bare and (near := did_you_mean(model, SIZES.values())):
        raise ModelNotFoundError(f"no model '{model}'{near}")
    return config_of(model, trust_remote_code)


def beginnings_of(
    config: Any,
    measured: MeasuredData,
    limit: int,
    share_prefixes: bool | None,
    group_prefixes: bool,
    trust_remote_code: bool = False,
) -> Beginnings | None:
    """The examples of which batches share what they begin with; None where nothing is to be shared."""
    task_type = task_type_of(measured.task)
    if share_prefixes is False or not measured.examples or not can_share(config, task_type, trust_remote_code):
        return None
    return Beginnings([row[:limit] for row in measured.examples], group_prefixes)


def parameters_of(config: Any, task_type: str | None, trust_remote_code: bool = False) -> int:
    """Parameters of the model."""
    return sum(p.numel() for p in _shape_of(config, task_type, trust_remote_code).parameters())


def count(config: Any, task_type: str | None, trust_remote_code: bool = False) -> tuple[int, int]:
    """Parameters of the model, and of LoRA of rank 1 on all its linear layers."""
    from slimtune.adapters.model import get_peft_model
    from slimtune.methods.lora.config import LoraConfig

    model = _shape_of(config, task_type, trust_remote_code)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    get_peft_model(model, LoraConfig(r=1, task_type=task_type))
    # Of the factors alone: a new head is trained too, and its size doesn't follow the rank.
    return parameters, sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def _shape_of(config: Any, task_type: str | None, trust_remote_code: bool) -> Any:
    """The model in its shape only."""
    import torch

    with torch.device("meta"):
        return build(copy.deepcopy(config), Setting(trust_remote_code=trust_remote_code), task_type)


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


def _check_answers(task: str, max_new_tokens: int | None, generations: int | None) -> None:
    """See that nothing would be ignored; raises ConfigError."""
    takes = {"max_new_tokens": ("grpo", "seq2seq"), "generations": ("grpo",)}
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("generations", generations, 2)):
        if value is None:
            continue
        check_whole(name, value, least)
        if task not in takes[name]:
            raise ConfigError(
                f"{name} would change nothing with task {task}; leave it out, or pass task {' or '.join(takes[name])}"
            )


def _device(device: str | Device) -> Device:
    return device if isinstance(device, Device) else find(device)


def _dtype(wanted: str, config: Any, device: Device) -> str:
    """The given one; else what training takes on this processor, or the type that a GPU computes in."""
    if wanted != AUTO:
        if wanted not in DTYPES:
            raise ConfigError(f"no dtype '{wanted}'; pass auto, {', '.join(DTYPES)}{did_you_mean(wanted, DTYPES)}")
        return wanted
    if not device.is_cpu:
        return device.half_precision
    computing, stored = computing_dtype_of(config, CPU), _stored_dtype(config)
    return computing if computing != AUTO else stored if stored in DTYPES else device.half_precision


def dtype_on(config: Any, device: Device) -> str:
    """The type of numbers in which a model computes on a device, where none is asked for."""
    return _dtype(AUTO, config, device)


def _stored_dtype(config: Any) -> str:
    return dtype_named_by(config) or "float32"


def task_type_of(task: str) -> str | None:
    """How an adapter's config calls a task; None for images, which it has no name for."""
    return TASK_TYPES.get(task, "CAUSAL_LM")


def _measured(
    model: Any, config: Any, data: str | Path | DataSettings | None, task: str, max_length: int | None, trusts: bool
) -> MeasuredData:
    if task != "auto":
        check_choice("task", task, TASKS)
    if data is not None:
        return measure(data, tokenizer_of(model, trusts), task)
    length = min(n for n in (max_length or TRAIN_LENGTH, positions_of(config)) if n is not None)
    return MeasuredData(task_of(config, trusts) if task == "auto" else task, uniform(length, ASSUMED_EXAMPLES))


def _limit(config: Any, measured: MeasuredData, max_length: int | None, max_new_tokens: int | None) -> int:
    """The most tokens of an example: as given, or the longest that the model has positions for. Raises: ConfigError."""
    positions = positions_of(config)
    longest = max_length or measured.lengths.longest
    if positions is None:
        return longest
    drawn = (max_new_tokens or DRAWN_TOKENS) if measured.task == "grpo" else 0
    if positions - drawn < 2:
        raise ConfigError(
            f"the model has {positions} positions, and answers of {drawn} tokens leave no room for a prompt; pass a "
            "smaller max_new_tokens"
        )
    if max_length is not None and max_length > positions:
        raise ConfigError(f"max_length is {max_length} and the model has {positions} positions; pass a smaller one")
    return min(longest, positions - drawn)


def tokenizer_of(model: Any, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lengths are measured with. Raises: ModelNotFoundError."""
    from slimtune.models.load import load_tokenizer
    from slimtune.storage.source import resolve

    folder = resolve(model) if model in PACKAGED else str(model)
    tokenizer = None if model in SIZES.values() else load_tokenizer(folder, trust_remote_code)
    if tokenizer is None:
        raise ModelNotFoundError(
            f"'{model}' has no tokenizer here, which the lengths of the data need; pass the model's folder, or leave "
            "the data out and give --max-length"
        )
    return tokenizer
