"""`slimtune plan`: what fits, how long it takes, what it costs and what to choose, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimtune.cli import proposals
from slimtune.cli.options import Fields, Json, TrustRemoteCode, columns_of
from slimtune.console.libraries import importing
from slimtune.console.screen import open_screen, print_json
from slimtune.errors import ConfigError, did_you_mean

NOTHING_FITS = 3
KEYS = (
    "task", "model.dtype", "data.held_out", "training.epochs", "training.optim", "training.gradient_accumulation",
    "training.gradient_checkpointing", "training.share_prefixes", "training.group_prefixes",
    "preferences.generations", "preferences.max_new_tokens",
)  # fmt: skip
"""What of a recipe a plan depends on, beside its options."""
WHAT, HOW, WHERE, SERVED = "What is tuned", "Settings (by default the best that fit)", "Where", "Serving"


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder with a config.json, a Hub id, a packaged name, or one of the classic table: llama-2-7b, "
            "llama-2-13b, llama-30b, llama-3-70b, qwen1.5-110b.",
            show_default=False,
            autocompletion=proposals.models_and_recipes,
        ),
    ] = None,
    overrides: Annotated[
        list[str],
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings of a recipe, see above.", show_default=False),
    ] = [],  # noqa: B006 - typer copies it
    data: Annotated[
        Path | None,
        typer.Option(help="The file to train on; its lengths are measured.", rich_help_panel=WHAT),
    ] = None,
    field: Fields = [],  # noqa: B006
    goal: Annotated[str, typer.Option(help="task, quality, fast, domain or tiny.", rich_help_panel=WHAT)] = "task",
    method: Annotated[
        list[str],
        typer.Option(
            help="Only these methods, by their name in train; repeatable.",
            rich_help_panel=WHAT,
            autocompletion=proposals.methods,
        ),
    ] = [],  # noqa: B006
    base: Annotated[
        list[str],
        typer.Option(
            help="Only these bases: dense, nf4, fp4, int8, int8-torchao or int4-torchao; repeatable.",
            rich_help_panel=WHAT,
        ),
    ] = [],  # noqa: B006
    device: Annotated[
        str,
        typer.Option(
            help="A GPU's name, cpu, or auto for this machine.",
            rich_help_panel=WHERE,
            autocompletion=proposals.devices,
        ),
    ] = "auto",
    devices: Annotated[
        int | None, typer.Option(help="GPUs that share the work, by FSDP2 or as --launch says.", rich_help_panel=WHERE)
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            metavar="N|fsdp2|FILE.yaml",
            help="How slimtune train would be launched: so many copies (DDP), the model divided (fsdp2, "
            "fsdp2-offload), or as a file of accelerate says.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    serve_on: Annotated[
        str | None,
        typer.Option(
            help="The device that has to run the result.", rich_help_panel=WHERE, autocompletion=proposals.devices
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GB", help="Memory of the device, if other, in GB of 10^9 bytes.", rich_help_panel=WHERE),
    ] = None,
    price: Annotated[
        float | None, typer.Option(metavar="USD", help="Price of an hour of it, if other.", rich_help_panel=WHERE)
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", "--r", help="Of lora and dora.", rich_help_panel=HOW)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples at once.", rich_help_panel=HOW)] = None,
    max_length: Annotated[int | None, typer.Option(help="In tokens; the longest example.", rich_help_panel=HOW)] = None,
    attention: Annotated[
        str | None,
        typer.Option(help="sdpa or eager, where the model isn't to choose.", rich_help_panel=HOW),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Say what merging the adapter takes too.", rich_help_panel=HOW)
    ] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="What serving takes instead, and how fast it is.", rich_help_panel=SERVED)
    ] = False,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Answers at once; 16, or as many as fit.", rich_help_panel=SERVED)
    ] = None,
    adapters: Annotated[int, typer.Option(min=0, help="Loaded at once, LoRA of --rank.", rich_help_panel=SERVED)] = 0,
    table: Annotated[
        bool, typer.Option("--table", help="The classic table: four methods by five sizes of model.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the memory: PNG or SVG.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine's speed first, for a minute, and keep it.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Say what tuning a model takes by method: memory, time, cost; which one to choose, and the command to run it.

    Nothing is downloaded but the configuration (and the tokenizer, with --data): the real training step is run on
    tensors without data. Exit code 3: nothing fits the device.

    What a recipe has a key for is written as section.key=value: task=dpo, model.dtype=float16, training.epochs=1,
    training.optim=adamw_8bit, training.gradient_accumulation=4, training.gradient_checkpointing=true,
    preferences.generations=4, preferences.max_new_tokens=256; with data.held_out=0.1 an evaluation step counts, too.

    Examples: slimtune plan llama-2-7b --device "RTX 4090"

    slimtune plan smollm2-135m-instruct --data orders/train.jsonl --goal quality

    slimtune plan llama-3-70b --device H100 --devices 4 --base nf4 task=dpo

    slimtune plan smollm2-135m-instruct --serve --slots 32 --adapters 8

    slimtune plan llama-3-70b --device H100 --devices 8 --launch fsdp2

    slimtune plan --table --plot table.svg
    """
    if model is not None and "=" in model and not Path(model).exists():
        model, overrides = None, [model, *overrides]
    settings = _settings(overrides) if overrides else {}
    if plot is not None:
        from slimtune.console.figure import check_picture

        check_picture(plot)
    if calibrate:
        _calibrate(as_json, is_all=model is None and not table)
    if table:
        _classic(
            plot, as_json, batch_size or 1, max_length or 512, rank or 16, settings.get("gradient_checkpointing", True),
            None if device == "auto" else device,
        )  # fmt: skip
        return
    if model is None:
        if calibrate:
            return
        raise ConfigError("plan needs a MODEL, --table or --calibrate; try `slimtune plan llama-2-7b`")
    if serve:
        _serving(model, as_json, device, memory, base, slots, max_length, adapters, rank or 16, trust_remote_code)
        return
    if slots is not None or adapters:
        raise ConfigError("--slots and --adapters would change nothing without --serve; leave them out")
    with importing():
        from slimtune.cli.plan_view import show
        from slimtune.plan.plan import plan as ask

    screen = open_screen(as_json)
    count, sharing = _sharing(devices, launch)
    with screen.status("simulating..."):
        report = ask(
            model, _data(data, field), device, goal, method or None, base or None,  # type: ignore[arg-type]
            rank=rank, batch_size=batch_size, max_length=max_length, devices=count, sharing=sharing,
            served_on=serve_on,
            memory_gb=memory, price_per_hour=price, trust_remote_code=trust_remote_code, attention=attention,
            evaluation=bool(settings.pop("held_out", 0)), merge=merge, **settings,
        )  # fmt: skip
    if plot is not None:
        from slimtune.plan.table import Bar, plot_bars

        bars = [
            Bar(f"{choice.label}, batch {choice.setting.batch}", choice.parts, choice.runtime_bytes)
            for choice in report.choices
        ]
        plot_bars(bars, plot, f"{model} on {report.request.device.name}", report.request.device.memory_bytes)
    if as_json:
        print_json(report.to_dict())
    else:
        show(screen, report, launch)
    if report.best is None:
        raise typer.Exit(NOTHING_FITS)


