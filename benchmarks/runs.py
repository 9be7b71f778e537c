"""All sides of a case in turns, each measurement in a fresh process.

This process loads no torch, so that its children inherit nothing that weighs: see `peak_rss_bytes` there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cases import Case, Side, Work
from benchmarks.machine import ROOT

Round = dict[str, dict[str, Any]]
"""What each side reported in its turn."""


class MeasurementError(RuntimeError):
    """A process that failed, or two sides that did not do the same work."""


def run_module(module: str, *arguments: str, python: str = sys.executable) -> Any:
    """The JSON that a module prints when it runs in a fresh process, cut off from the network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        what = f"{module} {' '.join(arguments)} ended with {done.returncode}"
        raise MeasurementError(f"{what}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Bench:
    """What all measurements of a run share."""

    def __init__(self, ours: str, model: str, scratch: str, console: Console) -> None:
        self.console = console
        self.libraries = {"peft": "peft", "ours": ours, "floor": None}
        self.scratch = Path(scratch)
        self.adapter = str(self.scratch / "adapter")
        with console.status("Preparing the base model and an adapter"):
            self.folder = run_module("benchmarks.prepare", model, self.adapter)["folder"]

    def folder_of(self, work: Work) -> str:
        """SmolLM2's folder, or that of a model of random weights, written once."""
        if not work.is_written_first:
            return self.folder
        folder = self.scratch / work.model
        if not folder.exists():
            with self.console.status(f"Writing {work.model} to disk"):
                run_module("benchmarks.bases", json.dumps(asdict(work)), str(folder))
        return str(folder)

    def measure(self, case: Case, side: Side, profile: bool = False) -> dict[str, Any]:
        """One side once, in a process of its own."""
        work = case.work_of(side)
        specification = {
            "work": asdict(work),
            "library": self.libraries[side.partition("-")[0]],
            "folder": self.folder_of(work),
            "adapter": self.adapter,
            "profile": profile,
        }
        return run_module("benchmarks.worker", json.dumps(specification))

    def rounds(self, case: Case, count: int) -> list[Round]:
        """All sides in turns, `count` times."""
        done: list[Round] = []
        for number in range(count):
            one: Round = {}
            for side in case.sides:
                with self.console.status(f"{case.title}: round {number + 1} of {count}, {side}"):
                    one[side] = self.measure(case, side)
            check_same_work(case, one)
            done.append(one)
        return done


def check_same_work(case: Case, one: Round) -> None:
    """A ratio means something only if both sides trained the same parameters and saw the same loss."""
    ours = one["ours"]["checks"]
    peft = one["peft"]["checks"] if "peft" in one else {}
    for name, expected in peft.items():
        # The first losses agree as a new adapter changes nothing; later ones depend on how A was drawn.
        allowed = {"trainable": 0.0, "without_gradient": 0.0, "last_loss": 0.1}.get(name, 0.01)
        if abs(ours[name] - expected) > allowed * abs(expected):
            raise MeasurementError(f"{case.title}: {name} is {ours[name]} here and {expected} in peft")
    if case.work.kind == "train" and ours["last_loss"] >= ours["first_loss"]:
        raise MeasurementError(f"{case.title}: the loss did not fall: {ours}")
