"""Before anything is loaded: does the training of a recipe fit, and if not, what would?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.data.settings import DataSettings
from slimtune.errors import DoesNotFitError, PlanError, SlimtuneError
from slimtune.models.device import native_dtype, pick_device
from slimtune.plan.build import positions_of
from slimtune.plan.data import measure
from slimtune.plan.devices import Device, find, this_device
from slimtune.plan.memory import MemoryPlan
from slimtune.plan.plan import count, plan, read_config, simulation, task_type_of, tokenizer_of
from slimtune.plan.recommend import Choice
from slimtune.plan.setting import Setting
from slimtune.recipe.method import FULL
from slimtune.recipe.preference import PREFERENCE_TASKS

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.recipe.recipe import Recipe


def refuse_what_does_not_fit(screen: Console, recipe: Recipe, task: str) -> None:
    """Say what the training will take, or why that can't be said.

    Raises:
        DoesNotFitError: with the nearest setting that fits.
        SlimtuneError: a mistake that the training itself would stop at, after the model was loaded.
    """
    try:
        found, where = planned(recipe, task)
    except Exception as error:
        if isinstance(error, SlimtuneError) and not isinstance(error, PlanError):
            raise
        # A plan that can't be made must not stop a training that might work.
        screen.print(f"not planned: {str(error).splitlines()[0] if str(error) else type(error).__name__}", markup=False)
        return
    if found is not None:
        screen.print(
            f"planned: {where.needed_bytes(found.peak_bytes) / 1e9:.1f} GB of {where.memory_bytes / 1e9:.1f} on "
            f"{where.name}"
        )


def planned(recipe: Recipe, task: str, in_full: bool = False) -> tuple[MemoryPlan | None, Device]:
    """The plan and the device that it is for; raises DoesNotFitError, SlimtuneError.

    Args:
        task: what the data is for.
        in_full: plan also what fits by far, for which there is no plan otherwise.
    """
    model = recipe.model
    place = pick_device(model.device).partition(":")[0]
    where = find("cpu") if place == "cpu" else this_device()
    found = foresee(
        model.source, recipe.method.name, recipe.data, _setting(recipe, task, place), where, task,
        model.trust_remote_code, in_full, evaluation=bool(recipe.data.held_out),
    )  # fmt: skip
    return found, where


def _setting(recipe: Recipe, task: str, place: str) -> Setting:
    model, training, task_type = recipe.model, recipe.training, task_type_of(task)
    dtype = model.dtype
    if dtype == "auto":
        dtype = str(getattr(read_config(model.source), "dtype", None) or "float32").removeprefix("torch.")
    is_full = recipe.method.name == FULL
    config = None if is_full else recipe.method.config()
    if config is not None:
        config.task_type = task_type
    return Setting(
        method=config,
        base=model.quantize or "dense",  # type: ignore[arg-type]
        # As `load_for` has it: float32 weights, with products in the machine's own 16 bits.
        dtype="float32" if is_full else dtype,
        autocast=is_full and native_dtype() == "bfloat16",
        batch=training.batch_size,
        sequence=recipe.data.max_length,
        gradient_checkpointing=training.gradient_checkpointing,
        accumulation=training.gradient_accumulation,
        optimizer=training.optim,
        task_type=task_type,
        task=task if task in PREFERENCE_TASKS else None,  # type: ignore[arg-type]
        answer=recipe.preferences.max_new_tokens,
        generations=recipe.preferences.generations or Setting.generations,
        device="cpu" if place == "cpu" else "cuda",
    )


Data = str | Path | DataSettings


def foresee(
    model: str,
    method: str,
    data: Data,
    setting: Setting,
    device: Device,
    task: str = "auto",
    trust_remote_code: bool = False,
    in_full: bool = False,
    evaluation: bool = False,
) -> MemoryPlan | None:
    """The plan of a training, with `setting.sequence` as the longest that is allowed.

    Args:
        task: as a recipe names it.
        evaluation: count the evaluations in between too.
        in_full: plan also where it fits by far; None is returned there otherwise.

    Raises:
        DoesNotFitError: with the numbers, and the nearest setting that does fit.
    """
    config = read_config(model, trust_remote_code)
    positions = positions_of(config) or setting.sequence
    drawn = setting.drawn_tokens if setting.task == "grpo" else 0
    setting = replace(setting, sequence=min(setting.sequence, max(1, positions - drawn)))
    if not in_full and _fits_by_far(config, setting, device):
        return None
    measured = measure(data, tokenizer_of(model, trust_remote_code), task)
    lengths = measured.lengths.within(setting.sequence)
    setting = replace(
        setting,
        sequence=lengths.longest,
        padded=lengths.tokens[0] != lengths.longest,
        answer=setting.answer or measured.answer,
    )
    if lengths.labels:
        config.num_labels = len(lengths.labels)
    found = simulation(config, evaluation)(setting)
    if device.takes(found.peak_bytes):
        return found
    raise DoesNotFitError(_refusal(found, device, _nearest(model, method, data, setting, task, device)))


def _fits_by_far(config: Any, setting: Setting, device: Device) -> bool:
    """Whether a generous bound on everything stays below half of the room, so that no simulation is needed."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    sizes = [getattr(config, name, None) for name in names]
    if not all(isinstance(size, int) for size in sizes) or setting.task_type is None:
        return False
    layers, hidden, inner, heads, vocabulary = (int(size) for size in sizes if isinstance(size, int))
    parameters, _ = count(config, setting.task_type)
    rows = {"dpo": 2, "orpo": 2, "grpo": setting.accumulation}.get(setting.task or "", 1) * setting.batch
    tokens = rows * (setting.sequence + (setting.drawn_tokens if setting.task == "grpo" else 0))
    # Float32 throughout, all of it trained, nothing shared, and attention as a whole matrix.
    each = layers * (40 * hidden + 8 * inner + 4 * heads * setting.sequence) + 4 * vocabulary
    return 16 * parameters + 4 * tokens * each < device.room_bytes / 2


