"""Run by torchrun in `test_several_processes`: each recipe of a file, one after the other, by the same processes.

torchrun --nproc_per_node 2 several_processes.py RECIPES.json [--sharded] [--stop-after STEP | --resume]

With --sharded, FSDP2 as accelerate sets it up on GPUs, over gloo: nothing of it needs one but accelerate's own look at
what there is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

import slimtune.pipeline.train as pipeline
from slimtune.console.screen import open_screen
from slimtune.pipeline.train import run
from slimtune.recipe.recipe import Recipe
from slimtune.train import arguments
from slimtune.train.checks import InterruptedRunError, StopOnSignal


def train(recipe: dict[str, Any], resume: bool = False) -> None:
    run(Recipe.of(recipe), open_screen(works_on=True), plans=False, resume=resume)


def shard_on_the_cpu() -> None:
    """Have accelerate take the processes on the CPU for those of GPUs, so that it shards, and let that pass."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)  # type: ignore
    for module in (arguments, pipeline):
        module.check_processes = lambda *args: None  # type: ignore


def stop_after(step: int) -> None:
    """Have one of the processes get a signal in this step."""
    end = StopOnSignal.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step and torch.distributed.get_rank() == 1:
            self.received = signal.SIGTERM
        end(self, args, state, control, **kwargs)

    StopOnSignal.on_step_end = on_step_end  # type: ignore[method-assign]


def main(file: Path, *options: str) -> None:
    torch.set_num_threads(1)
    if "--sharded" in options:
        shard_on_the_cpu()
    if "--stop-after" in options:
        stop_after(int(options[-1]))
    for recipe in json.loads(file.read_text()):
        try:
            train(recipe, resume="--resume" in options)
        except InterruptedRunError:
            if "--stop-after" not in options:
                raise
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # gloo's threads may outlive the interpreter's teardown, which aborts the process after its work is done.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