def _serving(
    model: str, as_json: bool, device_name: str, memory: float | None, base: list[str], slots: int | None,
    context: int | None, adapters: int, rank: int, trust_remote_code: bool,
) -> None:  # fmt: skip
    from slimtune.cli.plan_view import show_serving
    from slimtune.plan.devices import find
    from slimtune.plan.memory import Setting
    from slimtune.plan.plan import count, dtype_on, read_config
    from slimtune.plan.serving import plan_serving
    from slimtune.plan.time import rates_of

    if len(base) > 1:
        raise ConfigError("--serve plans one --base at a time; pass one, or none for the model as it is stored")
    screen, device = open_screen(as_json), find(device_name).changed(memory)
    with screen.status("simulating..."):
        config = read_config(model, trust_remote_code)
        numbers = count(config, "CAUSAL_LM", trust_remote_code)[1] * rank if adapters else 0
        setting = Setting(
            base=base[0] if base else "dense",  # type: ignore[arg-type]
            dtype=dtype_on(config, device),
            device="cpu" if device.is_cpu else "cuda",
            trust_remote_code=trust_remote_code,
        )
        planned = plan_serving(config, device, slots, context, adapters, numbers, setting)
    rates = rates_of(device)
    if as_json:
        print_json({"model": model, **planned.to_dict(rates)})
    else:
        show_serving(screen, model, planned, rates)
    if not planned.fits:
        raise typer.Exit(NOTHING_FITS)


