"""`slimtune train`: a recipe, or options that make one, to a tuned adapter or model in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.cli.options import Device, Dtype, Json, Overwrite, Quantize, TrustRemoteCode, console
from slimtune.errors import ConfigError, listing
from slimtune.recipe.method import OPTIONS

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.recipe.method import Method
    from slimtune.recipe.recipe import Recipe

METHOD, RUN, DATA = "Method", "Training", "Data"
MODEL_OPTIONS = ("revision", "dtype", "device", "quantize", "trust_remote_code")
DATA_OPTIONS = ("max_length", "too_long")
WITH_A_RECIPE = ("source", "rest", "output", "overwrite", "resume", "plans", "as_json")
"""Parameters that say how a recipe is run, not what it says."""


def train(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE.yaml|MODEL",
            help="A recipe, or a model folder, a Hub id or the packaged [bold]smollm2-135m-instruct[/].",
        ),
    ],
    rest: Annotated[
        list[str],
        typer.Argument(
            metavar="[DATA] [SECTION.KEY=VALUE]...",
            help="With a model the data: a file, a folder or a data set of the Hub, in any format that "
            "[bold]slimtune data preview[/] finds. Then settings of a recipe, such as data.packing=true.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 - typer copies it
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="The folder to write; by default the recipe's."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="One of those that [bold]slimtune methods[/] lists.", rich_help_panel=METHOD)
    ] = "lora",
    rank: Annotated[
        int | None, typer.Option("--rank", "--r", help="Rank of the update; 16 for lora.", rich_help_panel=METHOD)
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Scale is alpha / rank; 2 * rank for lora.", rich_help_panel=METHOD)
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout before A.", rich_help_panel=METHOD)] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            help="all-linear, names between commas, or a regex; else where the method belongs.", rich_help_panel=METHOD
        ),
    ] = None,
    exclude_modules: Annotated[
        str | None, typer.Option(help="Names or a regex to leave out.", rich_help_panel=METHOD)
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Only these layers: 0,1,2.", rich_help_panel=METHOD)] = None,
    rank_pattern: Annotated[
        list[str], typer.Option(metavar="NAME=RANK", help="Another rank; repeatable.", rich_help_panel=METHOD)
    ] = [],  # noqa: B006 - typer copies it
    alpha_pattern: Annotated[
        list[str], typer.Option(metavar="NAME=ALPHA", help="Another alpha; repeatable.", rich_help_panel=METHOD)
    ] = [],  # noqa: B006
    modules_to_save: Annotated[
        str | None, typer.Option(help="Modules trained and saved whole.", rich_help_panel=METHOD)
    ] = None,
    bias: Annotated[str | None, typer.Option(help="none, all or lora_only.", rich_help_panel=METHOD)] = None,
    init: Annotated[str | None, typer.Option(help="default, random, gaussian, ...", rich_help_panel=METHOD)] = None,
    use_rslora: Annotated[
        bool, typer.Option("--use-rslora", help="Scale by alpha / sqrt(rank).", rich_help_panel=METHOD)
    ] = False,
    assignments: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other field of the method, as YAML ([bold]slimtune methods NAME[/] lists them); repeatable.",
            rich_help_panel=METHOD,
        ),
    ] = [],  # noqa: B006
    lora_plus_ratio: Annotated[
        float | None, typer.Option(help="LoRA+: learn B this many times faster than A.", rich_help_panel=METHOD)
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", help="By default the method's own.", rich_help_panel=RUN),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Times through the data.", rich_help_panel=RUN)] = 3.0,
    max_steps: Annotated[int | None, typer.Option(help="Stop after these steps.", rich_help_panel=RUN)] = None,
    batch_size: Annotated[int, typer.Option(help="Examples at once.", rich_help_panel=RUN)] = 8,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches per step.", rich_help_panel=RUN)] = 1,
    optim: Annotated[
        str,
        typer.Option(help="adamw_8bit, paged_adamw_8bit, adafactor, ...: transformers' names.", rich_help_panel=RUN),
    ] = "adamw_torch_fused",
    scheduler: Annotated[
        str, typer.Option(help="linear, cosine, constant or constant_with_warmup.", rich_help_panel=RUN)
    ] = "linear",
    warmup: Annotated[float, typer.Option(help="Steps, or a share of them below 1.", rich_help_panel=RUN)] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="Of the optimizer.", rich_help_panel=RUN)] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it.", rich_help_panel=RUN)] = 1.0,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; every 10 minutes by default.", rich_help_panel=RUN)
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=RUN)
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights and order.", rich_help_panel=RUN)] = 0,
    revision: Annotated[
        str | None, typer.Option(help="Of a model of the Hub: a branch, a tag or a commit; main unless told.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    max_length: Annotated[int, typer.Option(min=2, help="In tokens.", rich_help_panel=DATA)] = 1024,
    too_long: Annotated[
        str, typer.Option(help="error, drop or truncate what is longer, or split texts.", rich_help_panel=DATA)
    ] = "error",
    eval_data: Annotated[Path | None, typer.Option(help="JSONL to evaluate on.", rich_help_panel=DATA)] = None,
    eval_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the data held out.", rich_help_panel=DATA)
    ] = 0.0,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that was broken off, to the same end.")
    ] = False,
    plans: Annotated[
        bool, typer.Option("--plan/--no-plan", help="Refuse what can't fit before anything is loaded.")
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Tune a model as a recipe says, or on a file of conversations, of which the answers are learned, or of labels.

    Writes the adapter, the tokenizer with its chat template, the loss curve, a model card, what came out as
    results.json, and the recipe in full, which run again gives the same. Rows with text, label and perhaps text_pair
    train a classifier of whole texts, rows with tokens and tags one of single words; with task=dpo, kto, orpo, grpo or
    seq2seq behind the data, other things are learned. Answers in a passage and images are trained in Python.

    Example: slimtune train recipe.yaml training.learning_rate=1e-4

    Example: slimtune train smollm2-135m-instruct orders/train.jsonl --output tuned --max-steps 40
    """
    from slimtune.pipeline.train import run
    from slimtune.storage.atomic import refuse_existing
    from slimtune.train.results import RESULTS

    if output is not None and not resume:
        refuse_existing(output, overwrite)
    recipe = _recipe(ctx, source, rest, output)
    run(recipe, console(as_json), overwrite, plans, resume)
    written = json.loads((Path(recipe.output) / RESULTS).read_text(encoding="utf-8"))
    _say_how_to_use(console(as_json), recipe, written["task_type"])
    if as_json:
        print(json.dumps({"output": recipe.output, **written}))


