"""Few tokens through a 4-bit base, as in decoding: slimtune, bitsandbytes' own kernels and bf16 in turns.

Each side measures in a process of its own, layers and whole steps of SmolLM2 alike; bitsandbytes repacks its weights
for inference on some CPUs, which no other side must see.
"""

from __future__ import annotations

import json
from statistics import median
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import machine, page
from benchmarks.lora import warn_if_busy
from benchmarks.results import FOLDER, subtitle
from benchmarks.runs import run_module
from benchmarks.table import digits

SIDES = ("bf16", "bitsandbytes", "slimtune")
HEADER = ("what", "tokens", "bf16", "bitsandbytes", "slimtune", "/ bf16", "/ bitsandbytes")

Round = dict[str, dict[str, float]]
"""Seconds by side and by what was timed."""

app = typer.Typer(add_completion=False)
console = Console()


def ratio(rounds: list[Round], what: str, peer: str) -> str:
    """slimtune's seconds over a peer's, round by round: the median and the range."""
    pairs = [one["slimtune"][what] / one[peer][what] for one in rounds]
    return f"{median(pairs):.2f}" + (f" ({digits(min(pairs))}-{digits(max(pairs))})" if len(pairs) > 1 else "")


def rows(rounds: list[Round]) -> list[tuple[str, ...]]:
    found = []
    for what in rounds[0]["slimtune"]:
        shape, tokens = what.rsplit(" x ", 1)
        seconds = (f"{digits(1e3 * median(one[side][what] for one in rounds))} ms" for side in SIDES)
        found.append((shape, tokens, *seconds, ratio(rounds, what, "bf16"), ratio(rounds, what, "bitsandbytes")))
    return found


def shown(cells: list[tuple[str, ...]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in HEADER:
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in cells:
        table.add_row(*row)
    return table


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often all sides take turns.")] = 5,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the products run.")] = "cpu",
    small: Annotated[bool, typer.Option("--quick", help="One round; not kept.")] = False,
) -> None:
    """Time linear layers and whole steps of SmolLM2 in NF4 for 1 to 16 tokens, and fill in docs/figures."""
    warn_if_busy()
    done: list[Round] = []
    settings: dict[str, Any] = {}
    for number in range(1 if small else rounds):
        one: Round = {}
        for side in SIDES:
            with console.status(f"round {number + 1}, {side}"):
                found = run_module("benchmarks.decoding_worker", side, device)
            one[side], settings = found["seconds"], found["torch"]
        done.append(one)
    console.print(shown(rows(done)))
    if small:
        return
    on = machine.describe(settings)
    about = {"machine": on, "bitsandbytes": machine.installed("bitsandbytes"), "date": machine.today()}
    document = {**about, "commit": machine.commit(), "rounds": done}
    (FOLDER / f"decoding-{machine.host_kind(on)}.json").write_text(json.dumps(document, indent=1) + "\n")
    note = f"rounds: {len(done)}; bitsandbytes {about['bitsandbytes']}; {subtitle(on)} {about['date']}."
    page.fill(page.QUANTIZED, f"decoding {device}", f"{page.table(HEADER, rows(done))}\n\n{note}")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.decoding")
