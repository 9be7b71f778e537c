"""Planned seconds of a step beside measured ones: calibrates this machine as `slimtune plan --calibrate` does, first.

    python -m benchmarks.plan_time     # writes the table into docs/figures/planning.md

Each step is measured in a process of its own: the median of five, after one to warm up. A machine that is shared may
change its speed meanwhile: it is calibrated once more at the end, and how far that is off is told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from typing import Any

import torch
import transformers

import slimtune
from benchmarks import machine, page
from benchmarks.plan_accuracy import METHODS
from benchmarks.runs import run_module
from slimtune.plan.build import config_of
from slimtune.plan.devices import this_cpu
from slimtune.plan.memory import Setting, Work
from slimtune.plan.simulate import quiet, simulate
from slimtune.plan.step import optimizer_for
from slimtune.plan.time import calibrate, rates_of, step_seconds
from slimtune.plan.trace import prepare

PAGE = machine.ROOT / "docs" / "figures" / "planning.md"
STEPS = 5
TYPICAL = Work(flops=10**12, bytes_moved=10**10)
"""About a step of the cases."""


@dataclass(frozen=True)
class Case:
    """A step to be planned and taken."""

    model: str = "smollm2-135m-instruct"
    method: str = "LoRA"
    base: Any = "dense"
    checkpointing: bool = False
    dtype: str = "bfloat16"
    batch: int = 4
    sequence: int = 256

    @property
    def setting(self) -> Setting:
        task_type = "SEQ_CLS" if "minilm" in self.model else "CAUSAL_LM"
        method = METHODS[self.method]()
        if method is not None:
            method.task_type = task_type
        return Setting(
            method, self.base, dtype=self.dtype, batch=self.batch, sequence=self.sequence, device="cpu",
            gradient_checkpointing=self.checkpointing, task_type=task_type,
        )  # fmt: skip

    def planned_seconds(self) -> float:
        setting = self.setting
        asked = {one.name: getattr(setting, one.name) for one in fields(setting) if one.name != "method"}
        return step_seconds(simulate(self.model, setting.method, **asked), rates_of(this_cpu()))

    def measured_seconds(self) -> float:
        setting = self.setting
        with quiet():
            run = prepare(config_of(self.model), setting, setting.task_type, fake=False)
        batch = run.step.batch()
        optimizer = optimizer_for(setting, [p for p in run.model.parameters() if p.requires_grad])

        def step() -> float:
            began = time.perf_counter()
            run.step.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - began

        step()
        return statistics.median(step() for _ in range(STEPS))


ENCODER = Case(model="minilm-l6-v2", dtype="float32", batch=16, sequence=128)
CASES = (
    *(Case(method=method) for method in METHODS if method not in ("LoHa", "VeRA", "AdaLoRA", "BitFit")),
    *(Case(base=base) for base in ("nf4", "int8")),
    Case(checkpointing=True),
    Case(base="nf4", checkpointing=True),
    Case(method="full", checkpointing=True),
    Case(batch=1, sequence=512),
    Case(batch=8, sequence=64),
    Case(batch=1, sequence=64),
    Case(dtype="float32"),
    ENCODER,
    replace(ENCODER, method="full"),
    replace(ENCODER, sequence=32),
)


def table() -> list[str]:
    """Each case, and the median error in the last line."""
    rows, errors = [], []
    began = run_module("benchmarks.plan_time", "--calibrate")["seconds"]
    for case in CASES:
        found = run_module("benchmarks.plan_time", "--one", json.dumps(asdict(case)))
        errors.append(found["planned"] / found["measured"] - 1)
        shape = f"{case.batch} x {case.sequence}"
        checkpointing = "yes" if case.checkpointing else "no"
        shown = f"{found['planned']:.2f} s", f"{found['measured']:.2f} s", f"{errors[-1]:+.0%}"
        rows.append((case.model, case.method, case.base, case.dtype, checkpointing, shape, *shown))
        print(*rows[-1], flush=True)
    within = sum(abs(error) <= 0.2 for error in errors)
    median = statistics.median(map(abs, errors))
    head = ("model", "method", "base", "dtype", "checkpointing", "batch", "planned", "measured", "planned beside it")
    said = f"The median error is {median:.0%}; {within} of {len(errors)} are within 20%."
    drift = run_module("benchmarks.plan_time", "--calibrate")["seconds"] / began - 1
    said += f" Calibrated again at the end, the machine took {drift:+.0%} of time for the same work."
    print(said)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, slimtune {slimtune.__version__}"
    on = f"{machine.cpu_model()}, {machine.cores()} cores; {versions}; {date.today()}"
    return [page.table(head, rows), "", f"{said} {on}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.calibrate:
        rates = calibrate(this_cpu())
        print(json.dumps({"seconds": rates.seconds(TYPICAL, is_half=True)}))
    elif arguments.one:
        case = Case(**json.loads(arguments.one))
        print(json.dumps({"planned": case.planned_seconds(), "measured": case.measured_seconds()}))
    else:
        page.fill(PAGE, "time", "\n".join(table()))


if __name__ == "__main__":
    main()
