"""Steps of LoRA in a process of its own, bare or through `fine_tune`: the seconds from one forward to the next."""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console

import slimtune
from benchmarks.cases import Work
from benchmarks.worker import LEARNING_RATE, Trainer, prepared


def bare(work: Work, model: Any, folder: str) -> None:
    """The least loop that trains."""
    trainer = Trainer(work, model)
    for _ in range(work.steps):
        trainer.step()


def through_fine_tune(work: Work, model: Any, folder: str) -> None:
    """The loop of `slimtune train`, with its data, logs, checks and a bar on a terminal that nobody sees."""
    from slimtune.data.encode import Encoded
    from slimtune.recipe.training import TrainSettings
    from slimtune.train.loop import fine_tune

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = Trainer(work, model).input_ids.tolist()
    settings = TrainSettings(
        learning_rate=LEARNING_RATE, max_steps=work.steps, batch_size=work.batch, scheduler="constant",
        weight_decay=0.01,
    )  # fmt: skip
    examples = [Encoded(row, row) for row in ids * work.steps]
    with tempfile.TemporaryDirectory() as scratch, Path(os.devnull).open("w") as nowhere:
        fine_tune(model, tokenizer, examples, settings, Path(scratch), Console(file=nowhere, force_terminal=True))


def seconds_of_steps(work: Work, side: str, folder: str) -> dict[str, float]:
    """The median over all steps but the first, and the last loss, by which both sides are seen to do the same."""
    torch.manual_seed(0)
    model = prepared(work, slimtune, folder)
    began: list[tuple[float, float]] = []
    losses: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda *_: began.append((time.perf_counter(), time.process_time())))
    model.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.detach()))
    (bare if side == "bare" else through_fine_tune)(work, model, folder)
    spent = [[after - before for before, after in zip(*pair, strict=True)] for pair in itertools.pairwise(began)]
    wall, processor = (median(values) for values in zip(*spent[1:], strict=True))
    return {"step_seconds": wall, "processor_seconds": processor, "loss": losses[-1].item()}


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    given = json.loads(sys.argv[1])
    print(json.dumps(seconds_of_steps(Work(**given["work"]), given["side"], given["folder"])))
