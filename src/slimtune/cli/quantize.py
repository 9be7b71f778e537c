"""`slimtune quantize`: a model in 4 or 8 bits, as a folder that engines read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimtune.cli.options import Device, Json, Output, Overwrite, StoredDtype, TrustRemoteCode, load_merged
from slimtune.console.screen import open_screen, print_json


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a Hub id, a packaged name or an adapter.")],
    output: Output,
    scheme: Annotated[
        str, typer.Option(help="W4A16 (weights in 4 bits), W8A16, or W8A8 (inputs in 8 bits too).")
    ] = "W4A16",
    method: Annotated[
        str | None,
        typer.Option(help="awq+gptq (in 4 bits the default), awq, gptq, or rtn (in 8 bits the default; no data)."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="How many inputs share a scale in groups: 32, 64 (default), 128 or 256.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="What shares a scale: group (default in 4 bits), channel (default in 8) or tensor."),
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="With zero points, which fewer engines read.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="What to calibrate on, as slimtune train reads it; without it, texts that are shipped."),
    ] = None,
    head: Annotated[str, typer.Option(help="keep, or int8 for the embedding and the output layer.")] = "keep",
    ignore: Annotated[
        list[str] | None, typer.Option(help="A linear layer to leave as it is, by name or regular expression; repeat.")
    ] = None,
    overwrite: Overwrite = False,
    dtype: StoredDtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Quantize a model after training and write it as compressed-tensors, with a report of what it lost.

    Every command takes the written folder, train as the base of any method; transformers reads it too, and by its
    format vLLM. Example: slimtune quantize my-adapter --data orders.jsonl --output my-model-in-4-bits

    An adapter is merged into its base first. In 4 bits, layers are scaled (AWQ) and their codes are chosen one input
    after the other (GPTQ) by what the layers get to see on the data: take data like that which the model will see.
    """
    from slimtune.console.progress import Counting
    from slimtune.errors import require
    from slimtune.models.load import LoadOptions
    from slimtune.slim.data import calibration_batches
    from slimtune.slim.folder import quantize_to_folder
    from slimtune.slim.quantize import QuantizeConfig
    from slimtune.storage.atomic import refuse_existing

    # What is written is read again at the end.
    require("accelerate", extra="quantized", purpose="reading what is written again")
    config = QuantizeConfig(scheme, method, group_size, head, ignore or (), strategy, not asymmetric)
    refuse_existing(output, overwrite)
    loaded, tokenizer = load_merged(model, LoadOptions(dtype, device, trust_remote_code))
    batches = _batches(loaded, tokenizer, data, calibration_batches) if config.needs_data else []
    screen = open_screen(as_json)
    with Counting(screen) as counting:
        report = quantize_to_folder(loaded, tokenizer, output, config, batches, overwrite, counting.watch)
    if as_json:
        print_json({"output": str(output), **report.to_dict()})
        return
    screen.print(str(report), markup=False)
    if config.needs_data and data is None:
        screen.print("calibrated on shipped texts; with --data like what the model will see it loses less there")
    size = sum(path.stat().st_size for path in output.iterdir())
    screen.print(f"{output}: {size / 1e6:,.0f} MB", markup=False)


def _batches(model: Any, tokenizer: Any, data: Path | None, calibration_batches: Any) -> list[dict[str, Any]]:
    """Tokens to calibrate on, on the model's device."""
    from slimtune.errors import ConfigError

    if tokenizer is None or getattr(model, "main_input_name", None) != "input_ids":
        raise ConfigError(
            f"{type(model).__name__} reads no text, so that there is nothing to calibrate it on here; pass --method "
            "rtn, or quantize it in Python with slimtune.quantize_ and batches of your own"
        )
    batches = calibration_batches(tokenizer, data)
    return [{name: ids.to(model.device) for name, ids in batch.items()} for batch in batches]
