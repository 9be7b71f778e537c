"""The evaluation of a tuned model, as a recipe's section `evaluation` sets it: held-out questions and forgetting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from slimtune.console.progress import Counting
from slimtune.data.tasks.causal_lm import Conversations
from slimtune.errors import ConfigError, SlimtuneError
from slimtune.evaluate.result import Evaluation
from slimtune.evaluate.run import PreparedTask, evaluate, prepare
from slimtune.evaluate.tasks import task_of_rows

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.evaluate.scorers import EvaluationSettings
    from slimtune.recipe.recipe import ModelSettings

FORGETTING = "forgetting.json"


def held_out_questions(settings: EvaluationSettings | None, data: Any) -> PreparedTask | None:
    """The held-out rows as questions; None without settings or rows. Raises: ConfigError, DataError."""
    if settings is None:
        return None
    if not isinstance(data, Conversations):
        raise ConfigError(
            f"evaluation asks models that write text, and this data is for {data.task_type}; its held-out rows are "
            "scored in any case, so leave evaluation out"
        )
    rows = [
        (row, place) for source in data.splits.held_out for row, place in zip(source.rows, source.places, strict=True)
    ]
    if not rows:
        return None
    return prepare(task_of_rows(rows, "held-out rows"), settings)


def evaluate_answers(screen: Console, model: Any, tokenizer: Any, questions: PreparedTask | None) -> Evaluation | None:
    """Score the model's answers. A mistake is printed and not raised: what was learned must still be written."""
    if questions is None:
        return None
    try:
        with Counting(screen) as counting:
            counting.start("asking questions", len(questions.questions))
            evaluation = evaluate(model, tokenizer, questions, progress=counting.reach)
    except SlimtuneError as error:
        screen.print(f"[yellow]not evaluated:[/] {escape(str(error))}; see slimtune evaluate")
        return None
    for remark in evaluation.remarks():
        screen.print(remark, markup=False)
    return evaluation


def measure_forgetting(screen: Console, base: ModelSettings, tuned: Path) -> None:
    """Measure how much worse than its base the tuned model predicts other texts, and write forgetting.json beside it.

    Raises:
        SlimtuneError: one of the two can't be loaded.
    """
    from slimtune.evaluate.domain_texts import texts
    from slimtune.evaluate.forgetting import in_words, measure
    from slimtune.evaluate.tuned import Tuned

    loading = {name: getattr(base, name) for name in ("dtype", "device", "trust_remote_code", "quantize")}
    forgetting = measure(Tuned.find(str(tuned), base.source, computes="batches", **loading), texts())
    (tuned / FORGETTING).write_text(json.dumps(forgetting.to_dict(), indent=2) + "\n", encoding="utf-8")
    screen.print(
        f"forgetting: the loss on other texts changed by {forgetting.difference:+.4f} "
        f"({in_words(forgetting.interval)}); {FORGETTING} has each domain",
        markup=False,
    )
