"""A run from the command to the written adapter, beside TRL and peft: `python -m benchmarks.end_to_end`.

The same data, model, batch and number of steps by three sides, in turns, each in a process of its own:

- TRL's trainer with `peft`;
- TRL's trainer with slimtune's `get_peft_model` in its place;
- `slimtune train`.

Measured are the seconds from the command to its end (imports, reading, planning, loading, training, saving), by the
clock and of the processor, those of a training step (a mean, the first one included), the peak of memory, and joules
where the machine tells. A step of grpo draws its answers, too.

Data: orders (a short system prompt), tools (orders behind seven tool schemas, some 600 tokens), mixed (texts of many
lengths, nothing shared; slimtune packs as many tokens into a row as a batch of the others has, without its padding),
dpo (orders with a wrong answer beside the right one), grpo (eight answers to a prompt of some 300 tokens).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from tokenizers import Tokenizer

from benchmarks.machine import PACKAGES, cores, cpu_model, installed, load, today
from slimtune.data.demo_orders import Example, make_orders
from slimtune.storage.source import folder_of

SIDES = ("trl + peft", "trl + slimtune", "slimtune train")
EXAMPLES = 400
ANSWERS = 8
"""Of grpo, to each prompt."""
ANSWER_TOKENS = 16
_ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")

Row = dict[str, Any]


@dataclass(frozen=True)
class Figures:
    """What one run took; `joules` are None where the machine tells none.

    The processor's seconds say more than those of the clock on a machine that does other work besides.
    """

    seconds: float
    processor_seconds: float
    step_seconds: float
    peak_gb: float
    joules: float | None


def _schemas() -> str:
    """Seven tools as JSON schemas, some 600 tokens."""
    kinds = ("drink", "snack", "voucher", "table", "delivery", "complaint", "receipt")
    tools = [
        {
            "name": f"book_{kind}",
            "description": f"Enter a {kind} for a customer of the shop.",
            "parameters": {
                "name": {"type": "string", "description": "who it is for"},
                "quantity": {"type": "integer"},
                "size": {"type": "string", "enum": ["small", "medium", "large"]},
            },
            "required": ["name", "quantity"],
        }
        for kind in kinds
    ]
    return "You may call these tools.\n" + "\n".join(json.dumps(tool) for tool in tools)


def _tools(orders: list[Example]) -> list[Row]:
    return [{"messages": [{"role": "system", "content": _schemas()}, *order.messages()[-2:]]} for order in orders]


def _mixed(orders: list[Example]) -> list[Row]:
    drawn = random.Random(0)
    return [{"text": "\n".join(order.sentence for order in drawn.sample(orders, drawn.randint(1, 12)))} for _ in orders]


def _pairs(orders: list[Example]) -> list[Row]:
    rows = [order.messages() for order in orders]
    return [
        {"prompt": row[:-1], "chosen": row[-1:], "rejected": other[-1:]}
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
    ]


def _questions(orders: list[Example]) -> list[Row]:
    # Half of the tools: some 300 tokens.
    half = "\n".join(_schemas().splitlines()[:4])
    return [
        {"prompt": [{"role": "system", "content": half}, *row[-2:-1]], "answer": row[-1]["content"]}
        for row in (order.messages() for order in orders)
    ]


DATA: dict[str, Callable[[list[Example]], list[Row]]] = {
    "orders": lambda orders: [{"messages": order.messages()} for order in orders],
    "tools": _tools,
    "mixed": _mixed,
    "dpo": _pairs,
    "grpo": _questions,
}
SETTINGS: dict[str, list[str]] = {
    "mixed": ["data.packing=true"],
    "dpo": ["task=dpo"],
    "grpo": ["task=grpo", f"preferences.generations={ANSWERS}", f"preferences.max_new_tokens={ANSWER_TOKENS}"],
}
"""What `slimtune train` is told beside data, model and batch."""


@dataclass(frozen=True)
class Comparison:
    """One data set on all sides, the same for each of them.

    Attributes:
        packed: the tokens of a batch, which `slimtune train` packs into one row; None where it doesn't.
    """

    kind: str
    model: str
    dtype: str
    batch: int
    steps: int
    data: str
    packed: int | None

    def command(self, side: str, output: Path) -> list[str]:
        """What is typed."""
        if side == "slimtune train":
            options = ["--output", str(output), "--max-steps", str(self.steps)]
            options += ["--batch-size", str(self.batch if self.packed is None else 1)]
            options += [] if self.packed is None else ["--max-length", str(self.packed)]
            return [
                sys.executable, "-m", "slimtune", "train", self.model, self.data, *options,
                f"model.dtype={self.dtype}", *SETTINGS.get(self.kind, []),
            ]  # fmt: skip
        spec = asdict(self) | {
            "library": side.removeprefix("trl + "), "folder": str(folder_of(self.model)), "output": str(output),
            "answers": ANSWERS, "answer_tokens": ANSWER_TOKENS,
        }  # fmt: skip
        return [sys.executable, "-m", "benchmarks.end_to_end_worker", json.dumps(spec)]


def tokens_of_a_batch(rows: list[Row], model: str, batch: int) -> int:
    """On average, padding apart."""
    # Without transformers, which would make this process large.
    tokenizer = Tokenizer.from_file(str(Path(folder_of(model), "tokenizer.json")))
    return round(batch * statistics.mean(len(tokenizer.encode(row["text"])) for row in rows))


def run(comparison: Comparison, side: str) -> Figures:
    """Run one side from its command to its end. Raises: RuntimeError, with what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        output, printed = Path(folder) / "tuned", Path(folder) / "printed.txt"
        joules = _joules()
        with printed.open("w") as file:
            began = time.perf_counter()
            process = subprocess.Popen(comparison.command(side, output), stdout=file, stderr=subprocess.STDOUT)
            # This process is small, so that a child's peak is its own.
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
        if os.waitstatus_to_exitcode(status) or not (output / "adapter_model.safetensors").is_file():
            raise RuntimeError(f"{side} on {comparison.kind} failed:\n{printed.read_text()[-4000:]}")
        results = json.loads((output / "results.json").read_text())
        spent = None if joules is None else ((_joules() or 0) - joules)
        processor = usage.ru_utime + usage.ru_stime
        return Figures(seconds, processor, _step_seconds(results), usage.ru_maxrss * 1024 / 1e9, spent)


