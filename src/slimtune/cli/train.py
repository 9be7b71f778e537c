"""`slimtune train`: a model, a data file and a method in, an adapter out."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.cli.options import Base, Device, Dtype, Json, Output, Overwrite, Quantize, TrustRemoteCode, console
from slimtune.errors import ConfigError, listing
from slimtune.train.method import OPTIONS

if TYPE_CHECKING:
    from slimtune.train.method import Method

METHOD, RUN, DATA = "Method", "Training", "Data"
NEEDED_BY_FEATURES = {"batch_size", "seed", "dtype", "device"}


def train(
    ctx: typer.Context,
    model: Base,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="JSONL with messages, or prompt and completion; JSONL or CSV with text and label."
        ),
    ],
    output: Output,
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
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=RUN)
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights and order.", rich_help_panel=RUN)] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    max_length: Annotated[int, typer.Option(min=2, help="In tokens.", rich_help_panel=DATA)] = 1024,
    too_long: Annotated[
        str, typer.Option(help="error, drop or truncate what is longer.", rich_help_panel=DATA)
    ] = "error",
    eval_data: Annotated[Path | None, typer.Option(help="JSONL to evaluate on.", rich_help_panel=DATA)] = None,
    eval_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the data held out.", rich_help_panel=DATA)
    ] = 0.0,
    overwrite: Overwrite = False,
    plans: Annotated[
        bool, typer.Option("--plan/--no-plan", help="Refuse what can't fit before anything is loaded.")
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Tune a model on a file of conversations, of which the answers are learned, or of texts with labels.

    Writes the adapter, the tokenizer with its chat template, the loss curve and a model card. Rows with text, label
    and perhaps text_pair train a classifier of whole texts; labels of single tokens, answers in a passage and images
    are trained in Python.

    Example: slimtune train smollm2-135m-instruct orders/train.jsonl --output tuned --max-steps 40
    """
    from slimtune.data.lesson import read
    from slimtune.data.settings import DataSettings
    from slimtune.loading import pick_device
    from slimtune.quantized.report import parts
    from slimtune.staging import refuse_existing
    from slimtune.train.job import load_for, tune
    from slimtune.train.method import FEATURES, configure, find, table
    from slimtune.train.optimizer import check_runs
    from slimtune.train.settings import TrainSettings

    # All that needs no model comes first: a slip of the pen must not cost a download.
    refuse_existing(output, overwrite)
    chosen = find(method)
    given = _given(ctx)
    _refuse_what_changes_nothing(chosen, given)
    if quantize is not None:
        _check_quantize(method, quantize)
    config = configure(chosen, {name: ctx.params[name] for name in OPTIONS if name in given}, assignments, model)
    if eval_data and eval_fraction:
        raise ConfigError("--eval-data and --eval-fraction were both given; pass one of them")
    files = read(DataSettings(data, eval_data or eval_fraction, max_length=max_length, too_long=too_long), seed=seed)
    screen = console(as_json)
    if method == FEATURES:
        from slimtune.cli.features import train_on_features

        found = train_on_features(
            screen, config, files, model, output, overwrite, batch_size, dtype, device, trust_remote_code
        )
        if as_json:
            print(json.dumps({"output": str(output), **found}))
        return
    rate = chosen.config.learning_rate if learning_rate is None else learning_rate
    settings = TrainSettings(**{**_taken(ctx, TrainSettings.__dataclass_fields__), "learning_rate": rate})
    place = pick_device(device).partition(":")[0]
    check_runs(optim, place)
    if plans:
        from slimtune.cli.foresight import refuse_what_does_not_fit

        refuse_what_does_not_fit(
            screen, model, method, copy.deepcopy(config), data, files.task_type, settings, max_length, dtype, quantize,
            place, trust_remote_code,
        )  # fmt: skip
    loaded, tokenizer, autocast = load_for(
        method, config, files, model, dtype, device, trust_remote_code, seed, quantize
    )
    outcome = tune(
        screen, loaded, tokenizer, files, settings, output, overwrite, table(chosen, config), autocast, quantize
    )
    use = f"slimtune chat {output}" if files.task_type == "CAUSAL_LM" else f"slimtune predict {output} TEXTS.jsonl"
    use += f" --quantize {quantize}" if quantize else ""
    screen.print(f"written to {output}; try it:  {use}", markup=False)
    if as_json:
        print(json.dumps({"output": str(output), **asdict(outcome), "parts": parts(loaded).to_dict()}))
    if outcome.interrupted:
        raise typer.Exit(1)


def _taken(ctx: typer.Context, names: Iterable[str]) -> dict[str, Any]:
    return {name: ctx.params[name] for name in names if name in ctx.params}


def _given(ctx: typer.Context) -> set[str]:
    """The options that were written, not those at their defaults."""
    # By name, for typer carries a copy of click whose place changes.
    return {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}


def _check_quantize(method: str, quantize: str) -> None:
    from slimtune.quantized.settings import settings_of

    settings_of(quantize)
    if method in ("full", "features"):
        why = "trains all weights, and codes can't be trained" if method == "full" else "takes a base as it is stored"
        raise ConfigError(f"--method {method} {why}; leave --quantize out, or choose another method")


def _refuse_what_changes_nothing(method: Method, given: set[str]) -> None:
    from slimtune.train.settings import TrainSettings

    strangers = set() if method.has_low_rank_pair else given & {"lora_plus_ratio"}
    if method.name == "features":
        strangers |= (given & set(TrainSettings.__dataclass_fields__)) - NEEDED_BY_FEATURES
    if strangers:
        options = listing("--" + name.replace("_", "-") for name in strangers)
        raise ConfigError(f"{options} would change nothing with --method {method.name}; leave it out")
