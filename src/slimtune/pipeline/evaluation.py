"""What a recipe wants to know once the model is tuned: its answers to held-out questions, and what it forgot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from slimtune.console.progress import Counting
from slimtune.data.tasks.causal_lm import Conversations
from slimtune.errors import ConfigError, SlimtuneError
from slimtune.evaluate.result import Evaluation
from slimtune.evaluate.run import Prepared, evaluate, prepare
from slimtune.evaluate.tasks import task_of_rows

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.recipe.recipe import Recipe

FORGETTING = "forgetting.json"


def held_out_questions(recipe: Recipe, data: Any) -> Prepared | None:
    """The held-out rows as questions, None where nobody asks; raises ConfigError, DataError for what can't be asked."""
    if recipe.evaluation is None:
        return None
    if not isinstance(data, Conversations):
        raise ConfigError(
            f"evaluation asks models that write text, and this data is for {data.task_type}; its held-out rows are "
            "scored in any case, so leave evaluation out"
        )
    rows = [(row, place) for part in data.parts.held_out for row, place in zip(part.rows, part.places, strict=True)]
    if not rows:
        return None
    return prepare(task_of_rows(rows, "held-out rows"), recipe.evaluation)


def ask(screen: Console, model: Any, tokenizer: Any, questions: Prepared | None) -> Evaluation | None:
    """The scores of the answers. A mistake is told and no more: what was learned must still be written."""
    if questions is None:
        return None
    try:
        with Counting(screen) as counting:
            counting.start("asking questions", len(questions.questions))
            found = evaluate(model, tokenizer, questions, progress=counting.reach)
    except SlimtuneError as error:
        screen.print(f"[yellow]not evaluated:[/] {escape(str(error))}; see slimtune evaluate")
        return None
    for remark in found.remarks():
        screen.print(remark, markup=False)
    return found


def measure_forgetting(screen: Console, recipe: Recipe) -> None:
    """Measure what the tuned model lost on texts of other domains, and write forgetting.json; raises SlimtuneError."""
    from slimtune.evaluate.domain_texts import texts
    from slimtune.evaluate.forgetting import in_words, measure
    from slimtune.evaluate.tuned import Tuned

    model = recipe.model
    how = {"device": model.device, "trust_remote_code": model.trust_remote_code, "quantize": model.quantize}
    tuned = Tuned.find(recipe.output, model.source, dtype=model.dtype, **how)
    found = measure(tuned, texts())
    (Path(recipe.output) / FORGETTING).write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    screen.print(
        f"forgetting: the loss on other texts changed by {found.difference:+.4f} ({in_words(found.interval)}); "
        f"{FORGETTING} has each domain",
        markup=False,
    )