def _step_seconds(results: Row) -> float:
    return results["seconds"] / results["steps"]


def _joules() -> float | None:
    """What the processor has used, as Linux counts it; None where it doesn't say."""
    with contextlib.suppress(OSError, ValueError):
        return int(_ENERGY.read_text()) / 1e6
    return None


def in_turns(comparison: Comparison, rounds: int, sides: list[str]) -> Iterator[tuple[str, list[Figures]]]:
    """The runs of each side, which take turns."""
    runs: dict[str, list[Figures]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            runs[side].append(run(comparison, side))
            print(f"  {comparison.kind}, {side}: {runs[side][-1]}", file=sys.stderr)
    yield from runs.items()


_COLUMNS = {"seconds": "s", "processor_seconds": "s", "step_seconds": "s", "peak_gb": "GB"}


def rows_of(kind: str, runs: dict[str, list[Figures]]) -> Iterator[str]:
    """The rows of the table: medians, and how many times less than the first side."""

    def median(side: str, field: str) -> float:
        return statistics.median(getattr(figures, field) for figures in runs[side])

    first = next(iter(runs))
    for side in runs:
        cells = [kind, side]
        for field, unit in _COLUMNS.items():
            value = median(side, field)
            cells.append(f"{value:.2f} {unit} ({median(first, field) / value:.2f})")
        has_joules = all(figures.joules is not None for figures in runs[side])
        cells.append(f"{median(side, 'joules'):,.0f} J" if has_joules else "")
        yield f"| {' | '.join(cells)} |"


app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    data: Annotated[list[str], typer.Option(help=f"Of {', '.join(DATA)}; repeatable.")] = list(DATA),  # noqa: B006
    side: Annotated[list[str], typer.Option(help=f"Of {', '.join(SIDES)}; repeatable.")] = list(SIDES),  # noqa: B006
    model: Annotated[str, typer.Option(help="A packaged name or a folder.")] = "smollm2-135m-instruct",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    batch: Annotated[int, typer.Option(min=1, help="Examples at once; of grpo, eight answers.")] = 8,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side has its turn.")] = 3,
) -> None:
    for name, known in [*((name, tuple(DATA)) for name in data), *((name, SIDES) for name in side)]:
        if name not in known:
            raise typer.BadParameter(f"'{name}' is none of {', '.join(known)}")
    versions = ", ".join(f"{package} {installed(package)}" for package in (*PACKAGES, "trl"))
    print(f"{cpu_model()}, {cores()} cores, load {load():.1f}; {versions}; {today()}")
    print(f"{model} in {dtype}, LoRA of rank 16 on all linear layers, {steps} steps of {batch}, {rounds} in turns\n")
    print("| data | side | command to adapter | processor | a step | peak memory | energy |")
    print("|---" * 7 + "|")
    orders = make_orders(EXAMPLES, 1)[0]
    with tempfile.TemporaryDirectory() as folder:
        for kind in data:
            file = Path(folder) / f"{kind}.jsonl"
            rows = DATA[kind](orders)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            packed = tokens_of_a_batch(rows, model, batch) if kind == "mixed" else None
            comparison = Comparison(kind, model, dtype, ANSWERS if kind == "grpo" else batch, steps, str(file), packed)
            for line in rows_of(kind, dict(in_turns(comparison, rounds, side))):
                print(line, flush=True)


if __name__ == "__main__":
    app()
