"""`slimtune train` plans first: a training that can't fit is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.errors import DoesNotFitError

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.train.settings import TrainSettings


def refuse_what_does_not_fit(
    screen: Console,
    model: str,
    method: str,
    config: Any,
    data: Path,
    task_type: str,
    settings: TrainSettings,
    max_length: int,
    dtype: str,
    quantize: str | None,
    device: str,
    trust_remote_code: bool,
) -> None:
    """Say what the training will take; raises DoesNotFitError, with the nearest setting that fits."""
    from slimtune.plan.devices import find, this_device
    from slimtune.plan.foresee import foresee

    try:
        where = find("cpu") if device == "cpu" else this_device()
        setting = _setting(model, method, config, task_type, settings, max_length, dtype, quantize, device)
        found = foresee(model, method, data, setting, where, trust_remote_code)
    except DoesNotFitError:
        raise
    except Exception as error:
        # A plan that can't be made must not stop a training that might work; mistakes are told by what comes next.
        screen.print(f"not planned: {str(error).splitlines()[0] if str(error) else type(error).__name__}", markup=False)
        return
    if found is not None:
        screen.print(
            f"planned: {where.needed_bytes(found.peak_bytes) / 1e9:.1f} GB of {where.memory_bytes / 1e9:.1f} on "
            f"{where.name}"
        )


def _setting(
    model: str,
    method: str,
    config: Any,
    task_type: str,
    settings: TrainSettings,
    max_length: int,
    dtype: str,
    quantize: str | None,
    device: str,
) -> Any:
    from slimtune.loading import native_dtype
    from slimtune.plan.ask import read_config
    from slimtune.plan.foresee import OPTIMIZERS
    from slimtune.plan.setting import Setting
    from slimtune.train.method import FULL

    if dtype == "auto":
        dtype = str(getattr(read_config(model), "dtype", None) or "float32").removeprefix("torch.")
    is_full = method == FULL
    if not is_full:
        config.task_type = task_type
    return Setting(
        method=None if is_full else config,
        base=quantize or "dense",  # type: ignore[arg-type]
        # As `load_for` has it: float32 weights, with products in the machine's own 16 bits.
        dtype="float32" if is_full else dtype,
        autocast=is_full and native_dtype() == "bfloat16",
        batch=settings.batch_size,
        sequence=max_length,
        gradient_checkpointing=settings.gradient_checkpointing,
        accumulation=settings.gradient_accumulation,
        optimizer=OPTIMIZERS.get(settings.optim, "adamw"),
        task_type=task_type,
        device="cpu" if device == "cpu" else "cuda",
    )
