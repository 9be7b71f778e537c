"""What `slimtune train` asks before it loads anything: does this fit, and if not, what would?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from slimtune.data.settings import DataSettings
from slimtune.errors import DoesNotFitError
from slimtune.plan.ask import count, plan, read_config, simulation, tokenizer_of
from slimtune.plan.build import positions_of
from slimtune.plan.data import measure
from slimtune.plan.devices import Device
from slimtune.plan.memory import MemoryPlan
from slimtune.plan.recommend import Choice
from slimtune.plan.setting import Setting

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
    options = [f"--batch-size {fitting.batch}", f"--gradient-accumulation {fitting.accumulation}"]
    options += ["--gradient-checkpointing"] if fitting.gradient_checkpointing else []
    options += [f"--quantize {nearest.base}"] if nearest.base != "dense" else []
    return (
        f"{said}; {' '.join(options)} needs {nearest.needed_bytes / 1e9:.1f} GB, or pass --no-plan to try it all the "
        "same"
    )
