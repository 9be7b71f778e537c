"""`slimtune info` knows every folder that slimtune writes, and says in a sentence what it can't read."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

import slimtune
from compare.constructed import failed, score
from denoisers import flux
from killed import kill_when, start
from slimtune.compare.record import ComparisonRecord
from slimtune.compare.results import Result
from slimtune.recipe.candidates import Run, trained
from small_encoder import reviews, save_encoder
from small_text_model import tiny_model, write_lines


def facts(run: Any, folder: Path) -> dict[str, Any]:
    """What is said to programs; the same is said to people without an error."""
    shown = run("info", folder)
    assert shown.exit_code == 0, shown.output
    return json.loads(run("info", folder, "--json").stdout)


def test_a_trained_adapter_says_how_it_came_about(run: Any, tuned: Path) -> None:
    found = facts(run, tuned)
    assert (found["steps"], found["examples"]) == (30, 24)
    assert 0 < found["final_loss"] < 10


def test_a_full_difference(run: Any, tmp_path: Path) -> None:
    for store, said in (("difference", "as a difference"), ("whole", "whole")):
        model: Any = slimtune.get_peft_model(tiny_model(), slimtune.FullConfig(store=store))
        model.save_pretrained(tmp_path / store)
        found = facts(run, tmp_path / store)
        assert found["kind"] == "adapter"
        assert said in found["method"]
        assert found["parameters"] == model.get_nb_trainable_parameters()[0]


def test_several_adapters(run: Any, tmp_path: Path) -> None:
    model: Any = slimtune.get_peft_model(tiny_model(), slimtune.LoraConfig(r=2))
    model.add_adapter("second", slimtune.LoraConfig(r=3))
    model.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "named", selected_adapters=["second"])
    found = facts(run, tmp_path / "both")
    assert (found["kind"], found["rank"], found["further_adapters"]) == ("adapter", 2, ["second"])
    assert facts(run, tmp_path / "named")["adapters"] == ["second"]
    assert facts(run, tmp_path)["adapters"] == ["both"]


def test_a_classifier_on_features(run: Any, tmp_path: Path) -> None:
    base, rows = save_encoder(tmp_path / "base"), write_lines(tmp_path / "rows.jsonl", *reviews(12))
    made = run("train", base, rows, "-o", tmp_path / "judge", "--method", "features")
    assert made.exit_code == 0, made.output
    found = facts(run, tmp_path / "judge")
    assert (found["kind"], found["base"], found["pooling"]) == ("classifier on features", str(base), "mean")
    assert len(found["labels"]) == 2


@pytest.mark.slow
def test_a_run_that_was_killed_and_its_checkpoint(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    options = ["--max-steps", 200, "training.save_steps=2", "--rank", 2, "--batch-size", 2, "--no-plan"]
    process = start("train", base, data, "-o", output, *options, screen=tmp_path / "screen.txt")
    kill_when(process, (tmp_path / "tuned.run/checkpoint-4").is_dir)
    found = facts(run, tmp_path / "tuned.run")
    assert (found["base"], found["method"], found["writes"]) == (str(base), "lora", str(output))
    step = max(found["checkpoints"])
    assert step >= 4
    checkpoint = facts(run, tmp_path / f"tuned.run/checkpoint-{step}")
    assert (checkpoint["kind"], checkpoint["step"], checkpoint["finished"]) == ("checkpoint", step, False)
    model: Any = slimtune.get_peft_model(tiny_model(), slimtune.LoraConfig(r=2))
    assert checkpoint["parameters"] == model.get_nb_trainable_parameters()[0]


def test_a_comparison_and_its_runs(run: Any, tmp_path: Path) -> None:
    candidate = trained("lora")
    nothing: dict[str, Any] = {"same": {}, "machine": {}, "versions": {}, "recipe": "", "date": "", "command": ""}
    ComparisonRecord(model="base", data="orders", candidates=["lora"], seeds=2, **nothing).write(tmp_path)
    done = Result(candidate=candidate.name, seed=0, status="done", score=score(0.75))
    for result in (done, failed(candidate, 1, "no memory")):
        place = tmp_path / "runs" / Run(candidate, result.seed).slug
        place.mkdir(parents=True)
        result.write(place / "result.json")
    found = facts(run, tmp_path)
    assert (found["kind"], found["runs_done"], found["runs_failed"]) == ("comparison", 1, 1)
    assert facts(run, tmp_path / "runs/lora-seed-0")["exact match"] == 0.75
    assert facts(run, tmp_path / "runs/lora-seed-1")["reason"] == "no memory"


def test_lora_of_diffusers(run: Any, tmp_path: Path) -> None:
    model = slimtune.get_peft_model(flux(), slimtune.LoraConfig(r=2, target_modules=["to_q"]))
    slimtune.save_diffusers_lora(tmp_path, transformer=model)
    found = facts(run, tmp_path)
    assert (found["kind"], found["parts"]) == ("LoRA of diffusers", ["transformer"])
    assert found["parameters"] == model.get_nb_trainable_parameters()[0]


def refused(run: Any, folder: Path, said: str) -> None:
    result = run("info", folder)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("slimtune: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_what_is_no_folder_of_slimtune(run: Any, tuned: Path, tmp_path: Path) -> None:
    refused(run, tmp_path, "found: nothing")
    (tmp_path / "notes.txt").write_text("mine")
    refused(run, tmp_path, "found: notes.txt")
    refused(run, tmp_path / "notes.txt", "is a file")
    shutil.copytree(tuned, tmp_path / "tuned")
    refused(run, tmp_path / "tunde", "did you mean 'tuned'?")


def header(*entries: dict[str, Any]) -> bytes:
    """A safetensors file of 8 bytes of tensors that announces these."""
    text = json.dumps({f"tensor{number}": entry for number, entry in enumerate(entries)}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


def entry(shape: Any, begin: int = 0, end: int = 8, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


CLAIMS = {
    "a huge shape": header(entry([2**40, 2**40])),
    "a negative shape": header(entry([-1, -2])),
    "a shape of words": header(entry(["many"])),
    "tensors in the same place": header(entry([2]), entry([2])),
    "a gap": header(entry([1], 4, 8)),
    "more than there is": header(entry([4], 0, 16)),
    "deep nesting": struct.pack("<Q", 200_000) + b'{"a":' * 40_000,
    "a list": struct.pack("<Q", 2) + b"[]",
    "text": b"<html>404</html>",
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_weights_that_claim_what_they_do_not_hold(run: Any, tuned: Path, tmp_path: Path, claim: str) -> None:
    (tmp_path / "adapter_config.json").write_bytes((tuned / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(CLAIMS[claim])
    refused(run, tmp_path, "is damaged")


@pytest.mark.parametrize("fields", [{"r": "many"}, {"r": 2, "rank_pattern": 7}])
def test_a_config_of_other_types(run: Any, tuned: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    shutil.copytree(tuned, tmp_path / "tuned")
    (tmp_path / "tuned/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))
    refused(run, tmp_path / "tuned", "is damaged")


def test_a_config_that_is_nested_too_deeply(run: Any, tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path / "tuned")
    (tmp_path / "tuned/adapter_config.json").write_text('{"r":' * 100_000)
    refused(run, tmp_path / "tuned", "nested too deeply")


def test_names_in_a_folder_do_not_steer_the_terminal(run: Any, tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path / "tuned")
    config = json.loads((tuned / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "base\x1b]0;owned\x07[bold]"
    (tmp_path / "tuned/adapter_config.json").write_text(json.dumps(config))
    shown = run("info", tmp_path / "tuned").stdout
    assert "\x1b" not in shown
    assert "[bold]" in shown