def _sharing(devices: int | None, launch: str | None) -> tuple[int, Any]:
    """How many devices share the work, and how. Raises: ConfigError."""
    from slimtune.pipeline.launch import read_launch, with_processes
    from slimtune.plan.memory import FSDP2, Sharing

    if launch is None:
        return 1 if devices is None else devices, FSDP2
    chosen = read_launch(launch)
    count = devices or chosen.processes
    if count is None:
        raise ConfigError(f"--launch {launch!r} doesn't say how many devices there are; pass --devices, too")
    if chosen.processes not in (None, count) and with_processes(launch, count) == launch:
        raise ConfigError(f"--launch starts {chosen.processes} processes, and --devices says {devices}; leave one out")
    return count, Sharing(chosen.shards, chosen.offloads, chosen.regathers)


def _data(file: Path | None, field: list[str]) -> Any:
    """The data with its columns; raises ConfigError for columns of no data."""
    from slimtune.data.settings import DataSettings

    if field and file is None:
        raise ConfigError("--field would change nothing without --data; leave it out")
    return DataSettings(str(file), fields=columns_of(field)) if field else file


def _settings(overrides: list[str]) -> dict[str, Any]:
    """Arguments of `slimtune.plan` from `section.key=value`; raises ConfigError."""
    from slimtune.recipe.recipe import read_override, type_of
    from slimtune.recipe.validation import read_field

    settings: dict[str, Any] = {}
    for place, value in map(read_override, overrides):
        if place not in KEYS:
            near = did_you_mean(place, KEYS) or f"; it takes {', '.join(KEYS)}"
            raise ConfigError(f"the key {place} changes nothing in a plan{near}")
        settings[place.rpartition(".")[2]] = read_field(type_of(place), value, place)
    return settings


def _calibrate(as_json: bool, is_all: bool) -> None:
    from dataclasses import asdict

    from slimtune.plan.devices import this_device
    from slimtune.plan.time import calibrate, calibration_file

    screen = open_screen(as_json)
    device = this_device()
    screen.print(f"measuring {device.name} ({device.source})", markup=False)
    rates = calibrate(device, lambda line: screen.print(line, markup=False))
    screen.print(f"kept in {calibration_file()}", markup=False)
    if as_json and is_all:
        print_json({"device": device.name, **asdict(rates)})


def _classic(
    plot: Path | None, as_json: bool, batch: int, sequence: int, rank: int, checkpointing: bool, device: str | None
) -> None:
    from slimtune.cli.plan_view import show_classic
    from slimtune.plan.devices import find
    from slimtune.plan.plan import read_config, simulation
    from slimtune.plan.table import classic_bars, classic_table, plot_bars

    screen = open_screen(as_json)
    with screen.status("simulating..."):
        cells = classic_table(
            lambda name, setting: simulation(read_config(name))(setting),
            batch=batch, sequence=sequence, rank=rank, checkpointing=checkpointing,
            device=find(device) if device else None,
        )  # fmt: skip
    if plot is not None:
        plot_bars(classic_bars(cells), plot, f"tuning, batch {batch} x {sequence} tokens")
    if as_json:
        print_json(
            {"batch_size": batch, "max_length": sequence, "rank": rank, "cells": [cell.to_dict() for cell in cells]}
        )
    else:
        show_classic(screen, cells)
