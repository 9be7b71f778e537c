"""The memory check: before any weight is loaded, plan what a training takes and refuse one that can't fit.

A bound on parameters and activations settles most cases in no time: for examples as long as they may be, or else for
the user's own. Where it doesn't, one training step is simulated (`slimtune.plan`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slimtune.console.process import this_process
from slimtune.data.settings import DataSettings
from slimtune.errors import DoesNotFitError, PlanError, SlimtuneError
from slimtune.models.device import is_emulated, native_dtype, pick_device
from slimtune.models.load import dtype_named_by
from slimtune.plan.build import positions_of
from slimtune.plan.data import measure_read
from slimtune.plan.devices import HALF_PRECISIONS, Device, find, this_device
from slimtune.plan.memory import MemoryPlan, Setting, Sharing
from slimtune.plan.plan import (
    beginnings_of,
    parameters_of,
    plan,
    read_config,
    simulation,
    task_type_of,
    tokenizer_of,
)
from slimtune.plan.recommend import Choice
from slimtune.recipe.method import FULL
from slimtune.recipe.preference import PREFERENCE_TASKS
from slimtune.train.processes import offloads, shards

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.data.tasks.registry import Data
    from slimtune.recipe.preference import PreferenceSettings
    from slimtune.recipe.recipe import MethodSettings, ModelSettings
    from slimtune.recipe.training import TrainSettings


def check_memory(
    screen: Console,
    model: ModelSettings,
    method: MethodSettings,
    data: DataSettings,
    training: TrainSettings,
    preferences: PreferenceSettings,
    rows: Data,
) -> dict[str, Any] | None:
    """Print the memory that the training takes, or why it can't be planned; arguments as of `plan_training`.

    Returns:
        `needed_bytes`, None where it fits by far, `memory_bytes` of the device and its name; None without a plan.

    Raises:
        DoesNotFitError: with the nearest setting that fits.
        SlimtuneError: a mistake that the training itself would stop at, after the model was loaded.
    """
    try:
        planned, device = plan_training(model, method, data, training, preferences, rows)
    except Exception as error:
        if isinstance(error, SlimtuneError) and not isinstance(error, PlanError):
            raise
        # A plan that can't be made must not stop a training that might work.
        screen.print(f"not planned: {str(error).splitlines()[0] if str(error) else type(error).__name__}", markup=False)
        return None
    needed = None if planned is None else device.needed_bytes(_live_bytes(planned))
    if needed is not None:
        process = this_process()
        several = f", each of {process.count}" if process.count > 1 else ""
        screen.print(f"planned: {needed / 1e9:.1f} GB of {device.memory_bytes / 1e9:.1f} on {device.name}{several}")
    return {"needed_bytes": needed, "memory_bytes": device.memory_bytes, "device": device.name}


def plan_training(
    model: ModelSettings,
    method: MethodSettings,
    data: DataSettings,
    training: TrainSettings,
    preferences: PreferenceSettings,
    rows: Data,
    always: bool = False,
) -> tuple[MemoryPlan | None, Device]:
    """The memory plan of a training, and the device that it is for, or its part for each of several processes.

    Args:
        training: with this process's share of a step.
        rows: what was read of the data.
        always: simulate also what fits by a wide margin; the plan is None there otherwise.

    Raises:
        DoesNotFitError: with the numbers, and the nearest setting that does fit.
        SlimtuneError: data or settings that training would refuse too.
    """
    kind = pick_device(model.device).partition(":")[0]
    device = find("cpu") if kind == "cpu" else this_device()
    process = this_process()
    if device.is_cpu:
        device = replace(device, memory_bytes=device.memory_bytes // process.local_count)
    config = read_config(model.source, model.trust_remote_code)
    setting = _setting(config, model, method, training, preferences, rows.task, data.max_length, kind)
    drawn = setting.drawn_tokens if setting.task == "grpo" else 0
    positions = positions_of(config) or setting.sequence
    setting = replace(setting, sequence=min(setting.sequence, max(1, positions - drawn)))
    parameters = None if always else _parameters(config, setting)
    if parameters is not None and _fits_by_far(config, setting, device, parameters):
        return None, device
    # `setting.sequence` was the longest that is allowed; the user's own examples may all be shorter.
    measured = measure_read(rows, data, tokenizer_of(model.source, model.trust_remote_code))
    lengths = measured.lengths.within(setting.sequence)
    setting = replace(
        setting,
        sequence=lengths.longest,
        padded=lengths.tokens[0] != lengths.longest,
        answer=setting.answer or measured.answer,
    )
    if parameters is not None and _fits_by_far(config, setting, device, parameters):
        return None, device
    if lengths.labels:
        config.num_labels = len(lengths.labels)
    beginnings = beginnings_of(
        config, measured, setting.sequence, training.share_prefixes, training.group_prefixes, model.trust_remote_code
    )
    if beginnings is not None:
        setting = beginnings.shared_in(setting)
    planned = simulation(config, evaluation=bool(data.held_out))(setting)
    if process.count > 1 and not device.takes(live := _live_bytes(planned)):
        raise DoesNotFitError(
            f"each of {process.count} processes needs {device.needed_bytes(live) / 1e9:.1f} GB and {device.name} has "
            f"{device.memory_bytes / 1e9:.1f} for it; slimtune plan --launch says what fits (docs/scale.md), or pass "
            "--no-plan to try it all the same"
        )
    if process.count == 1 and not device.takes(planned.peak_bytes):
        nearest = _nearest(model.source, method.name, data, setting, training.group_prefixes, rows.task, device)
        raise DoesNotFitError(_refusal(planned, device, nearest, _in_stored_dtype(config, setting, device)))
    return planned, device


def _live_bytes(planned: MemoryPlan) -> int:
    """The live tensors of each process at their peak, as accelerate has them share the model."""
    return planned.sharded(this_process().count, Sharing(shards(), offloads())).total


def _setting(
    config: Any,
    model: ModelSettings,
    method: MethodSettings,
    training: TrainSettings,
    preferences: PreferenceSettings,
    task: str,
    max_length: int,
    device: str,
) -> Setting:
    """The training as the simulator takes it, with examples of `max_length` tokens."""
    task_type = task_type_of(task)
    dtype = model.dtype
    if dtype == "auto":
        dtype = dtype_named_by(config) or "float32"
    is_full = method.name == FULL
    adapter = None if is_full else method.config()
    if adapter is not None:
        adapter.task_type = task_type
    return Setting(
        method=adapter,
        base=model.quantize or "dense",  # type: ignore[arg-type]
        # As `pipeline.train.load_for_training` has it: float32 weights, with products in the machine's own 16 bits.
        dtype="float32" if is_full else dtype,
        autocast=is_full and autocasts(model),
        batch=training.batch_size,
        sequence=max_length,
        gradient_checkpointing=training.gradient_checkpointing,
        accumulation=training.gradient_accumulation,
        optimizer=training.optim,
        task_type=task_type,
        task=task if task in PREFERENCE_TASKS else None,  # type: ignore[arg-type]
        answer=preferences.max_new_tokens,
        generations=preferences.generations or Setting.generations,
        device="cpu" if device == "cpu" else "cuda",
        trust_remote_code=model.trust_remote_code,
    )


def autocasts(model: ModelSettings) -> bool:
    """Whether full tuning computes in bf16 over its float32 weights."""
    return (native_dtype(model.device) if model.dtype == "auto" else model.dtype) == "bfloat16"


_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def _parameters(config: Any, setting: Setting) -> int | None:
    """Parameters of a model of which a bound is known; None for others."""
    if setting.task_type is None or not all(isinstance(getattr(config, name, None), int) for name in _SIZES):
        return None
    return parameters_of(config, setting.task_type, setting.trust_remote_code)


def _fits_by_far(config: Any, setting: Setting, device: Device, parameters: int) -> bool:
    """Whether a generous bound on everything stays below half of the room, so that no simulation is needed."""
    layers, hidden, inner, heads, vocabulary = (int(getattr(config, name)) for name in _SIZES)
    rows = {"dpo": 2, "orpo": 2, "grpo": setting.accumulation}.get(setting.task or "", 1) * setting.batch
    tokens = rows * (setting.sequence + (setting.drawn_tokens if setting.task == "grpo" else 0))
    # Float32 throughout, all of it trained (weight, gradient, two moments: 16 bytes), nothing shared, and attention as
    # a whole matrix of `sequence` scores a token and head. Per token: ~40 hidden and ~8 inner activations a layer.
    each = layers * (40 * hidden + 8 * inner + 4 * heads * setting.sequence) + 4 * vocabulary
    return 16 * parameters + 4 * tokens * each < device.room_bytes / 2


def _nearest(
    model: str, method: str, data: DataSettings, setting: Setting, is_grouped: bool, task: str, device: Device
) -> Choice | None:
    """The same method with a smaller micro-batch, checkpointing or a quantized base; None if nothing helps."""
    options: dict[str, Any] = {"device": device, "methods": (method,), "max_length": setting.sequence, "task": task}
    options |= {"share_prefixes": None if setting.shared else False, "group_prefixes": is_grouped}
    options |= {"optim": setting.optimizer, "trust_remote_code": setting.trust_remote_code}
    if setting.task == "grpo":
        options |= {"max_new_tokens": setting.answer, "generations": setting.generations}
    # The planner takes a rank for these alone; others have theirs from their own defaults.
    rank = getattr(setting.method, "r", None) if method in ("lora", "dora") else None
    dtype = setting.dtype if setting.method is not None else "auto"
    bases = (setting.base,) if setting.base != "dense" else None
    return plan(model, data, rank=rank, dtype=dtype, bases=bases, **options).best


def _in_stored_dtype(config: Any, setting: Setting, device: Device) -> MemoryPlan | None:
    """The plan with a base in the 16 bits in which it is stored, where it is planned in float32 and that would fit."""
    stored = dtype_named_by(config)
    if setting.method is None or setting.dtype != "float32" or stored not in HALF_PRECISIONS:
        return None
    planned = simulation(config)(replace(setting, dtype=stored))
    return planned if device.takes(planned.peak_bytes) else None


def _refusal(planned: MemoryPlan, device: Device, nearest: Choice | None, in_16_bits: MemoryPlan | None) -> str:
    """The message of a training that doesn't fit, with what to type for the nearest one that does."""
    setting, peak = planned.setting, planned.peak
    module = f" in {peak.module}" if peak.module else ""
    needs = (
        f"the training needs {device.needed_bytes(peak.total) / 1e9:.1f} GB and {device.name} has "
        f"{device.memory_bytes / 1e9:.1f}: batches of {setting.batch} x {setting.sequence} tokens peak in the "
        f"{peak.phase}{module}"
    )
    if in_16_bits is not None:
        dtype = in_16_bits.setting.dtype
        slower = ", but takes several times as long on this processor" if is_emulated(dtype, setting.device) else ""
        needs += f"; model.dtype={dtype} needs {device.needed_bytes(in_16_bits.peak_bytes) / 1e9:.1f} GB{slower}"
    if nearest is None and in_16_bits is not None:
        return f"{needs}; or pass --no-plan to try it all the same"
    if nearest is None:
        return f"{needs}; nothing of this method fits, see `slimtune plan`, or pass --no-plan to try it all the same"
    fitting = nearest.setting
    words = [f"training.batch_size={fitting.batch}", f"training.gradient_accumulation={fitting.accumulation}"]
    words += ["training.gradient_checkpointing=true"] if fitting.gradient_checkpointing else []
    words += [f"model.quantize={nearest.base}"] if nearest.base != "dense" else []
    return (
        f"{needs}; {' '.join(words)} needs {nearest.needed_bytes / 1e9:.1f} GB, or pass --no-plan to try it all the "
        "same"
    )
