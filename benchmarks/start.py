"""What comes before the first step, and what a plan takes: `python -m benchmarks.start`.

In turns, each in a process of its own, the seconds of the clock and of the processor (where others work, too, the clock
says little):

- importing torch;
- importing transformers' Trainer and a model's code, which every training with it needs;
- `slimtune train` of SmolLM2 on 400 orders, up to each of its stages and its first step;
- `slimtune plan llama-3-70b --device H100 --devices 8`.

transformers imports what it finds beside it: with `--without peft,bitsandbytes,torchao,scipy` these are hidden, as in
an environment that has slimtune's own dependencies alone. `--src` names another checkout's sources, to compare with.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.machine import PACKAGES, cores, cpu_model, installed, load, today
from slimtune.data.demo_orders import make_orders

_HIDE = """
import sys
for name in {hidden!r}:
    # What stands as None can't be imported, and isn't found.
    sys.modules[name] = None
"""
_UP_TO = """
import importlib.abc, importlib.machinery, os, sys
class Ending(importlib.abc.MetaPathFinder):
    # Not imported beforehand: when and how the command imports its libraries is what is measured.
    def find_spec(self, name, path=None, target=None):
        if name != {module!r}:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            module.{function} = lambda *_, **__: os._exit(0)
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Ending())
"""
STAGES = {
    "train, to its data": ("slimtune.pipeline.train", "read"),
    "train, to its weights": ("slimtune.pipeline.train", "load_model"),
    "train, to its adapter on the model": ("slimtune.pipeline.train", "tune"),
    "train, to the first step": ("slimtune.train.trainer", "AnswerTrainer.training_step"),
}
"""What isn't done any more: before it all is imported, examples are encoded and memory checked, the model is loaded."""
_COMMAND = """
from slimtune.__main__ import main
sys.argv = ["slimtune", *{words!r}]
main()
"""


def cases(folder: Path) -> dict[str, str]:
    """What is run, by name."""
    data = folder / "orders.jsonl"
    data.write_text("".join(f"{json.dumps({'messages': e.messages()})}\n" for e in make_orders(400, 1)[0]))
    train = ["train", "smollm2-135m-instruct", str(data), "--output", str(folder / "tuned"), "--overwrite",
             "model.dtype=float32"]  # fmt: skip
    plan = ["plan", "llama-3-70b", "--device", "H100", "--devices", "8"]
    return {
        "import torch": "import torch",
        "import the Trainer": "from transformers import Trainer\nimport transformers.models.llama.modeling_llama",
        **{
            stage: _UP_TO.format(module=module, function=function) + _COMMAND.format(words=train)
            for stage, (module, function) in STAGES.items()
        },
        "plan of 70B": _COMMAND.format(words=plan),
    }


def seconds(program: str, hidden: list[str], source: str | None) -> tuple[float, float]:
    """The seconds of a program by the clock and of the processor. Raises: RuntimeError, with what it printed."""
    environment = os.environ | ({"PYTHONPATH": source} if source else {})
    with tempfile.TemporaryFile("w+") as printed:
        words = [sys.executable, "-c", _HIDE.format(hidden=hidden) + program]
        began = time.perf_counter()
        process = subprocess.Popen(words, stdout=printed, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        clock = time.perf_counter() - began
        if code := os.waitstatus_to_exitcode(status):
            printed.seek(0)
            raise RuntimeError(f"exit code {code}:\n{printed.read()[-4000:]}")
    return clock, usage.ru_utime + usage.ru_stime


def main(
    rounds: Annotated[int, typer.Option(help="Of all cases, in turns.")] = 5,
    only: Annotated[list[str] | None, typer.Option(help="A case; repeatable.")] = None,
    without: Annotated[str, typer.Option(help="Packages to hide, with commas between.")] = "",
    src: Annotated[list[str] | None, typer.Option(help="Sources to compare; repeatable.")] = None,
) -> None:
    """Print a Markdown table: the median of all rounds, and how many times less than the first sources'."""
    sources: list[str | None] = [*(src or [None])]
    hidden = [name for name in without.split(",") if name]
    versions = ", ".join(f"{package} {installed(package)}" for package in PACKAGES)
    print(f"{cpu_model()}, {cores()} cores, load {load():.0f}; {versions}; {today()}")
    with tempfile.TemporaryDirectory() as folder:
        chosen = {name: program for name, program in cases(Path(folder)).items() if name in (only or [name])}
        taken: dict[tuple[str, str | None], list[tuple[float, float]]] = {(n, s): [] for n in chosen for s in sources}
        for _ in range(rounds):
            for (name, source), each in taken.items():
                each.append(seconds(chosen[name], hidden, source))
                print(
                    "  {} {}: {:.2f} s, {:.2f} of the processor".format(name, source or "", *each[-1]), file=sys.stderr
                )
    print("| case | sources | clock | least | processor | least |\n|" + "---|" * 6)
    for (name, source), each in taken.items():
        cells = []
        for mine, first in zip(zip(*each, strict=True), zip(*taken[name, sources[0]], strict=True), strict=True):
            # By pairs: the machine's speed drifts meanwhile.
            ratio = statistics.median(before / after for before, after in zip(first, mine, strict=True))
            cells += [f"{statistics.median(mine):.1f} s ({ratio:.2f})", f"{min(mine):.1f} s"]
        print(f"| {name} | {source or ''} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
