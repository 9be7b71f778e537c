"""`slimtune demo-data`: the demo's task as files."""

from __future__ import annotations

from typing import Annotated

import typer

from slimtune.cli.options import Output, Overwrite


def demo_data(
    output: Output,
    train: Annotated[int, typer.Option(min=1, help="Training examples.")] = 640,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out examples.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed writes the same examples.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write the demo's task (a spoken order turned into JSON) as train.jsonl and held_out.jsonl.

    Example: slimtune demo-data --output orders && slimtune train smollm2-135m-instruct orders/train.jsonl -o tuned
    """
    from slimtune.staging import staged
    from slimtune.tasks.orders import make_orders, write_jsonl

    parts = dict(zip(("train.jsonl", "held_out.jsonl"), make_orders(train, held_out, seed), strict=True))
    with staged(output, overwrite) as folder:
        for name, examples in parts.items():
            write_jsonl(folder / name, examples)
    for name, examples in parts.items():
        print(f"{output / name}: {len(examples)} examples")
