"""Before anything is loaded: does the training of a recipe fit, and if not, what would?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimtune.device import native_dtype, pick_device
from slimtune.errors import PlanError, SlimtuneError
from slimtune.plan.ask import read_config, task_type_of
from slimtune.plan.devices import Device, find, this_device
from slimtune.plan.foresee import foresee
from slimtune.plan.memory import MemoryPlan
from slimtune.plan.setting import Setting
from slimtune.train.method import FULL
from slimtune.train.preference_settings import PREFERENCE_TASKS

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.train.recipe import Recipe


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
