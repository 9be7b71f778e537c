"""What is measured: the cases, the figures that each yields and the ratios that are wanted of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Side = Literal["peft", "ours", "floor", "peft-lora", "ours-lora", "peft-uncast", "ours-dense"]
"""Who does the work; behind a hyphen, in what their work differs from the case's."""

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "lora": {"dora": False},
    "uncast": {"prepare": False},
    "dense": {"quantize": ""},
}

Codec = Literal["", "nf4-dq", "nf4", "fp4-dq", "fp4", "int8"]
"""How the linear layers of the base are stored; -dq: with double quantization."""


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

    kind: Literal["train", "adapters", "load"] = "train"
    model: str = "smollm2"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    batch: int = 4
    length: int = 256
    dropout: float = 0.0
    checkpointing: bool = False
    dora: bool = False
    quantize: Codec = ""
    prepare: bool = True
    """peft's side calls `prepare_model_for_kbit_training`, as its guide has it."""
    steps: int = 4
    """The first one is warm-up and is thrown away."""
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def is_written_first(self) -> bool:
        """Whether the model of random weights has to lie on disk: it is quantized while it is loaded."""
        return bool(self.quantize) and self.model != "smollm2"


@dataclass(frozen=True)
class Case:
    """A piece of work and the sides that do it, in turns."""

    name: str
    title: str
    work: Work
    sides: tuple[Side, ...]
    figures: tuple[Figure, ...]

    def work_of(self, side: Side) -> Work:
        return replace(self.work, **VARIANTS[side.partition("-")[2]])


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


def dora(name: str, title: str, work: Work, at_most: float | None = None, *, with_peft: bool = True) -> Case:
    """A case of training steps with DoRA; `at_most` is what it may cost over LoRA, in time and in memory."""
    over_lora = (
        Figure("step / LoRA", "step_seconds", "s", ("ours", "ours-lora"), at_most=at_most),
        Figure("peak / LoRA", "peak_bytes", "GB", ("ours", "ours-lora"), at_most=at_most),
    )
    if not with_peft:
        return Case(name, title, work, ("ours-lora", "ours"), over_lora)
    beside_peft = (Figure("step", "step_seconds", "s"), Figure("peak memory", "peak_bytes", "GB"))
    peft_over_lora = (
        Figure("step / LoRA, peft", "step_seconds", "s", ("peft", "peft-lora")),
        Figure("peak / LoRA, peft", "peak_bytes", "GB", ("peft", "peft-lora")),
    )
    sides: tuple[Side, ...] = ("peft-lora", "ours-lora", "ours", "peft")
    return Case(name, title, work, sides, (*beside_peft, *over_lora, *peft_over_lora))


def quantized(name: str, title: str, work: Work, *, time: float, memory: float, dense: float | None = None) -> Case:
    """A case of training steps on a quantized base.

    Args:
        time, memory: the ratios wanted to peft, used as its guide has it; without its casts it is shown besides.
        dense: what the step may cost over LoRA on the base that isn't quantized.
    """
    figures = (
        Figure("step", "step_seconds", "s", at_least=time),
        Figure("peak memory", "peak_bytes", "GB", at_least=memory),
        Figure("above imports", "peak_above_imports_bytes", "GB"),
        Figure("step, peft uncast", "step_seconds", "s", ("peft-uncast", "ours")),
        Figure("peak, peft uncast", "peak_bytes", "GB", ("peft-uncast", "ours")),
        Figure("step / LoRA bf16", "step_seconds", "s", ("ours", "ours-dense"), at_most=dense),
        Figure("peak / LoRA bf16", "peak_bytes", "GB", ("ours", "ours-dense")),
    )
    return Case(name, title, work, ("peft", "peft-uncast", "ours", "ours-dense"), figures)


def loading(name: str, title: str, work: Work) -> Case:
    """Loading a base from a 16-bit folder in fewer bits, beside transformers."""
    figures = (
        Figure("load", "load_seconds", "s", at_least=1),
        Figure("peak memory", "peak_bytes", "GB", at_least=1),
        Figure("above imports", "peak_above_imports_bytes", "GB"),
    )
    return Case(name, title, replace(work, kind="load"), ("peft", "ours"), figures)


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

NF4 = Work(quantize="nf4-dq")
INT8 = Work(quantize="int8")
LLAMA_NF4 = Work(model="llama-1b", quantize="nf4-dq", batch=1, steps=2)

QUANTIZED_CASES = (
    quantized("nf4", "NF4", NF4, time=1.7, memory=2.4, dense=1.15),
    dora("nf4-dora", "NF4, DoRA", replace(NF4, dora=True), at_most=1.25),
    quantized("int8", "int8", INT8, time=1, memory=1),
    # In peft 0.21 the second forward of DoRA on int8 fails: it loses the scales of bitsandbytes' module.
    dora("int8-dora", "int8, DoRA", replace(INT8, dora=True), with_peft=False),
    loading("nf4-load", "loading in NF4", NF4),
    loading("llama-1b-nf4-load", "loading Llama 1B in NF4", LLAMA_NF4),
    Case(
        "llama-1b-nf4",
        "Llama 1B, NF4, loaded and trained, batch 1 x 256",
        LLAMA_NF4,
        ("peft", "ours"),
        (
            Figure("step", "step_seconds", "s"),
            Figure("peak memory", "peak_bytes", "GB"),
            Figure("above imports", "peak_above_imports_bytes", "GB", ours_below=2.2e9),
        ),
    ),
)
"""NF4: always with double quantization."""

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

QUANTIZED_CUDA_CASES = tuple(
    quantized(
        f"llama-8b-nf4{'-checkpointing' if checkpointing else ''}-cuda",
        f"Llama 8B, NF4, batch 2 x 2048{', gradient checkpointing' if checkpointing else ''}",
        replace(NF4, model="llama-8b", batch=2, length=2048, steps=8, device="cuda", checkpointing=checkpointing),
        time=1.7,
        memory=2.4,
        dense=1.15,
    )
    for checkpointing in (False, True)
)
