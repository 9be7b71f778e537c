"""`slimtune evaluate`: how well a model answers the questions of a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.cli.options import Device, Dtype, Json, Model, Quantize, TrustRemoteCode, console
from slimtune.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.evaluate.result import Evaluation
    from slimtune.evaluate.settings import EvaluationSettings
    from slimtune.evaluate.tasks import Task

SHOTS = "Examples in the prompt"


def evaluate(
    model: Model,
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="JSONL with messages, prompt and completion, or text and label.")
    ],
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
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.", rich_help_panel=SHOTS)] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Ask a base, an adapter or a merged model the questions of a task and score its answers.

    Prints each score with its 95% interval, and the loss of the expected answers. Answers are greedy; of labels, the
    likeliest one is taken.

    Example: slimtune evaluate tuned orders/held_out.jsonl --answers answers.jsonl
    """
    from slimtune.evaluate.in_context import Shots
    from slimtune.evaluate.settings import EvaluationSettings
    from slimtune.evaluate.tasks import open_task

    # All that needs no model comes first: a slip of the pen must not cost a download.
    settings = EvaluationSettings(scorer, max_new_tokens, batch_size, limit, too_long)
    drawn = Shots(shots, pick, seed, random_labels)
    if examples is not None and not shots:
        raise ConfigError("--examples were given, but no --shots; say how many of them stand in the prompt")
    asked = open_task(task, system, limit, seed)
    # Of a task that is made by seed, the examples must be others than the questions.
    former = None if examples is None else open_task(examples, system, None, seed + 1)
    screen = console(as_json)
    options = (dtype, device, trust_remote_code)
    found = _evaluated(screen, model, asked, settings, drawn, former, answers, overwrite, quantize, options)
    if as_json:
        print(json.dumps({"model": model, "task": asked.source, **found.to_dict()}))
    else:
        _show(screen, found)
    if answers is not None:
        screen.print(f"answers written to {answers}", markup=False)


def _evaluated(
    screen: Console, source: str, task: Task, settings: EvaluationSettings, shots: Any, examples: Task | None,
    answers: Path | None, overwrite: bool, quantize: str | None, options: tuple[Any, ...],
) -> Evaluation:  # fmt: skip
    from slimtune.evaluate.answers import AnswerFile, weights_of
    from slimtune.evaluate.labelling import evaluate_classifier, is_classifier
    from slimtune.evaluate.progress import ShownAnswers
    from slimtune.evaluate.run import evaluate as ask
    from slimtune.loading import load_text_model

    about = {"model": weights_of(source), "quantize": quantize, "options": options}
    file = None if answers is None else AnswerFile(answers, about, overwrite)
    if is_classifier(source):
        if shots.count:
            raise ConfigError(f"{source} gives texts labels and reads no examples; leave --shots out")
        found = evaluate_classifier(source, task, settings, quantize, options)
        if file:
            file.finish(found.answers)
        return found
    model, tokenizer = load_text_model(source, *options, quantize=quantize)
    with ShownAnswers(screen) as progress:
        return ask(model, tokenizer, task, settings, shots, examples, progress, file)


def _show(screen: Console, found: Evaluation) -> None:
    from rich.table import Table

    table = Table("score", "value", "95% interval", box=None, padding=(0, 3, 0, 0))
    for name, value in found.scores.items():
        low, high = found.intervals[name]
        table.add_row(name, f"{value:.3f}", f"{low:.3f} to {high:.3f}")
    screen.print(table, soft_wrap=False)
    of = "a text" if found.perplexity is None else "a token of the expected answers"
    perplexity = "" if found.perplexity is None else f", perplexity {found.perplexity:.4g}"
    screen.print(f"loss {found.loss:.4f} {of}{perplexity}; {len(found.answers)} questions in {found.seconds:.0f} s")
    for line in found.remarks():
        screen.print(line, markup=False)
