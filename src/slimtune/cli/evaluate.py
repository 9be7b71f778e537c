"""`slimtune evaluate`: how well a model answers the questions of a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimtune.cli.options import (
    Device,
    Dtype,
    Fields,
    Json,
    Model,
    Quantize,
    TrustRemoteCode,
    columns_of,
    flags,
    written,
)
from slimtune.console.screen import open_screen, print_json
from slimtune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from slimtune.data.settings import Source
    from slimtune.evaluate.answers import AnswerFile
    from slimtune.evaluate.in_context import Shots
    from slimtune.evaluate.model import EvaluatedModel
    from slimtune.evaluate.result import Evaluation
    from slimtune.evaluate.run import PreparedTask
    from slimtune.evaluate.scorers import EvaluationSettings

SHOTS, HARNESS = "Examples in the prompt", "lm-evaluation-harness"
OF_FILES = ("scorer", "system", "max_new_tokens", "too_long", "answers", "overwrite", "examples", "pick", "field")
"""What changes nothing for the tasks of the harness; neither do seed and random_labels."""
OF_TEXTS = ("scorer", "system", "max_new_tokens", "shots", "examples", "pick", "seed", "random_labels")
"""What changes nothing where words are tagged."""


def evaluate(
    ctx: typer.Context,
    model: Model,
    task: Annotated[
        str | None,
        typer.Argument(
            metavar="TASK",
            help="A file with messages, prompt and completion, text and label, or tokens and tags; or a task that is "
            "made, such as reasoning-gym:chain_sum.",
        ),
    ] = None,
    scorer: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="auto (by the kind of task), exact_match, accuracy, json, number, rouge, chrf, several with commas "
            "between, or your own function as path.py:function, which is run.",
        ),
    ] = "auto",
    system: Annotated[
        str, typer.Option(metavar="TEXT", help="Said in front of all questions, in place of their own.")
    ] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only so many questions, from the first on.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The longest answer, in tokens; by default twice the longest expected one."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 32,
    too_long: Annotated[str, typer.Option(help="error, or drop what doesn't fit into the model.")] = "error",
    answers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write each answer with its score as JSONL; goes on where it was killed."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of answers.")] = False,
    shots: Annotated[int, typer.Option(min=0, help="How many.", rich_help_panel=SHOTS)] = 0,
    examples: Annotated[
        str | None, typer.Option(metavar="TASK", help="Where they are taken from.", rich_help_panel=SHOTS)
    ] = None,
    pick: Annotated[str, typer.Option(help="random, or similar to the question.", rich_help_panel=SHOTS)] = "random",
    random_labels: Annotated[
        bool,
        typer.Option("--random-labels", help="Give them wrong answers, as a control.", rich_help_panel=SHOTS),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw, and of tasks that are made.")] = 0,
    lm_eval: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Tasks of the harness in place of TASK.", rich_help_panel=HARNESS),
    ] = None,
    lm_eval_path: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="More tasks, in YAML that may run Python of its own.", rich_help_panel=HARNESS
        ),
    ] = None,
    lm_eval_chat: Annotated[
        bool, typer.Option("--lm-eval-chat", help="Ask in turns of the chat template.", rich_help_panel=HARNESS)
    ] = False,
    field: Fields = [],  # noqa: B006
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Ask a base, an adapter or a merged model the questions of a task and score its answers.

    Prints each score with its 95% interval, and the loss of the expected answers. Answers are greedy; of labels and
    tags, the likeliest one is taken.

    Example: slimtune evaluate tuned orders/held_out.jsonl --answers answers.jsonl
    """
    from slimtune.evaluate.model import EvaluatedModel
    from slimtune.models.load import LoadOptions

    screen, typed = open_screen(as_json), set(written(ctx))
    _refuse_what_changes_nothing(typed, lm_eval, task, shots)
    source = EvaluatedModel(model, LoadOptions(dtype, device, trust_remote_code, quantize, computes="batches"))
    if lm_eval is not None:
        # None and not 0: a task of the harness has a number of its own.
        few = shots if "shots" in typed else None
        evaluation = _by_harness(source, lm_eval.split(","), lm_eval_path, batch_size, limit, few, lm_eval_chat)
    else:
        from slimtune.console.progress import Counting
        from slimtune.data.settings import Source
        from slimtune.evaluate.in_context import Shots
        from slimtune.evaluate.scorers import EvaluationSettings

        assert task is not None
        settings = EvaluationSettings(scorer, max_new_tokens, batch_size, limit, too_long)
        file = None if answers is None else source.answer_file(answers, overwrite)
        columns = columns_of(field)
        if _has_tags(source.name, task, columns):
            evaluation = _tagged(screen, source, Source(task, fields=columns), settings, typed, file)
        else:
            # All that needs no model comes first: a typing mistake must not cost a download.
            prepared = _prepared(task, settings, Shots(shots, pick, seed, random_labels), examples, system, columns)
            with Counting(screen) as counting:
                evaluation = source.evaluate(prepared, counting, file)
    if as_json:
        print_json({"model": model, "task": lm_eval or task, **evaluation.to_dict()})
    else:
        _show(screen, evaluation)
    if answers is not None:
        screen.print(f"answers written to {answers}", markup=False)


