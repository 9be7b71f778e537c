"""Intruder dimensions scaled down in a tuned model, written, and what that gave back and cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimtune.errors import ConfigError, check_number
from slimtune.evaluate.forgetting import MAX_LENGTH, Forgetting, all_passages, compare
from slimtune.evaluate.language_loss import Passage, Text, has_language_loss, losses
from slimtune.evaluate.mitigation import (
    Scaling,
    add_scaled_adapter,
    scaled_weights,
    scalings,
    why_no_adapter,
    write_into,
)
from slimtune.evaluate.spectra import Spectra, measure
from slimtune.evaluate.tuned import Tuned
from slimtune.evaluate.updates import Updates, adapter_updates, model_updates
from slimtune.loading import no_weight_bar
from slimtune.staging import staged

ORIGINAL, SCALED = "tuned", "default"
"""What the two adapters are called in one model; the second is written."""


@dataclass(frozen=True)
class Trade:
    """The losses of three models on the same texts, in nats per token.

    Attributes:
        tuned: from the base to the tuned model.
        scaled: from the base to the scaled one.
        change: from the tuned model to the scaled one.
    """

    tuned: Forgetting
    scaled: Forgetting
    change: Forgetting

    @classmethod
    def of(cls, read: Sequence[Passage], base: np.ndarray, tuned: np.ndarray, scaled: np.ndarray) -> Trade:
        """From the summed losses of each passage."""
        return cls(*(compare(read, one, two, worst=0) for one, two in ((base, tuned), (base, scaled), (tuned, scaled))))

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {name: getattr(self, name).to_dict() for name in ("tuned", "scaled", "change")}


@dataclass(frozen=True)
class Mitigated:
    """What was written.

    Attributes:
        kind: "adapter" or "model".
        why_model: why it isn't an adapter, a clause.
        count: how many intruders were scaled.
        left: how many the changed matrices still have.
        outside: the losses on texts of other domains; None for a model without a language loss.
        task: those on the user's texts, if there were any.
    """

    output: Path
    kind: str
    why_model: str
    factor: float
    count: int
    left: int
    spectra: Spectra
    outside: Trade | None
    task: Trade | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "output": str(self.output), "kind": self.kind, "why_model": self.why_model, "factor": self.factor,
            "scaled": self.count, "left": self.left, "seconds": self.seconds,
            "outside": self.outside and self.outside.to_dict(), "task": self.task and self.task.to_dict(),
            "spectra": self.spectra.to_dict(),
        }  # fmt: skip


class _Models:
    """A tuned model, what it was tuned from, and the scaled one that it becomes."""

    def __init__(self, tuned: Tuned) -> None:
        self.tuned = tuned
        self.model, self.tokenizer = tuned.load(ORIGINAL)
        self.base = None if tuned.is_adapter else tuned.load_base()
        self.why_model = why_no_adapter(self.model, ORIGINAL) if tuned.is_adapter else "all weights were tuned"

    def updates(self, embeddings: bool) -> Updates:
        if self.base is None:
            return adapter_updates(self.model, ORIGINAL, embeddings)
        return model_updates(self.base, self.model, embeddings)

    def before_and_after(self, scored: Callable[[Any], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The losses of the base and of the tuned model."""
        after = scored(self.model)
        if self.base is not None:
            return scored(self.base), after
        with self.model.disable_adapter():
            return scored(self.model), after

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
    top: int,
    epsilon: float,
    outside: Mapping[str, Sequence[Text]],
    task: Mapping[str, Sequence[Text]] | None = None,
    as_model: bool = False,
    embeddings: bool = False,
    overwrite: bool = False,
    on_start: Callable[[str, int], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Mitigated:
    """Scale the intruders' singular values by `factor`, write the result, and measure losses before and after.

    A LoRA stays one, of a higher rank where an intruder was scaled; anything else becomes a plain model.

    Args:
        outside: texts of other domains, for forgetting.
        task: texts like those that were learned, for the cost.
        as_model: write a plain model in any case.
        on_start: told what is done next and how many units that has.
        on_step: told how many of them are done.

    Raises:
        ConfigError: there is no intruder, or a number is out of range.
        OutputExistsError: the folder holds something.
    """
    check_number("the factor of the intruders", factor, 0)
    began = time.monotonic()
    start, step = on_start or (lambda what, total: None), on_step or (lambda count: None)
    with staged(output, overwrite) as folder:
        models = _Models(tuned)
        if as_model:
            models.why_model = models.why_model or "a plain model was asked for"
        updates = models.updates(embeddings)
        start("decomposing matrices", len(updates.matrices))
        found = measure(updates, top, epsilon, on_matrix=lambda: step(1))
        if not found.intruders:
            raise ConfigError(
                f"{tuned.source} has no intruder dimensions among the first {top} singular vectors of its matrices "
                f"with epsilon {epsilon:g}, so that there is nothing to scale; raise --epsilon or --top"
            )
        start("scaling matrices", sum(bool(one.intruders) for one in found.matrices))
        changes = scalings(updates, found, factor, lambda: step(1))
        watched = _Losses(models, outside, task or {}, start, step)
        watched.before()
        models.scale(changes)
        watched.after()
        models.save(folder)
    return Mitigated(
        output, "model" if models.why_model else "adapter", models.why_model, factor,
        sum(one.scaled for one in changes), sum(one.left for one in changes), found,
        watched.trade(watched.outside), watched.trade(watched.task), time.monotonic() - began,
    )  # fmt: skip


class _Losses:
    """The losses on all texts: of the base and the tuned model first, then of the scaled one."""

    def __init__(
        self,
        models: _Models,
        outside: Mapping[str, Sequence[Text]],
        task: Mapping[str, Sequence[Text]],
        start: Callable[[str, int], None],
        step: Callable[[int], None],
    ) -> None:
        self.models, self.start, self.step = models, start, step
        self.outside: list[Passage] = []
        self.task: list[Passage] = []
        if has_language_loss(models.model):
            self.outside = all_passages(outside, models.tokenizer, MAX_LENGTH)
            self.task = all_passages(task, models.tokenizer, MAX_LENGTH) if task else []

    def _scored(self, model: Any) -> np.ndarray:
        read = self.outside + self.task
        self.start("reading tokens", sum(len(passage.encoded.input_ids) for passage in read))
        return losses(model, self.models.tokenizer, read, on_batch=self.step).numpy()

    def before(self) -> None:
        if self.outside:
            self.base, self.tuned = self.models.before_and_after(self._scored)

    def after(self) -> None:
        if self.outside:
            self.scaled = self._scored(self.models.model)

    def trade(self, read: list[Passage]) -> Trade | None:
        """The losses on these of the texts."""
        if not read:
            return None
        own = slice(0, len(self.outside)) if read is self.outside else slice(len(self.outside), None)
        return Trade.of(read, self.base[own], self.tuned[own], self.scaled[own])
