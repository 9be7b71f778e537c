"""A tuned model with its intruder dimensions scaled down: found, scaled, measured and written."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimtune.console.progress import Watch
from slimtune.errors import ConfigError, check_number
from slimtune.evaluate.intruders.scale import (
    Scaling,
    add_scaled_adapter,
    scaled_weights,
    scalings,
    why_no_adapter,
    write_into,
)
from slimtune.evaluate.intruders.spectra import Spectra, measure
from slimtune.evaluate.intruders.svd import EPSILON, TOP
from slimtune.evaluate.intruders.trade_off import LossTradeOff, Measurements, ScoreChange, Yardsticks
from slimtune.evaluate.intruders.updates import Updates, adapter_updates, model_updates
from slimtune.evaluate.tuned import Tuned
from slimtune.storage.atomic import staged
from slimtune.storage.source import no_weight_bar

ORIGINAL, SCALED = "tuned", "default"
"""What the two adapters are called in one model; the second is written."""


@dataclass(frozen=True)
class MitigationReport:
    """What was written, and what it is worth.

    Attributes:
        kind: "adapter" or "model".
        why_model: why it isn't an adapter, a clause.
        count: how many intruders were scaled.
        left: how many the changed matrices still have.
        outside: the losses on texts of other domains; None for a model without a language loss.
        task: those on texts of the task, if there were any.
        answered: the task's scores, if its questions were asked.
    """

    output: Path
    kind: str
    why_model: str
    factor: float
    count: int
    left: int
    spectra: Spectra
    outside: LossTradeOff | None
    task: LossTradeOff | None
    answered: ScoreChange | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "output": str(self.output), "kind": self.kind, "why_model": self.why_model, "factor": self.factor,
            "scaled": self.count, "left": self.left, "seconds": self.seconds,
            "outside": self.outside and self.outside.to_dict(), "task": self.task and self.task.to_dict(),
            "answered": self.answered and asdict(self.answered), "spectra": self.spectra.to_dict(),
        }  # fmt: skip


class _Models:
    """A tuned model, what it was tuned from, and the scaled one that it becomes."""

    def __init__(self, tuned: Tuned, as_model: bool) -> None:
        self.tuned = tuned
        self.model, self.tokenizer = tuned.load(ORIGINAL)
        self.base = None if tuned.is_adapter else tuned.load_base()
        self.why_model = why_no_adapter(self.model, ORIGINAL) if tuned.is_adapter else "all weights were tuned"
        if as_model:
            self.why_model = self.why_model or "a plain model was asked for"

    def updates(self, embeddings: bool) -> Updates:
        if self.base is None:
            return adapter_updates(self.model, ORIGINAL, embeddings)
        return model_updates(self.base, self.model, embeddings)

    def measure_before(self, taken: Measurements) -> None:
        """The base and the tuned model."""
        if self.base is not None:
            taken.read("base", self.base)
        else:
            with self.model.disable_adapter():
                taken.read("base", self.model)
        taken.read("tuned", self.model)
        taken.ask("tuned", self.model)

    def scale(self, changes: list[Scaling]) -> None:
        """Make the tuned model the scaled one."""
        if not self.why_model:
            add_scaled_adapter(self.model, ORIGINAL, SCALED, changes)
            self.model.set_adapter(SCALED, inference_mode=True)
            return
        weights = scaled_weights(changes)
        if self.tuned.is_adapter:
            self.model = self.model.merge_and_unload()
        write_into(self.model, weights)

    def save(self, folder: Path) -> None:
        options = {} if self.why_model else {"selected_adapters": [SCALED]}
        with no_weight_bar():
            self.model.save_pretrained(folder, **options)
        self.tokenizer.save_pretrained(folder)


def mitigate(
    tuned: Tuned,
    factor: float,
    output: Path,
    yardsticks: Yardsticks,
    top: int = TOP,
    epsilon: float = EPSILON,
    as_model: bool = False,
    embeddings: bool = False,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> MitigationReport:
    """Scale the intruders' singular values by `factor`, measure what that does, and write the result.

    A LoRA stays one, of a higher rank where an intruder was scaled; anything else becomes a plain model.

    Raises:
        ConfigError: there is no intruder, or a number is out of range; nothing is written then.
        OutputExistsError: the folder holds something.
    """
    check_number("the factor of the intruders", factor, 0)
    began, watch = time.monotonic(), watch or Watch()
    # Around the loading too: a taken folder is refused before minutes of decomposition.
    with staged(output, overwrite) as folder:
        models = _Models(tuned, as_model)
        spectra, changes = _changes(models.updates(embeddings), tuned.source, factor, top, epsilon, watch)
        taken = Measurements(models.model, models.tokenizer, yardsticks, watch)
        models.measure_before(taken)
        models.scale(changes)
        taken.read("scaled", models.model)
        taken.ask("scaled", models.model)
        models.save(folder)
    return MitigationReport(
        output, "model" if models.why_model else "adapter", models.why_model, factor,
        sum(one.scaled for one in changes), sum(one.left for one in changes), spectra,
        taken.on_outside(), taken.on_task(), taken.answered(), time.monotonic() - began,
    )  # fmt: skip


def _changes(
    updates: Updates, source: str, factor: float, top: int, epsilon: float, watch: Watch
) -> tuple[Spectra, list[Scaling]]:
    watch.start("decomposing matrices", len(updates.matrices))
    spectra = measure(updates, top, epsilon, on_matrix=lambda: watch.step(1))
    if not spectra.intruders:
        raise ConfigError(
            f"{source} has no intruder dimensions among the first {top} singular vectors of its matrices with epsilon "
            f"{epsilon:g}, so that there is nothing to scale; raise --epsilon or --top"
        )
    watch.start("scaling matrices", sum(bool(one.intruders) for one in spectra.matrices))
    return spectra, scalings(updates, spectra, factor, lambda: watch.step(1))
