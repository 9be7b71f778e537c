"""Run by torchrun in `test_several_processes`: each recipe of a file, one after the other, by the same processes.

torchrun --nproc_per_node 2 several_processes.py RECIPES.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from slimtune.console.screen import open_screen
from slimtune.pipeline.train import run
from slimtune.recipe.recipe import Recipe


def train(recipe: dict[str, Any], resume: bool = False) -> None:
    run(Recipe.of(recipe), open_screen(works_on=True), plans=False, resume=resume)


def main(file: Path) -> None:
    torch.set_num_threads(1)
    for recipe in json.loads(file.read_text()):
        train(recipe)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # gloo's threads may outlive the interpreter's teardown, which aborts the process after its work is done.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
