"""`slimtune merge`: an adapter and its base become one model."""

from __future__ import annotations

from typing import Annotated

import typer

from slimtune.cli import proposals
from slimtune.cli.options import AdapterBase, Device, Json, Output, Overwrite, StoredDtype, TrustRemoteCode, attach
from slimtune.console.screen import open_screen, print_json
from slimtune.errors import AdapterFileError, ConfigError


def merge(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="The adapter folder.", autocompletion=proposals.models)
    ],
    output: Output,
    base: AdapterBase = None,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Quantize the base first, as it was in training: nf4, fp4, int8 or int4."),
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize", help="Write codes: of a quantized base, with what is lost of the update, or of a grid."
        ),
    ] = False,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Refuse (exit code 1) if the answers drift further than this KL divergence; by default, further than "
            "half of what the adapter changes.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    dtype: StoredDtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base and write a model folder, after comparing the outputs.

    The written folder is read again and compared as well. One sentence says how much of the tuning is kept: the change
    in the answers that merging undoes by the change that the adapter made, what rounding costs any computation in this
    type taken off. Example: slimtune merge tuned --output merged

    An adapter that was trained on a quantized base (QLoRA) belongs into the numbers that the codes stand for: with the
    same --quantize, or on a quantized folder, the written 16-bit model is the one that was trained. Merged into the
    original 16-bit base it is another model; where it was measured, a worse one. A merge back into codes (--requantize)
    rounds a small update away: for a model in few bits merge into the original base and quantize what that gives. An
    adapter that was trained on the grid of its codes (method.constraint.num_bits=4) loses nothing by --requantize.
    """
    from slimtune.models.export import merge_to_folder
    from slimtune.models.load import LoadOptions, load_base
    from slimtune.storage.atomic import refuse_existing
    from slimtune.storage.source import base_of, is_adapter

    refuse_existing(output, overwrite)
    if not is_adapter(adapter):
        raise AdapterFileError(f"{adapter} is no adapter folder: adapter_config.json is missing; pass what train wrote")
    source = base or base_of(adapter)
    model, tokenizer = load_base(adapter, source, LoadOptions(dtype, device, trust_remote_code, quantize))
    is_quantized = getattr(model, "is_quantized", False)
    model = attach(model, {"default": adapter})
    constraint = getattr(model.active_peft_config, "constraint", None)
    if requantize and not is_quantized and not (constraint and constraint.num_bits):
        raise ConfigError(
            f"{source} isn't quantized, so that there is nothing to quantize again; pass --quantize nf4, or train the "
            "adapter on a grid (method.constraint.num_bits=4)"
        )
    report = merge_to_folder(model, tokenizer, output, max_kl, overwrite, requantize)
    if as_json:
        print_json({"output": str(output), "base": source, **report.to_dict()})
        return
    size = sum(path.stat().st_size for path in output.iterdir())
    screen = open_screen(works_on=True)
    screen.print(f"what the adapter changes      {report.adapter}")
    screen.print(f"what merging lost             {report.merged}")
    screen.print(f"written, read again           {report.reloaded}")
    screen.print(f"what rounding alone does      {report.rounding}")
    if report.requantized is not None:
        screen.print(f"quantized again               {report.requantized.left}")
    if report.adapter.max_abs == 0:
        screen.print("[yellow]warning:[/] the adapter changes nothing: the merged model equals its base")
    elif report.is_kept:
        screen.print(report.verdict, markup=False)
    else:
        screen.print(f"[yellow]warning:[/] {report.verdict}")
    kind = "a quantized model" if requantize else "a plain model"
    screen.print(f"{output}: {size / 1e6:,.0f} MB, {kind}", markup=False)
