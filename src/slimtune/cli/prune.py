"""`slimtune prune`: layers, neurons, heads or single weights left out of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimtune.cli.options import Device, Json, Model, Output, Overwrite, StoredDtype, TrustRemoteCode, load_merged
from slimtune.console.progress import Counting
from slimtune.console.screen import open_screen, print_json
from slimtune.errors import ConfigError


def prune(
    model: Model,
    output: Output,
    layers: Annotated[int | None, typer.Option(help="How many layers are left.")] = None,
    ffn: Annotated[float | None, typer.Option(help="Which share of the feed-forward neurons is left, as 0.75.")] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="How many key-value heads are left, each with its query heads.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Which share of the weights of the blocks' layers becomes zero, as 0.5.")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Where zeros stand: unstructured, or 2:4 or 4:8 of the inputs."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(metavar="METHOD", help="How zeros are chosen: wanda, magnitude or sparsegpt.")
    ] = None,
    scope: Annotated[
        str | None, typer.Option(metavar="SCOPE", help="Where the sparsity holds: row, matrix, or global.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="LAYER", help="Layers without zeros, by name; may be repeated.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Texts or conversations to choose by; the shipped ones without."),
    ] = None,
    overwrite: Overwrite = False,
    dtype: StoredDtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Leave layers, feed-forward neurons, key-value heads or single weights out of a model: what changes least.

    Writes a plain model of the same class, which transformers, vLLM and llama.cpp load as any other; what is left out
    is chosen on calibration data. An adapter is merged first. Each layer keeps the same widths. Zeros make no engine
    faster and the file no smaller; slimtune train and slimtune distill keep them. What was lost is learned again with
    slimtune distill, with the model from before as the teacher.

    Example: slimtune prune smollm2-135m-instruct --layers 24 --output shorter

    Example: slimtune prune smollm2-135m-instruct --sparsity 0.5 --method wanda --data chats.jsonl --output sparse

    Example: slimtune distill smollm2-135m-instruct shorter --data chats.jsonl --output recovered
    """
    from slimtune.models.load import LoadOptions
    from slimtune.slim.prune import PruneConfig, batches_for, write_pruned
    from slimtune.slim.prune import prune as pruned
    from slimtune.slim.weights import WeightPruning, sparsity_line
    from slimtune.storage.atomic import refuse_existing

    refuse_existing(output, overwrite)
    zeros = {"sparsity": sparsity, "pattern": pattern, "method": method, "scope": scope, "ignore": ignore}
    said = {name: value for name, value in zeros.items() if value is not None}
    config = PruneConfig(layers, ffn, kv_heads, weights=WeightPruning(**said) if said else None)
    screen = open_screen(as_json)
    loaded, tokenizer = load_merged(model, LoadOptions(dtype, device, trust_remote_code))
    if data is not None and not config.needs_data:
        raise ConfigError("--data would change nothing with the method magnitude alone; leave it out")
    batches = batches_for(config, loaded, tokenizer, data)
    if batches:
        screen.print(f"choosing by {sum(batch['input_ids'].numel() for batch in batches):,} tokens", markup=False)
    with Counting(screen) as counting:
        smaller, report = pruned(loaded, config, batches, counting.watch)
    write_pruned(smaller, tokenizer, report, output, batches[0] if batches else None, overwrite)
    screen.print(
        f"written to {output}: {report.parameters:,} of {report.parameters_before:,} parameters, "
        f"{report.bytes / 1e6:.1f} of {report.bytes_before / 1e6:.1f} MB",
        markup=False,
    )
    if "weights" in report.done:
        screen.print(sparsity_line(report.done["weights"]), markup=False)
    screen.print(f"what was lost is learned again:  slimtune distill {model} {output} --data FILE", markup=False)
    if as_json:
        print_json({"output": str(output), **report.to_dict()})
