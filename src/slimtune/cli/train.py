"""`slimtune train`: a recipe, or options that make one, to a tuned adapter or model in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.cli import proposals
from slimtune.cli.options import (
    TYPED,
    BatchSize,
    Epochs,
    Fields,
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
    columns_of,
    flags,
    written,
)
from slimtune.cli.push import push_trained
from slimtune.console.libraries import importing
from slimtune.console.process import this_process
from slimtune.console.screen import open_screen, print_json
from slimtune.data import template_process
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
    method: Method = "lora",
    rank: Rank = None,
    alpha: Annotated[float | None, typer.Option(help="Scale is alpha / rank; 2 * rank for lora.")] = None,
    learning_rate: LearningRate = None,
    epochs: Epochs = 3.0,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 1024,
    field: Fields = [],  # noqa: B006
    quantize: Quantize = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    resume: Resume = False,
    plans: Plans = True,
    launch: Annotated[
        str | None,
        typer.Option(
            metavar="N|fsdp2|FILE.yaml|COMMAND",
            help="Train in several processes, one for each GPU: so many copies, the model divided among all (fsdp2, "
            'fsdp2-offload), as a file of accelerate says, or as "torchrun ..." starts them.',
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
    # First what checks a recipe: a mistake is told before a Trainer is imported.
    with importing(transformers=False):
        from slimtune.recipe.preference import PREFERENCE_TASKS
        from slimtune.storage.atomic import refuse_existing
        from slimtune.storage.push import check_access

    if output is not None and not resume:
        refuse_existing(output, overwrite)
    recipe = _recipe(ctx, source, rest, output).trusting(trust_remote_code)
    repository = check_access(push_to_hub) if push_to_hub and this_process().is_main else None
    if launch is not None:
        raise typer.Exit(_launched(ctx, launch, recipe))
    template_process.prepare()
    # Tables of `datasets` are for TRL alone: other tasks hand their Trainer lists.
    with importing(*(() if recipe.task in PREFERENCE_TASKS else ("datasets",))):
        from slimtune.pipeline.train import run

    run(recipe, open_screen(as_json, works_on=True), overwrite, plans, resume)
    if this_process().is_main:
        show_results(open_screen(as_json), recipe, as_json, repository)


def _launched(ctx: typer.Context, how: str, recipe: Recipe) -> int:
    """Run the same command without `--launch` in the processes that it names; the exit code."""
    from slimtune.models.device import pick_device
    from slimtune.pipeline.launch import launch

    typed = list(ctx.meta[TYPED])
    # Taken out, or each of the processes would launch as many others.
    place = next(i for i, word in enumerate(typed) if word.partition("=")[0] == "--launch")
    del typed[place : place + (1 if "=" in typed[place] else 2)]
    # It stands in front of the command, and so isn't among the command's own arguments.
    debug = ["--debug"] if ctx.parent is not None and ctx.parent.params.get("debug") else []
    return launch(how, [*debug, "train", *typed], pick_device(recipe.model.device).partition(":")[0])


def _recipe(ctx: typer.Context, source: str, rest: list[str], output: Path | None) -> Recipe:
    with importing(transformers=False):
        from slimtune.recipe.recipe import Recipe
        from slimtune.storage.text_files import is_yaml

    typed = {name: value for name, value in written(ctx).items() if name not in WITH_A_RECIPE}
    target = {} if output is None else {"output": str(output)}
    if is_yaml(source):
        return changed_recipe(Path(source), list(typed), rest, target)
    # A data file may have an equals sign in its name.
    if not rest or ("=" in rest[0] and not Path(rest[0]).exists()):
        raise ConfigError(f"no data was named to train {source} on; pass a data file behind it, or a recipe.yaml")
    if output is None:
        raise ConfigError("no folder was named to write; pass --output DIR")
    sections = {"model": {"name": source}, "data": {"train": rest[0]}, **target}
    return Recipe.of(with_options(sections, typed, rest[1:]))


def changed_recipe(
    path: Path, typed: Sequence[str], overrides: Sequence[str], target: dict[str, str], own: str = ""
) -> Recipe:
    """The recipe of a file, changed by `section.key=value` and by where it writes.

    Args:
        typed: options that make a recipe of their own, of which none goes with a file.
        own: a section whose keys come before those of others, where an option is looked up.

    Raises:
        ConfigError: there are some, or the recipe can't be.
    """
    from slimtune.recipe.recipe import Recipe, overridden, place_of
    from slimtune.storage.text_files import read_mapping

    if typed:
        section = Recipe.sections().get(own)
        is_own = section is not None and typed[0] in section.__dataclass_fields__
        place = f"{own}.{typed[0]}" if is_own else place_of(typed[0])
        raise ConfigError(
            f"{flags(typed)} does not go with a recipe; write settings as section.key=value behind it, for example "
            f"{place or 'method.name'}=..."
        )
    return Recipe.of(overridden(read_mapping(path), overrides) | target)


def with_options(sections: dict[str, Any], typed: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The sections with the options that were given, then with `section.key=value`; raises ConfigError."""
    from slimtune.recipe.method import FEATURES, field_of, find
    from slimtune.recipe.recipe import USED_BY_FEATURES, overridden, place_of

    method = find(typed.pop("method", "lora"))
    if fields := columns_of(typed.pop("field", [])):
        sections["data"]["fields"] = fields
    sections["method"] = {"name": method.name}
    strangers: list[str] = []
    # Options and overrides are one list of settings: the second one of a key isn't allowed to win in silence.
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


def show_results(screen: Console, recipe: Recipe, as_json: bool, repository: str | None = None) -> None:
    """Print where the output is and the command that tries it, and for machines what came out.

    Args:
        repository: of the Hub, where the output is pushed.
    """
    from slimtune.train.card import use_of
    from slimtune.train.results import RESULTS

    results = json.loads((Path(recipe.output) / RESULTS).read_text(encoding="utf-8"))
    use = use_of(results["task_type"], recipe.output)
    use += f" --quantize {recipe.model.quantize}" if recipe.model.quantize else ""
    screen.print(f"written to {recipe.output}; try it:  {use}", markup=False)
    if repository:
        results["pushed"] = None
    try:
        if repository:
            results["pushed"] = push_trained(screen, Path(recipe.output), repository)
    finally:
        # A push that fails takes nothing back of the training.
        if as_json:
            print_json({"output": recipe.output, **results})
