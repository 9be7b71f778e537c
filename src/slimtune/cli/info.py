"""`slimtune info`: what is in a folder, without loading it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.cli.options import Json, console

if TYPE_CHECKING:
    from slimtune.folder import Folder


def info(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="The folder of an adapter or a model, or its id on the Hub.")
    ],
    as_json: Json = False,
) -> None:
    """Show an adapter (method, rank, targets, size, base, which engines take it) or a model; no weights are loaded.

    Example: slimtune info tuned
    """
    from slimtune.engines import verdicts
    from slimtune.folder import read_source

    found = read_source(folder)
    facts = _adapter_facts(found) if found.is_adapter else _model_facts(found)
    engines = verdicts(found.config, found.tensors) if found.is_adapter else []
    if as_json:
        print(json.dumps({"folder": folder, **facts, "engines": [asdict(verdict) for verdict in engines]}))
        return
    _show(facts, engines)


def _adapter_facts(folder: Folder) -> dict[str, Any]:
    from slimtune.engines import largest_rank, rank_pattern

    config = folder.config
    facts = {"kind": "adapter", "method": _method(config), "base": config.get("base_model_name_or_path")}
    if config.get("revision"):
        facts["revision"] = config["revision"]
    if config.get("r"):
        facts |= {"rank": config["r"], "alpha": config.get("lora_alpha"), "largest_rank": largest_rank(config)}
    targets = config.get("target_modules")
    facts["targets"] = sorted(targets) if isinstance(targets, list) else targets
    config = config | {"rank_pattern": rank_pattern(config)}
    for name in ("modules_to_save", "layers_to_transform", "rank_pattern", "alpha_pattern"):
        if config.get(name):
            facts[name] = config[name]
    if config.get("bias", "none") != "none":
        facts["bias"] = config["bias"]
    return facts | _stored(folder)


def _model_facts(folder: Folder) -> dict[str, Any]:
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    config = folder.config
    facts = {"kind": "model", "architecture": ", ".join(config.get("architectures") or ["unknown"])}
    quantized = {"quantized": _quantized(config["quantization_config"])} if config.get("quantization_config") else {}
    return facts | {name: config[name] for name in names if name in config} | quantized | _stored(folder)


def _quantized(config: dict[str, Any]) -> str:
    method = str(config.get("quant_method", "unknown"))
    if config.get("load_in_8bit"):
        return f"{method}, int8"
    if not config.get("load_in_4bit"):
        return method
    double = ", double" if config.get("bnb_4bit_use_double_quant") else ""
    return f"{method}, {config.get('bnb_4bit_quant_type', 'fp4')}{double}"


def _stored(folder: Folder) -> dict[str, Any]:
    return {
        "parameters": folder.parameters,
        "tensors": len(folder.tensors),
        "dtypes": folder.dtypes,
        "bytes": folder.stored_bytes,
    }


def _method(config: dict[str, Any]) -> str:
    variant = {"use_dora": "DoRA", "use_rslora": "rsLoRA"}
    if config["peft_type"] == "LORA":
        return " + ".join(name for flag, name in variant.items() if config.get(flag)) or "LoRA"
    return str(config["peft_type"])


def _show(facts: dict[str, Any], engines: list[Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), Text(_readable(name, value)))
    for verdict in engines:
        mark = "[green]takes it[/]" if verdict.takes else "[red]refuses it[/]"
        table.add_row(verdict.engine, Text.from_markup(f"{mark}  ").append(verdict.note))
    console().print(table, soft_wrap=False)


def _readable(name: str, value: Any) -> str:
    if name == "bytes":
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)