def _nearest(model: str, method: str, data: Data, setting: Setting, task: str, device: Device) -> Choice | None:
    """The same method with a smaller micro-batch, checkpointing or a quantized base; None if nothing helps."""
    options: dict[str, Any] = {"device": device, "methods": (method,), "max_length": setting.sequence, "task": task}
    options["optim"] = setting.optimizer
    if setting.task == "grpo":
        options |= {"max_new_tokens": setting.answer, "generations": setting.generations}
    rank = getattr(setting.method, "r", None) if method in ("lora", "dora") else None
    dtype = setting.dtype if setting.method is not None else "auto"
    report = plan(model, data, rank=rank, dtype=dtype, bases=(setting.base,) if setting.base != "dense" else None,
                  **options)  # fmt: skip
    return report.best


def _refusal(found: MemoryPlan, device: Device, nearest: Choice | None) -> str:
    setting, peak = found.setting, found.peak
    where = f" in {peak.module}" if peak.module else ""
    said = (
        f"the training needs {device.needed_bytes(peak.total) / 1e9:.1f} GB and {device.name} has "
        f"{device.memory_bytes / 1e9:.1f}: batches of {setting.batch} x {setting.sequence} tokens peak in the "
        f"{peak.phase}{where}"
    )
    if nearest is None:
        return f"{said}; nothing of this method fits, see `slimtune plan`, or pass --no-plan to try it all the same"
    fitting = nearest.setting
    options = [f"training.batch_size={fitting.batch}", f"training.gradient_accumulation={fitting.accumulation}"]
    options += ["training.gradient_checkpointing=true"] if fitting.gradient_checkpointing else []
    options += [f"model.quantize={nearest.base}"] if nearest.base != "dense" else []
    return (
        f"{said}; {' '.join(options)} needs {nearest.needed_bytes / 1e9:.1f} GB, or pass --no-plan to try it all the "
        "same"
    )
