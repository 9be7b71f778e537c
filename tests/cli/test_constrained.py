"""From a pruned folder, or onto a grid, through training and merging by the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

import slimtune
from slimtune.adapters.constrain import zero_share
from slimtune.bases import base_of
from slimtune.cli import app
from slimtune.slim.weights import pruned_layers
from small_text_model import orders, save_base, write_lines

QUICK = ["--max-steps", 3, "--batch-size", 4, "--no-plan", "--lr", 0.005]


def run(*arguments: Any, fails: bool = False) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code != 0) == fails, result.output
    return result


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    return write_lines(folder / "rows.jsonl", *({"messages": e.messages()} for e in orders(16)))


@pytest.fixture(scope="module")
def pruned(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    base = save_base(folder / "base")
    run("prune", base, "-o", folder / "pruned", "--pattern", "2:4", "--data", rows)
    return folder / "pruned"


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return {name: base_of(module).weight(module) == 0 for name, module in pruned_layers(model).items()}


@pytest.mark.parametrize("method", ["lora", "full", "loha", "prompt-tuning"])
def test_a_pruned_model_stays_so_through_training_and_merging(
    method: str, pruned: Path, rows: Path, tmp_path: Path
) -> None:
    tuned, merged = tmp_path / "tuned", tmp_path / "merged"
    said = run("train", pruned, rows, "-o", tuned, "--method", method, *QUICK).output
    assert "50.0% of the weights of the blocks are zero and stay so" in said
    if method == "prompt-tuning":
        assert "held to" not in said
        return
    if method == "full":
        merged = tuned
    else:
        assert "zeros stay zero" in said
        run("merge", tuned, "-o", merged, "--max-kl", 1e-6)
    before, after = zeros(pruned), zeros(merged)
    assert all(torch.equal(after[name], each) for name, each in before.items())
    own = transformers.AutoModelForCausalLM.from_pretrained(pruned).state_dict()
    new = transformers.AutoModelForCausalLM.from_pretrained(merged).state_dict()
    assert not all(torch.equal(tensor, own[name]) for name, tensor in new.items())


def test_who_wants_no_mask_says_so(pruned: Path, rows: Path, tmp_path: Path) -> None:
    said = run("train", pruned, rows, "-o", tmp_path / "tuned", *QUICK, "method.constraint={mask: false}").output
    assert "50.0% of the weights of the blocks are zero\n" in said
    run("merge", tmp_path / "tuned", "-o", tmp_path / "merged")
    assert zero_share(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == 0


def test_trained_on_a_grid_it_merges_into_codes(pruned: Path, rows: Path, tmp_path: Path) -> None:
    tuned, packed = tmp_path / "tuned", tmp_path / "packed"
    options = ["method.constraint.num_bits=4", "method.constraint.group_size=32", "method.constraint.mask=true"]
    said = run("train", pruned, rows, "-o", tuned, *QUICK, *options, "method.constraint.learn_scales=true").output
    assert "zeros stay zero and on the grid of 4 bits in groups of 32, scales learned" in said
    assert "slimtune alone takes it" in " ".join((tuned / "README.md").read_text().split())
    facts = json.loads(run("info", tuned, "--json").stdout)
    assert facts["method"] == "LoRA"
    assert facts["constraint"] == {"mask": True, "num_bits": 4, "group_size": 32, "learn_scales": True}
    assert [engine["takes"] for engine in facts["engines"]] == [False, False, False]
    recipe = (tuned / "recipe.yaml").read_text()
    assert "num_bits: 4" in recipe
    run("merge", tuned, "-o", packed, "--requantize", "--max-kl", 1e-6)
    model, _ = slimtune.load(str(packed))
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "LinearInt4"
    assert zero_share(model) >= 0.5
    run("train", tuned / "recipe.yaml", "-o", tmp_path / "again")


def test_its_memory_is_planned(pruned: Path, rows: Path, tmp_path: Path) -> None:
    options = ["method.constraint.num_bits=4", "method.constraint.group_size=32", "method.constraint.mask=true"]
    planned = [option for option in QUICK if option != "--no-plan"]
    said = run("train", pruned, rows, "-o", tmp_path / "tuned", *planned, *options).output
    assert "memory" in said


def test_what_can_not_be_is_said(pruned: Path, rows: Path, tmp_path: Path) -> None:
    refused = run(
        "train", pruned, rows, "-o", tmp_path / "no", *QUICK, "method.constraint.num_bits=5", fails=True
    ).output
    assert "num_bits must be 4 or 8" in " ".join(refused.split())
    refused = run("train", pruned, rows, "-o", tmp_path / "no", *QUICK, "method.constraint.nm_bits=4", fails=True)
    assert "did you mean 'num_bits'" in " ".join(refused.output.split())
    refused = run("train", pruned, rows, "-o", tmp_path / "no", *QUICK, "method.lora_dropout=0.1", fails=True)
    assert "lora_dropout has no place" in " ".join(refused.output.split())
