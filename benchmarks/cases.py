"""What is measured: the cases, the figures that each yields and the ratios that are wanted of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Side = Literal["peft", "ours", "floor", "peft-lora", "ours-lora"]
"""Who does the work; the last two leave DoRA out of a piece of work with it."""


@dataclass(frozen=True)
class Figure:
    """One line of the table: a number that every side reports, and what is wanted of it."""

    label: str
    metric: str
    unit: Literal["s", "ms", "GB"]
    ratio: tuple[Side, Side] = ("peft", "ours")
    at_least: float | None = None
    """Wanted of the ratio."""
    at_most: float | None = None
    """Wanted of the ratio."""
    ours_below: float | None = None
    """Wanted of our own number, in seconds or bytes."""


@dataclass(frozen=True)
class Work:
    """What one process does. It travels to the process as JSON."""

    kind: Literal["train", "adapters"] = "train"
    model: str = "smollm2"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    batch: int = 4
    length: int = 256
    dropout: float = 0.0
    checkpointing: bool = False
    dora: bool = False
    steps: int = 4
    """The first one is warm-up and is thrown away."""
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class Case:
    """A piece of work and the sides that do it, in turns."""

    name: str
    title: str
    work: Work
    sides: tuple[Side, ...]
    figures: tuple[Figure, ...]


def training(
    name: str,
    title: str,
    work: Work,
    *,
    time: float | None = None,
    memory: float | None = None,
    floor: float | None = None,
    with_floor: bool = True,
) -> Case:
    """A case of training steps; `time`, `memory` and `floor` are the ratios wanted, where any are."""
    figures = (
        Figure("step", "step_seconds", "s", at_least=time),
        Figure("peak memory", "peak_bytes", "GB", at_least=memory),
        Figure("above imports", "peak_above_imports_bytes", "GB"),
    )
    if not with_floor:
        return Case(name, title, work, ("peft", "ours"), figures)
    over_floor = (
        Figure("step / floor", "step_seconds", "s", ("ours", "floor"), at_most=floor),
        Figure("peak / floor", "peak_bytes", "GB", ("ours", "floor")),
    )
    return Case(name, title, work, ("peft", "ours", "floor"), figures + over_floor)


def dora(name: str, title: str, work: Work, at_most: float) -> Case:
    """A case of training steps with DoRA; `at_most` is what it may cost over LoRA, in time and in memory."""
    figures = (
        Figure("step", "step_seconds", "s"),
        Figure("peak memory", "peak_bytes", "GB"),
        Figure("step / LoRA", "step_seconds", "s", ("ours", "ours-lora"), at_most=at_most),
        Figure("peak / LoRA", "peak_bytes", "GB", ("ours", "ours-lora"), at_most=at_most),
        Figure("step / LoRA, peft", "step_seconds", "s", ("peft", "peft-lora")),
        Figure("peak / LoRA, peft", "peak_bytes", "GB", ("peft", "peft-lora")),
    )
    return Case(name, title, work, ("peft-lora", "ours-lora", "ours", "peft"), figures)


def quick(case: Case) -> Case:
    """The same case made small: to see that everything runs, not to be quoted."""
    return replace(case, work=replace(case.work, batch=1, length=min(case.work.length, 64), steps=2))


CPU_CASES = (
    training("bf16", "bf16", Work(), time=1.5, memory=1.7, floor=1.1),
    training("fp32", "fp32", Work(dtype="float32"), time=1.3, memory=1.3),
    # No floor of its own: without adapters there is nothing to drop, so it is the floor of bf16.
    training("dropout", "bf16, dropout 0.05", Work(dropout=0.05), time=1.6, memory=1.9, with_floor=False),
    training("checkpointing", "bf16, gradient checkpointing", Work(checkpointing=True), time=1.3, memory=1.3),
    dora("dora", "bf16, DoRA", Work(dora=True), at_most=1.15),
    Case(
        "adapters",
        "adapters",
        Work(kind="adapters"),
        ("peft", "ours"),
        (
            Figure("import", "import_seconds", "ms"),
            Figure("first attach", "attach_first_seconds", "ms"),
            Figure("attach", "attach_seconds", "ms", at_least=3, ours_below=0.1),
            Figure("load", "load_seconds", "ms", at_least=3, ours_below=0.1),
            Figure("load a second", "load_second_seconds", "ms", at_least=3, ours_below=0.1),
            Figure("switch", "switch_seconds", "ms", at_least=3, ours_below=0.005),
        ),
    ),
    training("long", "bf16, batch 1 x 2048", Work(batch=1, length=2048)),
    # Two steps: the weights are random and the step is long; one to warm up and one to measure.
    training("llama-1b", "Llama 1B, bf16, batch 1 x 256", Work(model="llama-1b", batch=1, steps=2)),
)

CUDA_CASES = tuple(
    training(
        f"{model}-cuda",
        f"{model.replace('-', ' ').title()}, bf16, batch 4 x 2048",
        Work(model=model, length=2048, steps=8, device="cuda"),
        time=1.5,
        memory=1.7,
        floor=1.1,
    )
    for model in ("llama-1b", "llama-8b")
)
