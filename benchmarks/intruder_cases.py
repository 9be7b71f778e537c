"""Which methods' spectra are compared, and how each is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.method_cases import TASKS, Method, Task

ALPHA = 16
"""The same for all ranks, so that alpha / r falls with the rank and alpha / sqrt(r) less so."""


def lora(name: str, r: int, **fields: Any) -> Method:
    """A LoRA on all linear layers."""
    fields = {"r": r, "lora_alpha": ALPHA, **fields}
    return Method(name, "LoraConfig", fields, {"orders": 1e-3}, ("target_modules",), in_peft=False)


METHODS = (
    lora("LoRA r=1", 1),
    lora("LoRA r=8", 8),
    lora("LoRA r=64", 64),
    lora("rsLoRA r=64", 64, use_rslora=True),
    lora("DoRA r=8", 8, use_dora=True),
    Method("full", "", {}, {"orders": 1e-4}, in_peft=False),
)


@dataclass(frozen=True)
class Size:
    """How long a run takes.

    Attributes:
        questions: to answer for the score.
        texts: of each domain, for forgetting.
        top: leading singular vectors of each matrix.
    """

    steps: int = 32
    questions: int = 30
    texts: int = 24
    top: int = 100
    layers: int | None = None
    """How many of the model's blocks are decomposed; all without it."""

    def task(self) -> Task:
        """The orders, cut to this size."""
        return replace(TASKS["orders"], steps=self.steps, held_out=self.questions)


def settings_of(method: Method, size: Size) -> dict[str, Any]:
    """What a run depends on; a run under other settings is another run."""
    return {"fields": dict(method.fields), "rate": method.rates["orders"], **asdict(size)}