def _refuse_what_changes_nothing(typed: set[str], lm_eval: str | None, task: str | None, shots: int) -> None:
    if (lm_eval is None) == (task is None):
        both = "both TASK and --lm-eval were given" if task else "neither TASK nor --lm-eval was given"
        raise ConfigError(f"{both}; pass one of them")
    if lm_eval is not None:
        strangers, where = typed & {*OF_FILES, "seed", "random_labels"}, "with --lm-eval"
    else:
        strangers, where = typed & {"lm_eval_path", "lm_eval_chat"}, "without --lm-eval"
        if not shots and not strangers:
            strangers, where = typed & {"examples", "pick"}, "without --shots"
    _refuse(strangers, where)


def _refuse(strangers: set[str], where: str) -> None:
    if strangers:
        raise ConfigError(f"{flags(strangers)} would change nothing {where}; leave it out")


def _by_harness(
    source: EvaluatedModel, tasks: list[str], folder: Path | None, batch_size: int, limit: int | None,
    shots: int | None, chat_template: bool,
) -> Evaluation:  # fmt: skip
    from slimtune.evaluate.harness import evaluate_by_harness, find_tasks

    manager = find_tasks(tasks, folder)
    return evaluate_by_harness(*source.load(), tasks, batch_size, limit, shots, manager, chat_template)


def _prepared(
    task: str,
    settings: EvaluationSettings,
    shots: Shots,
    examples: str | None,
    instruction: str,
    fields: Mapping[str, str],
) -> PreparedTask:
    from slimtune.evaluate.run import prepare
    from slimtune.evaluate.tasks import open_task

    questions = open_task(task, instruction, settings.limit, shots.seed, fields)
    # Of a task that is made by seed, the examples must be others than the questions.
    former = None if examples is None else open_task(examples, instruction, None, shots.seed + 1, fields)
    return prepare(questions, settings, shots, former)


def _has_tags(model: str, task: str, fields: Mapping[str, str]) -> bool:
    """Whether words are to be tagged; raises ConfigError where model and task don't fit, DataError."""
    from slimtune.data.reading import task_of
    from slimtune.data.settings import Source
    from slimtune.evaluate.labelling import is_tagger
    from slimtune.evaluate.tagger import TASK
    from slimtune.evaluate.tasks import MADE

    has_tags = not task.startswith(MADE) and task_of(Source(task, fields=fields)) == TASK
    if not has_tags and is_tagger(model):
        raise ConfigError(f"{model} gives words tags, and {task} has none; pass rows with tokens and tags")
    return has_tags


def _tagged(
    screen: Console,
    source: EvaluatedModel,
    task: Source,
    settings: EvaluationSettings,
    typed: set[str],
    file: AnswerFile | None,
) -> Evaluation:
    from slimtune.console.progress import Counting
    from slimtune.evaluate.tagger import evaluate_tagger, read_tagged

    _refuse(typed & set(OF_TEXTS), "where words are tagged")
    rows = read_tagged(task, settings.limit)
    with Counting(screen) as counting:
        return evaluate_tagger(source.name, rows, settings, source.options, file, counting.watch)


def _show(screen: Console, evaluation: Evaluation) -> None:
    from rich.table import Table

    table = Table("score", "value", "95% interval", box=None, padding=(0, 3, 0, 0))
    for name, value in evaluation.scores.items():
        bounds = evaluation.intervals.get(name)
        table.add_row(name, f"{value:.3f}", f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else "")
    screen.print(table, soft_wrap=False)
    if evaluation.loss is not None:
        perplexity = "" if evaluation.perplexity is None else f", perplexity {evaluation.perplexity:.4g}"
        screen.print(f"loss {evaluation.loss:.4f} a {evaluation.loss_of}{perplexity}")
    screen.print(f"{evaluation.count} {evaluation.unit} in {evaluation.seconds:.0f} s")
    for kind, scores in evaluation.facts.get("by_kind", {}).items():
        listed = ", ".join(f"{name} {scores[name]:.3f}" for name in ("f1", "precision", "recall"))
        screen.print(f"  {kind}: {listed}, {scores['count']} there", markup=False)
    for line in evaluation.remarks():
        screen.print(line, markup=False)
