"""`slimtune distill`: a student learns a teacher's distribution, or the answers that it wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.cli.options import (
    BatchSize,
    Epochs,
    Json,
    LearningRate,
    MaxLength,
    MaxSteps,
    Method,
    Overwrite,
    Plans,
    Quantize,
    Rank,
    Resume,
    Seed,
    TrustRemoteCode,
    flags,
    written,
)
from slimtune.cli.train import changed_recipe, show_results, with_options
from slimtune.console.libraries import importing
from slimtune.console.screen import open_screen
from slimtune.errors import ConfigError

if TYPE_CHECKING:
    from slimtune.recipe.recipe import Recipe

OWN = ("beta", "temperature", "alpha", "lmbda", "top_k", "hidden", "max_new_tokens")
"""Options that are keys of the section `distillation`."""
AROUND = ("source", "rest", "data", "output", "overwrite", "resume", "plans", "trust_remote_code", "as_json", "seq_kd",
          "cache")  # fmt: skip
"""Parameters that say how it is run, or what from."""


def distill(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="TEACHER|RECIPE.yaml",
            help="A model or an adapter to learn from, or with --seq-kd a file of answers that any model wrote; or a "
            "recipe with a section distillation.",
        ),
    ],
    rest: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDENT [SECTION.KEY=VALUE]...",
            help="The model that learns: a smaller one, a pruned one, or the teacher's own base. Then any other "
            "setting of a recipe.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 - typer copies it
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="What both read: a file, a folder or an id of the Hub.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")] = None,
    beta: Annotated[float, typer.Option(help="0: forward KL, 1: reverse KL, between them the generalized JSD.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Divides the logits of both.")] = 1.0,
    alpha: Annotated[float, typer.Option(help="Share of the teacher in the loss; the rest is for the labels.")] = 0.5,
    lmbda: Annotated[
        float, typer.Option(help="Share of batches whose answers the student draws itself (on-policy).")
    ] = 0.0,
    top_k: Annotated[
        int | None,
        typer.Option(help="Likeliest tokens of the teacher that are stored; 0 runs it at each step. 64 for texts."),
    ] = None,
    hidden: Annotated[float, typer.Option(help="For classifiers: weight of the hidden states' distance.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer that is drawn or written, in tokens.")] = 128,
    seq_kd: Annotated[
        bool, typer.Option("--seq-kd", help="The teacher writes answers, and the student learns those alone.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="Where the teacher's stored tokens are kept.")
    ] = None,
    method: Method = "lora",
    rank: Rank = None,
    learning_rate: LearningRate = None,
    epochs: Epochs = 3.0,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 1024,
    quantize: Quantize = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    resume: Resume = False,
    plans: Plans = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Teach a student what a teacher knows: its distribution at each token or over labels, or its written answers.

    A distillation is a training run, with all methods and settings of slimtune train, whose loss is alpha *
    temperature^2 * divergence(teacher, student) + (1 - alpha) * cross-entropy. The teacher reads the data once: its
    likeliest tokens are stored (at most 386 bytes a learned token), for all epochs and for other runs on the same
    data. Teacher and student need one tokenizer; with --seq-kd they don't.

    Example: slimtune distill my-adapter pruned --data orders/train.jsonl --output small --max-steps 200

    Example: slimtune distill answers.jsonl smollm2-135m-instruct --seq-kd --output imitation
    """
    with importing():
        from slimtune.pipeline.train import run
        from slimtune.slim.distill import distill as distilled
        from slimtune.storage.atomic import refuse_existing

    if output is not None and not resume:
        refuse_existing(output, overwrite)
    screen = open_screen(as_json)
    recipe = _recipe(ctx, source, rest, data, output, seq_kd).trusting(trust_remote_code)
    if seq_kd:
        recipe = _with_answers(recipe, source, max_new_tokens, screen)
        run(recipe, screen, overwrite, plans, resume)
    else:
        distilled(recipe, screen, overwrite, plans, resume, cache)
    show_results(screen, recipe, as_json)


def _recipe(
    ctx: typer.Context, source: str, rest: list[str], data: str | None, output: Path | None, seq_kd: bool
) -> Recipe:
    """The recipe that the command line says. Raises: ConfigError."""
    from slimtune.recipe.recipe import Recipe
    from slimtune.storage.text_files import is_yaml

    typed = {name: value for name, value in written(ctx).items() if name not in AROUND}
    target = {} if output is None else {"output": str(output)}
    if is_yaml(source):
        strange = [*typed, *(["data"] if data else []), *(["seq_kd"] if seq_kd else [])]
        return changed_recipe(Path(source), strange, rest, target, "distillation")
    if not rest or "=" in rest[0]:
        raise ConfigError(f"no student was named to learn from {source}; pass a model behind it")
    if output is None:
        raise ConfigError("no folder was named to write; pass --output DIR")
    own = {name: typed.pop(name) for name in OWN if name in typed}
    sections: dict[str, Any] = {"model": {"name": rest[0]}, **target}
    if seq_kd:
        idle = [name for name in own if name != "max_new_tokens" or _is_file_of_answers(source)]
        if idle:
            raise ConfigError(f"{flags(idle)} would change nothing where written answers are learned; leave it out")
        data = _data_of_imitation(source, data)
    else:
        if _is_file_of_answers(source):
            raise ConfigError(f"{source} is a file, which has no distribution; learn its answers with --seq-kd")
        sections["distillation"] = {"teacher": source, **own}
    if data is None:
        raise ConfigError(f"no data was named to learn {source} on; pass --data FILE")
    return Recipe.of(with_options(sections | {"data": {"train": data}}, typed, rest[1:]))


def _is_file_of_answers(source: str) -> bool:
    return Path(source).is_file()


def _data_of_imitation(source: str, data: str | None) -> str | None:
    """The file of answers itself, or the data whose prompts the teacher is to answer. Raises: ConfigError."""
    if not _is_file_of_answers(source):
        return data
    if data is not None:
        raise ConfigError(f"{source} has prompts and answers already; leave --data {data} out")
    return source


def _with_answers(recipe: Recipe, teacher: str, max_new_tokens: int, screen: Any) -> Recipe:
    """The recipe on answers that the teacher has written, or on the file of them that was named."""
    from slimtune.data.settings import Source
    from slimtune.models.load import LoadOptions
    from slimtune.slim.answers import answers_beside, write_answers

    if _is_file_of_answers(teacher):
        return recipe
    path = answers_beside(Path(recipe.output))
    base = recipe.model
    options = LoadOptions(device=base.device, trust_remote_code=base.trust_remote_code, computes="batches")
    write_answers(teacher, recipe.data, path, screen, max_new_tokens, options)
    return replace(recipe, data=replace(recipe.data, train=(Source(str(path)),)))
