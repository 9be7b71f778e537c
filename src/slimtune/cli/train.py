"""`slimtune train`: a recipe, or options that make one, to a tuned adapter or model in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.cli import proposals
from slimtune.cli.options import TYPED, Fields, Json, Overwrite, Quantize, TrustRemoteCode, columns_of, flags, written
from slimtune.cli.push import push_trained
from slimtune.console.process import this_process
from slimtune.console.screen import open_screen, print_json
from slimtune.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.recipe.recipe import Recipe

WITH_A_RECIPE = ("source", "rest", "output", "overwrite", "resume", "plans", "launch", "trust_remote_code",
                 "push_to_hub", "as_json")  # fmt: skip
"""Parameters that say how a recipe is run, not what it says."""


def train(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE.yaml|MODEL",
            help="A recipe, or a model folder, a Hub id or the packaged [bold]smollm2-135m-instruct[/].",
            autocompletion=proposals.models_and_recipes,
        ),
    ],
    rest: Annotated[
        list[str],
        typer.Argument(
            metavar="[DATA] [SECTION.KEY=VALUE]...",
            help="With a model the data: a file, a folder or a data set of the Hub, in any format that "
            "[bold]slimtune data preview[/] finds. Then any other setting of a recipe.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 - typer copies it
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="The folder to write; by default the recipe's."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="One of those that [bold]slimtune methods[/] lists.", autocompletion=proposals.methods)
    ] = "lora",
    rank: Annotated[int | None, typer.Option("--rank", "--r", help="Rank of the update; 16 for lora.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale is alpha / rank; 2 * rank for lora.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="By default the method's own.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Times through the data.")] = 3.0,
    max_steps: Annotated[int | None, typer.Option(help="Stop after these steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples at once.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Of an example, in tokens.")] = 1024,
    field: Fields = [],  # noqa: B006
    quantize: Quantize = None,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that was broken off, to the same end.")
    ] = False,
    plans: Annotated[
        bool, typer.Option("--plan/--no-plan", help="Refuse what can't fit before anything is loaded.")
    ] = True,
    launch: Annotated[
        str | None,
        typer.Option(
            metavar="N|FILE.yaml|COMMAND",
            help="Train in several processes, one for each GPU: so many, as a file of accelerate says, or as "
            '"torchrun ..." starts them.',
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Push to NAME or ORGANISATION/NAME of the Hub in the end; asked at once."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    r"""Tune a model as a recipe says, or on a file of conversations, of which the answers are learned, or of labels.

    Writes the adapter, the tokenizer with its chat template, the loss curve, a model card, what came out as
    results.json, and the recipe in full, which run again gives the same. Rows with text, label and perhaps text_pair
    train a classifier of whole texts, rows with tokens and tags one of single words; with task=dpo, kto, orpo, grpo or
    seq2seq behind the data, other things are learned. Answers in a passage and images are trained in Python.

    Every other setting is written as section.key=value, the value as YAML: model.device=cpu, data.held_out=0.1,
    data.too_long=drop, method.target_modules=\[q_proj,v_proj], method.lora_dropout=0.05, training.warmup=0.1,
    training.gradient_checkpointing=true, training.optim=adamw_8bit. [bold]slimtune recipe show chat --full[/] lists
    the keys of all sections, [bold]slimtune methods NAME[/] those of a method.

    Example: slimtune train recipe.yaml training.learning_rate=1e-4

    Example: slimtune train smollm2-135m-instruct orders/train.jsonl data.held_out=0.1 --output tuned --max-steps 40

    Example: slimtune train recipe.yaml --launch 4
    """
    from slimtune.pipeline.train import run
    from slimtune.storage.atomic import refuse_existing
    from slimtune.storage.push import check_access
    from slimtune.train.results import RESULTS

    if output is not None and not resume:
        refuse_existing(output, overwrite)
    recipe = _recipe(ctx, source, rest, output).trusting(trust_remote_code)
    repository = check_access(push_to_hub) if push_to_hub and this_process().is_main else None
    if launch is not None:
        raise typer.Exit(_launched(ctx, launch, recipe))
    run(recipe, open_screen(as_json, works_on=True), overwrite, plans, resume)
    if not this_process().is_main:
        return
    results = json.loads((Path(recipe.output) / RESULTS).read_text(encoding="utf-8"))
    say_how_to_use(open_screen(as_json), recipe, results["task_type"])
    if repository:
        results["pushed"] = None
    try:
        if repository:
            results["pushed"] = push_trained(open_screen(as_json), Path(recipe.output), repository)
    finally:
        # A push that fails takes nothing back of the training.
        if as_json:
            print_json({"output": recipe.output, **results})


def _launched(ctx: typer.Context, how: str, recipe: Recipe) -> int:
    """Run the same command without `--launch` in the processes that it names; the exit code."""
    from slimtune.models.device import pick_device
    from slimtune.pipeline.launch import launch

    typed = list(ctx.meta[TYPED])
    place = next(i for i, word in enumerate(typed) if word.partition("=")[0] == "--launch")
    del typed[place : place + (1 if "=" in typed[place] else 2)]
    debug = ["--debug"] if ctx.parent is not None and ctx.parent.params.get("debug") else []
    return launch(how, [*debug, "train", *typed], pick_device(recipe.model.device).partition(":")[0])


def _recipe(ctx: typer.Context, source: str, rest: list[str], output: Path | None) -> Recipe:
    from slimtune.recipe.recipe import Recipe, overridden
    from slimtune.storage.text_files import is_yaml, read_mapping

    typed = {name: value for name, value in written(ctx).items() if name not in WITH_A_RECIPE}
    target = {} if output is None else {"output": str(output)}
    if is_yaml(source):
        if typed:
            raise ConfigError(
                f"{flags(typed)} does not go with a recipe; write settings as section.key=value behind it, for "
                "example training.learning_rate=1e-4"
            )
        return Recipe.of(overridden(read_mapping(Path(source)), rest) | target)
    if not rest or ("=" in rest[0] and not Path(rest[0]).exists()):
        raise ConfigError(f"no data was named to train {source} on; pass a data file behind it, or a recipe.yaml")
    if output is None:
        raise ConfigError("no folder was named to write; pass --output DIR")
    sections = {"model": {"name": source}, "data": {"train": rest[0]}, **target}
    return Recipe.of(with_options(sections, typed, rest[1:]))


def with_options(sections: dict[str, Any], typed: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The sections with the options that were given, then with `section.key=value`; raises ConfigError."""
    from slimtune.recipe.method import FEATURES, field_of, find
    from slimtune.recipe.recipe import USED_BY_FEATURES, overridden, place_of

    method = find(typed.pop("method", "lora"))
    if fields := columns_of(typed.pop("field", [])):
        sections["data"]["fields"] = fields
    sections["method"] = {"name": method.name}
    strangers: list[str] = []
    twice = {f"data.fields.{name}" for name in sections["data"].get("fields", {})}
    for name, value in typed.items():
        place = f"method.{field_of(method, name)}" if name in ("rank", "alpha") else place_of(name)
        section, _, key = place.partition(".")
        is_idle = method.name == FEATURES and section == "training" and key not in USED_BY_FEATURES
        if not key or is_idle:
            strangers.append(name)
        sections[section] = sections.get(section, {}) | {key: value}
        twice.add(place)
    if strangers:
        raise ConfigError(
            f"{flags(strangers)} would change nothing with --method {method.name}; leave it out, or choose a method "
            "that has it (slimtune methods lists them)"
        )
    for place, _, text in (override.partition("=") for override in overrides):
        if place in twice:
            raise ConfigError(
                f"{place}: '{place.rpartition('.')[2]}' is set twice, the second time to '{text}'; set it once"
            )
        twice.add(place)
    return overridden(sections, overrides)


def say_how_to_use(screen: Console, recipe: Recipe, task_type: str) -> None:
    """Print where the output is, and the command that tries it."""
    from slimtune.train.card import use_of

    use = use_of(task_type, recipe.output)
    use += f" --quantize {recipe.model.quantize}" if recipe.model.quantize else ""
    screen.print(f"written to {recipe.output}; try it:  {use}", markup=False)
