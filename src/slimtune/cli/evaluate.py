"""`slimtune evaluate`: how well a model answers the questions of a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimtune.cli.options import Device, Dtype, Json, Model, Quantize, TrustRemoteCode, console
from slimtune.errors import ConfigError, listing

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.evaluate.answers import AnswerFile
    from slimtune.evaluate.in_context import Shots
    from slimtune.evaluate.model import EvaluatedModel
    from slimtune.evaluate.result import Evaluation
    from slimtune.evaluate.run import Prepared
    from slimtune.evaluate.settings import EvaluationSettings

SHOTS, HARNESS = "Examples in the prompt", "lm-evaluation-harness"
OF_FILES = ("scorer", "system", "max_new_tokens", "too_long", "answers", "overwrite", "examples", "pick")
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
        typer.Option(min=1, help="The longest answer, in tokens; unless told, twice the longest expected one."),
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

    screen, given = console(as_json), _given(ctx)
    _refuse_what_changes_nothing(given, lm_eval, task, shots)
    source = EvaluatedModel(model, quantize, (dtype, device, trust_remote_code))
    if lm_eval is not None:
        few = shots if "shots" in given else None
        found = _by_harness(source, lm_eval.split(","), lm_eval_path, batch_size, limit, few, lm_eval_chat)
    else:
        from slimtune.console.progress import Counting
        from slimtune.evaluate.in_context import Shots
        from slimtune.evaluate.settings import EvaluationSettings

        assert task is not None
        settings = EvaluationSettings(scorer, max_new_tokens, batch_size, limit, too_long)
        file = None if answers is None else source.answer_file(answers, overwrite)
        if _has_tags(source.name, task):
            found = _tagged(screen, source, task, settings, given, file)
        else:
            # All that needs no model comes first: a slip of the pen must not cost a download.
            prepared = _prepared(task, settings, Shots(shots, pick, seed, random_labels), examples, system)
            with Counting(screen) as counting:
                found = source.evaluate(prepared, counting, file)
    if as_json:
        print(json.dumps({"model": model, "task": lm_eval or task, **found.to_dict()}))
    else:
        _show(screen, found)
    if answers is not None:
        screen.print(f"answers written to {answers}", markup=False)


def _given(ctx: typer.Context) -> set[str]:
    """The options that were written, not those at their defaults."""
    return {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}


def _refuse_what_changes_nothing(given: set[str], lm_eval: str | None, task: str | None, shots: int) -> None:
    if (lm_eval is None) == (task is None):
        both = "both TASK and --lm-eval were given" if task else "neither TASK nor --lm-eval was given"
        raise ConfigError(f"{both}; pass one of them")
    if lm_eval is not None:
        strangers, where = given & {*OF_FILES, "seed", "random_labels"}, "with --lm-eval"
    else:
        strangers, where = given & {"lm_eval_path", "lm_eval_chat"}, "without --lm-eval"
        if not shots and not strangers:
            strangers, where = given & {"examples", "pick"}, "without --shots"
    _refuse(strangers, where)


def _refuse(strangers: set[str], where: str) -> None:
    if strangers:
        options = listing("--" + name.replace("_", "-") for name in strangers)
        raise ConfigError(f"{options} would change nothing {where}; leave it out")


def _by_harness(
    source: EvaluatedModel, tasks: list[str], folder: Path | None, batch_size: int, limit: int | None,
    shots: int | None, chat_template: bool,
) -> Evaluation:  # fmt: skip
    from slimtune.evaluate.harness import evaluate_by_harness, find_tasks

    manager = find_tasks(tasks, folder)
    return evaluate_by_harness(*source.load(), tasks, batch_size, limit, shots, manager, chat_template)


def _prepared(
    task: str, settings: EvaluationSettings, shots: Shots, examples: str | None, instruction: str
) -> Prepared:
    from slimtune.evaluate.run import prepare
    from slimtune.evaluate.tasks import open_task

    asked = open_task(task, instruction, settings.limit, shots.seed)
    # Of a task that is made by seed, the examples must be others than the questions.
    former = None if examples is None else open_task(examples, instruction, None, shots.seed + 1)
    return prepare(asked, settings, shots, former)


def _has_tags(model: str, task: str) -> bool:
    """Whether words are to be tagged; raises ConfigError where model and task don't fit, DataError."""
    from slimtune.data.reading import task_of
    from slimtune.evaluate.labelling import is_tagger
    from slimtune.evaluate.tagger import TASK
    from slimtune.evaluate.tasks import MADE

    has_tags = not task.startswith(MADE) and task_of(task) == TASK
    if not has_tags and is_tagger(model):
        raise ConfigError(f"{model} gives words tags, and {task} has none; pass rows with tokens and tags")
    return has_tags


def _tagged(
    screen: Console,
    source: EvaluatedModel,
    task: str,
    settings: EvaluationSettings,
    given: set[str],
    file: AnswerFile | None,
) -> Evaluation:
    from slimtune.console.progress import Counting
    from slimtune.evaluate.tagger import evaluate_tagger, read_tagged

    _refuse(given & set(OF_TEXTS), "where words are tagged")
    rows = read_tagged(task, settings.limit)
    with Counting(screen) as counting:
        return evaluate_tagger(source.name, rows, settings, source.quantize, source.options, file, counting.watch)


def _show(screen: Console, found: Evaluation) -> None:
    from rich.table import Table

    table = Table("score", "value", "95% interval", box=None, padding=(0, 3, 0, 0))
    for name, value in found.scores.items():
        bounds = found.intervals.get(name)
        table.add_row(name, f"{value:.3f}", f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else "")
    screen.print(table, soft_wrap=False)
    if found.loss is not None:
        perplexity = "" if found.perplexity is None else f", perplexity {found.perplexity:.4g}"
        screen.print(f"loss {found.loss:.4f} a {found.loss_of}{perplexity}")
    screen.print(f"{found.count} {found.asked} in {found.seconds:.0f} s")
    for kind, scores in found.facts.get("by_kind", {}).items():
        told = ", ".join(f"{name} {scores[name]:.3f}" for name in ("f1", "precision", "recall"))
        screen.print(f"  {kind}: {told}, {scores['count']} there", markup=False)
    for line in found.remarks():
        screen.print(line, markup=False)
