"""Planning memory: the library's own load, attach and training step, run on tensors without data."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from slimtune.core.config import PeftConfig
from slimtune.errors import ConfigError, PlanError, did_you_mean
from slimtune.plan.build import build, config_of
from slimtune.plan.extrapolate import TraceSummary, cut, extrapolate, find_repeating_blocks
from slimtune.plan.memory import TRAINING, MemoryPlan, Phase, Setting, Snapshot, StoredIntegers, Work, fullest
from slimtune.plan.text_part import whole_of
from slimtune.plan.trace import trace
from slimtune.storage.compressed import is_compressed, read_config

ORDER: tuple[Phase, ...] = (*TRAINING, "merge")


def simulate(
    model: str | Path | Any,
    method: PeftConfig | None = None,
    *,
    evaluation: bool = False,
    merge: bool = False,
    rounded: Callable[[int], int] | None = None,
    whole: bool = False,
    trust_remote_code: bool = False,
    **setting: Any,
) -> MemoryPlan:
    """The memory of one training step, from a model's configuration alone.

    Args:
        model: a folder with config.json, a Hub id, a packaged name, or a configuration of transformers.
        method: the adapter's config, or None for tuning all weights themselves.
        evaluation: simulate an evaluation step too.
        merge: simulate merging the adapter too.
        rounded: what an allocator makes of a number of bytes.
        whole: simulate every block, also where they repeat.
        setting: the fields of `Setting`.

    Raises:
        ModelNotFoundError: the configuration can't be read.
        ConfigError, TargetError: a setting that can't be, or that doesn't go with the model.
    """
    resolved = setting_of(method, setting | {"trust_remote_code": trust_remote_code})
    config = config_of(model, trust_remote_code)
    resolved, notes = as_stored(config, resolved)
    part_of = whole_of(config)
    task_type = resolved.task_type or getattr(method, "task_type", None)
    options: Any = {"evaluation": evaluation, "merge": merge, "rounded": rounded}
    with quiet():
        summary = None
        blocks = (
            None if whole else find_repeating_blocks(config, lambda short: build(short, resolved, task_type), method)
        )
        if blocks is not None:
            # The two depths that `extrapolate` draws its line through.
            small, large = (
                trace(cut(config, depth), resolved, task_type, blocks=blocks, **options) for depth in blocks.depths
            )
            summary = extrapolate(small, large, blocks)
        if summary is None:
            summary = trace(config, resolved, task_type, **options)
    beside = 0 if part_of is None else part_of.other_parameters * getattr(torch, resolved.dtype).itemsize
    notes += () if part_of is None else (part_of.note(beside),)
    return plan_of(summary, resolved, notes, beside)


def setting_of(method: PeftConfig | None, fields: dict[str, Any]) -> Setting:
    """The setting with these fields. Raises: ConfigError."""
    known = [field.name for field in dataclasses.fields(Setting) if field.name != "method"]
    for name in fields.keys() - set(known):
        raise ConfigError(f"a plan has no setting {name!r}{did_you_mean(name, known)}")
    setting = Setting(method=method, **fields)
    if method is None and setting.base != "dense":
        raise ConfigError(f"the weights of a {setting.base} base can't be tuned themselves; pass a method's config")
    return setting


def as_stored(config: Any, setting: Setting) -> tuple[Setting, tuple[str, ...]]:
    """The setting for a model that is stored quantized already: that is the base then. Raises: PlanError."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return setting, ()
    how = stored if isinstance(stored, dict) else stored.to_dict()
    if is_compressed(how):
        schemes, ignore = read_config(how)
        del config.quantization_config
        integers = StoredIntegers(tuple(schemes), tuple(ignore))
        if setting.method is None:
            raise ConfigError(f"the weights of a model that is stored as {integers.name} can't be tuned themselves")
        return dataclasses.replace(setting, base="dense", stored=integers), (f"the model is stored as {integers.name}",)
    if how.get("quant_method", "bitsandbytes") != "bitsandbytes":
        raise PlanError(f"the model is stored by {how.get('quant_method')}, which can't be planned; use its dense form")
    base = how.get("bnb_4bit_quant_type", "fp4") if how.get("load_in_4bit") else "int8"
    del config.quantization_config
    nested = bool(how.get("bnb_4bit_use_double_quant"))
    return dataclasses.replace(setting, base=base, double_quantization=nested), (f"the model is stored as {base}",)


def plan_of(summary: TraceSummary, setting: Setting, notes: tuple[str, ...] = (), beside_bytes: int = 0) -> MemoryPlan:
    """The plan that a run comes to, with weights that lie beside what was run."""
    by_phase: dict[Phase, list[Snapshot]] = {}
    for traced in summary.snapshots.values():
        weights = traced.parts.weights + beside_bytes
        snapshot = dataclasses.replace(traced, parts=dataclasses.replace(traced.parts, weights=weights))
        by_phase.setdefault(snapshot.phase, []).append(snapshot)
    return MemoryPlan(
        setting=setting,
        snapshots=tuple(fullest(by_phase[phase]) for phase in ORDER if phase in by_phase),
        activations=summary.activations,
        parameters=summary.counts.parameters,
        trainable=summary.counts.trainable,
        trainable_bytes=summary.counts.trainable_bytes,
        block_bytes=summary.counts.block_bytes,
        trainable_block_bytes=summary.counts.trainable_block_bytes,
        paged_bytes=summary.paged_bytes,
        work=_work(summary, setting),
        notes=(*notes, *summary.notes),
    )


def _work(summary: TraceSummary, setting: Setting) -> dict[Phase, Work]:
    """The work of a step, of which one micro-batch was run."""

    # Forward and backward are the same for each micro-batch; the update comes once a step.
    def times(phase: Phase) -> int:
        return setting.accumulation if phase in ("forward", "backward") else 1

    return {p: Work(w.flops * times(p), w.bytes_moved * times(p)) for p, w in summary.work.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say of a model that won't be used."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)
