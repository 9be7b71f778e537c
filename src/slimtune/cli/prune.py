"""`slimtune prune`: layers, neurons or heads left out of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimtune.cli.options import Device, Dtype, Json, Model, Output, Overwrite, TrustRemoteCode, load_merged
from slimtune.console.screen import open_screen, print_json


def prune(
    model: Model,
    output: Output,
    layers: Annotated[int | None, typer.Option(help="How many layers are left.")] = None,
    ffn: Annotated[float | None, typer.Option(help="Which share of the feed-forward neurons is left, as 0.75.")] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="How many key-value heads are left, each with its query heads.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Texts or conversations to choose by; the shipped ones without."),
    ] = None,
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Leave layers, feed-forward neurons or key-value heads out of a model: what changes least on calibration data.

    Writes a plain model of the same class with a smaller config, which transformers, vLLM and llama.cpp load as any
    other. An adapter is merged first. Each layer keeps the same widths. What was lost is learned again with slimtune
    distill, with the model from before as the teacher.

    Example: slimtune prune smollm2-135m-instruct --layers 24 --output shorter

    Example: slimtune distill smollm2-135m-instruct shorter --data chats.jsonl --output recovered
    """
    from slimtune.models.load import LoadOptions
    from slimtune.slim.prune import PruneConfig, calibration, write_pruned
    from slimtune.slim.prune import prune as pruned
    from slimtune.storage.atomic import refuse_existing

    refuse_existing(output, overwrite)
    config = PruneConfig(layers, ffn, kv_heads)
    screen = open_screen(as_json)
    loaded, tokenizer = load_merged(model, LoadOptions(dtype, device, trust_remote_code))
    batches = calibration(loaded, tokenizer, data)
    screen.print(f"choosing by {sum(batch['input_ids'].numel() for batch in batches):,} tokens", markup=False)
    smaller, report = pruned(loaded, config, batches)
    write_pruned(smaller, tokenizer, report, output, batches[0], overwrite)
    screen.print(
        f"written to {output}: {report.parameters:,} of {report.parameters_before:,} parameters, "
        f"{report.bytes / 1e6:.1f} of {report.bytes_before / 1e6:.1f} MB",
        markup=False,
    )
    screen.print(f"what was lost is learned again:  slimtune distill {model} {output} --data FILE", markup=False)
    if as_json:
        print_json({"output": str(output), **report.to_dict()})
