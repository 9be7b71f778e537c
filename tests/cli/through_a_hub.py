"""Run by `test_hub` in a process of its own, for the Hub's address is read once: commands of slimtune, one by one.

python through_a_hub.py COMMANDS.json RESULTS.json ADAPTER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import slimtune
from slimtune.cli import app


def main(commands: Path, results: Path) -> None:
    """Each command with its exit code, and what it printed where."""
    found = []
    for arguments in json.loads(commands.read_text()):
        result = CliRunner().invoke(app, arguments)
        found.append({"exit_code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr})
    results.write_text(json.dumps(found))


@torch.no_grad()
def load_in_python(adapter: str, path: Path) -> None:
    """What an adapter computes that is loaded by its id, in each of the ways that there are."""
    ids = torch.arange(3, 20)[None]
    models = {
        "slimtune.load": slimtune.load(adapter, device="cpu")[0],
        "AutoPeftModelForCausalLM": slimtune.AutoPeftModelForCausalLM.from_pretrained(adapter),
        "peft": peft.AutoPeftModelForCausalLM.from_pretrained(adapter),
    }
    logits = {name: model.eval()(input_ids=ids).logits for name, model in models.items()}
    with models["slimtune.load"].disable_adapter():
        logits["base"] = models["slimtune.load"](input_ids=ids).logits
    save_file(logits, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    load_in_python(sys.argv[3], Path(os.environ["HF_HOME"]) / "logits.safetensors")