def _recipe(ctx: typer.Context, source: str, rest: list[str], output: Path | None) -> Recipe:
    from slimtune.recipe.recipe import Recipe, overridden
    from slimtune.storage.text_files import is_yaml, read_mapping

    given = _given(ctx) - set(WITH_A_RECIPE)
    target = {} if output is None else {"output": str(output)}
    if is_yaml(source):
        if given:
            raise ConfigError(
                f"{_options(given)} does not go with a recipe; write settings as section.key=value behind it, for "
                "example training.learning_rate=1e-4"
            )
        return Recipe.of(overridden(read_mapping(Path(source)), rest) | target)
    if not rest or ("=" in rest[0] and not Path(rest[0]).exists()):
        raise ConfigError(f"no data was named to train {source} on; pass a data file behind it, or a recipe.yaml")
    if output is None:
        raise ConfigError("no folder was named to write; pass --output DIR")
    return Recipe.of(overridden(_sections(ctx, source, rest[0], given) | target, rest[1:]))


def _sections(ctx: typer.Context, model: str, data: str, given: set[str]) -> dict[str, Any]:
    """The recipe that options make: what was not given is left to it."""
    from slimtune.recipe.method import find, options_as_fields
    from slimtune.recipe.training import TrainSettings

    taken = {name: value for name, value in ctx.params.items() if name in given}
    method = find(ctx.params["method"])
    _refuse_what_changes_nothing(method, given)
    fields = options_as_fields(
        method, {name: taken[name] for name in OPTIONS if name in taken}, taken.get("assignments", ())
    )
    if "eval_data" in taken and "eval_fraction" in taken:
        raise ConfigError("--eval-data and --eval-fraction were both given; pass one of them")
    held_out = str(taken["eval_data"]) if "eval_data" in taken else taken.get("eval_fraction", 0.0)
    return {
        "model": {"name": model} | _only(taken, MODEL_OPTIONS),
        "data": {"train": data, "held_out": held_out} | _only(taken, DATA_OPTIONS),
        "method": {"name": method.name} | fields,
        "training": _only(taken, TrainSettings.__dataclass_fields__),
    }


def _only(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _given(ctx: typer.Context) -> set[str]:
    """The options that were written, not those at their defaults."""
    # By name, for typer carries a copy of click whose place changes.
    return {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}


def _refuse_what_changes_nothing(method: Method, given: set[str]) -> None:
    from slimtune.recipe.recipe import USED_BY_FEATURES
    from slimtune.recipe.training import TrainSettings

    strangers = set() if method.has_low_rank_pair else given & {"lora_plus_ratio"}
    if method.name == "features":
        strangers |= (given & set(TrainSettings.__dataclass_fields__)) - set(USED_BY_FEATURES)
    if strangers:
        raise ConfigError(f"{_options(strangers)} would change nothing with --method {method.name}; leave it out")


def _options(names: Iterable[str]) -> str:
    return listing("--" + {"assignments": "set"}.get(name, name).replace("_", "-") for name in names)


def _say_how_to_use(screen: Console, recipe: Recipe, task_type: str) -> None:
    from slimtune.train.card import use_of

    use = use_of(task_type, recipe.output)
    use += f" --quantize {recipe.model.quantize}" if recipe.model.quantize else ""
    screen.print(f"written to {recipe.output}; try it:  {use}", markup=False)
