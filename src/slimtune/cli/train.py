"""`slimtune train`: a model, a data file and a method in, an adapter out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from slimtune.cli.options import Base, Device, Dtype, Json, Output, Overwrite, TrustRemoteCode, console
from slimtune.errors import ConfigError, did_you_mean, listing

METHOD, RUN, DATA = "Method", "Training", "Data"
RATES = {"lora": 2e-4, "full": 2e-5}


def train(
    ctx: typer.Context,
    model: Base,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="JSONL with messages, or prompt and completion.")],
    output: Output,
    method: Annotated[str, typer.Option(help="lora, or full for the baseline.", rich_help_panel=METHOD)] = "lora",
    rank: Annotated[int, typer.Option("--rank", "--r", help="Rank of the update.", rich_help_panel=METHOD)] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="Scale is alpha / rank; 2 * rank by default.", rich_help_panel=METHOD)
    ] = None,
    dropout: Annotated[float, typer.Option(help="Dropout before A.", rich_help_panel=METHOD)] = 0.0,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, names between commas, or a regex.", rich_help_panel=METHOD)
    ] = "all-linear",
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
    bias: Annotated[str, typer.Option(help="none, all or lora_only.", rich_help_panel=METHOD)] = "none",
    init: Annotated[str, typer.Option(help="default, random or gaussian.", rich_help_panel=METHOD)] = "default",
    use_rslora: Annotated[
        bool, typer.Option("--use-rslora", help="Scale by alpha / sqrt(rank).", rich_help_panel=METHOD)
    ] = False,
    lora_plus_ratio: Annotated[
        float | None, typer.Option(help="LoRA+: learn B this many times faster than A.", rich_help_panel=METHOD)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="2e-4 for lora, 2e-5 for full.", rich_help_panel=RUN)
    ] = None,
    epochs: Annotated[float, typer.Option(help="Times through the data.", rich_help_panel=RUN)] = 3.0,
    max_steps: Annotated[int | None, typer.Option(help="Stop after these steps.", rich_help_panel=RUN)] = None,
    batch_size: Annotated[int, typer.Option(help="Examples at once.", rich_help_panel=RUN)] = 8,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches per step.", rich_help_panel=RUN)] = 1,
    scheduler: Annotated[
        str, typer.Option(help="linear, cosine, constant or constant_with_warmup.", rich_help_panel=RUN)
    ] = "linear",
    warmup: Annotated[float, typer.Option(help="Steps, or a share of them below 1.", rich_help_panel=RUN)] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=RUN)] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it.", rich_help_panel=RUN)] = 1.0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=RUN)
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights and order.", rich_help_panel=RUN)] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_length: Annotated[int, typer.Option(min=2, help="In tokens.", rich_help_panel=DATA)] = 1024,
    too_long: Annotated[
        str, typer.Option(help="error, drop or truncate what is longer.", rich_help_panel=DATA)
    ] = "error",
    eval_data: Annotated[Path | None, typer.Option(help="JSONL to evaluate on.", rich_help_panel=DATA)] = None,
    eval_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the data held out.", rich_help_panel=DATA)
    ] = 0.0,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Tune a model on a file of conversations; only the answers are learned.

    Writes the adapter, the tokenizer with its chat template, the loss curve and a model card.

    Example: slimtune train smollm2-135m-instruct orders/train.jsonl --output tuned --max-steps 40
    """
    from slimtune.cli.method import METHODS, lora_config, method_table
    from slimtune.cli.tuning import Data, load_for, tune
    from slimtune.staging import refuse_existing
    from slimtune.train.settings import TrainSettings

    # All that needs no model comes first: a slip of the pen must not cost a download.
    refuse_existing(output, overwrite)
    if method not in METHODS:
        raise ConfigError(f"no method '{method}'; pass one of {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
    if method == "full":
        _refuse_lora_options(ctx)
    rate = RATES[method] if learning_rate is None else learning_rate
    settings = TrainSettings(**{**_taken(ctx, TrainSettings.__dataclass_fields__), "learning_rate": rate})
    config = lora_config(**_taken(ctx, signature(lora_config).parameters)) if method == "lora" else None
    files = Data.read(data, eval_data, eval_fraction, max_length, too_long, seed)
    screen = console(as_json)
    loaded, tokenizer, autocast = load_for(config, model, dtype, device, trust_remote_code, seed)
    outcome = tune(
        screen, loaded, tokenizer, files, settings, output, overwrite, method_table(method, config), autocast
    )
    screen.print(f"written to {output}; try it:  slimtune chat {output}", markup=False)
    if as_json:
        print(json.dumps({"output": str(output), **asdict(outcome)}))
    if outcome.interrupted:
        raise typer.Exit(1)


def _taken(ctx: typer.Context, names: Iterable[str]) -> dict[str, Any]:
    return {name: ctx.params[name] for name in names if name in ctx.params}


def _refuse_lora_options(ctx: typer.Context) -> None:
    from slimtune.cli.method import lora_config

    names = {*signature(lora_config).parameters, "lora_plus_ratio"}
    # By name, for typer carries a copy of click whose place changes.
    given = [name for name in names if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        options = listing("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{options} would change nothing with --method full; leave it out, or use --method lora")
