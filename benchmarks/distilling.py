"""`python -m benchmarks.distilling`: stored teacher tokens against the teacher beside, and pruned models recovered.

On SmolLM2-135M-Instruct and the demo's orders, each row a run of `slimtune prune` and `slimtune distill`. The student
is the model without some of its layers or feed-forward neurons, the teacher the whole one.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from slimtune.cli import app
from slimtune.data.demo_orders import make_orders

BASE = "smollm2-135m-instruct"


def slimtune(*arguments: Any) -> float:
    """Run a command in this process; its seconds."""
    began = time.monotonic()
    try:
        app([str(argument) for argument in arguments])
    except SystemExit as end:
        if end.code:
            raise
    return time.monotonic() - began


def main(steps: int = 40) -> None:
    """Prune, distil with each loss, and print the losses on held-out rows as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"messages": order.messages()} for order in make_orders(200, 1)[0]]
        (folder / "orders.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = {}
        for size, what in (("--layers", 25), ("--ffn", 0.75)):
            pruned = folder / f"pruned{size}"
            slimtune("prune", BASE, "-o", pruned, size, what, "--data", folder / "orders.jsonl")
            for loss in (["--beta", 0], ["--beta", 0, "--top-k", 0], ["--beta", 0.5], ["--beta", 1]):
                key = f"{size} {what} {' '.join(map(str, loss))}"
                out = folder / "out"
                seconds = slimtune(
                    "distill", BASE, pruned, "--data", folder / "orders.jsonl", "-o", out, "--alpha", 1, *loss,
                    "--max-steps", steps, "--cache", folder / "cache", "--no-plan", "--overwrite",
                    "data.held_out=0.1",
                )  # fmt: skip
                curve = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
                losses = [line["loss"] for line in curve if "loss" in line]
                held_out = [line["eval_loss"] for line in curve if "eval_loss" in line]
                results[key] = {"first": losses[0], "last": losses[-1], "held out": held_out[-1:], "seconds": seconds}
                print(json.dumps({key: results[key]}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
