"""Sentences that a first day meets: each says what is there, and files are what others can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from slimtune import LoraConfig, PeftModel, get_peft_model
from slimtune.errors import BaseMismatchError, ConfigError, TargetError, counted
from slimtune.models.device import pick_device
from small_text_model import save_base, tiny_model, write_lines


def test_a_device_that_is_not_here_is_answered_by_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(ConfigError, match=r"no device 'cuda' here: .*; pass auto or (mps or )?cpu$"):
        pick_device("cuda")


def test_a_block_is_not_offered_in_place_of_a_module_with_a_weight() -> None:
    with pytest.raises(TargetError, match="'c_attn', which no module is called; there are act_fn, down_proj") as error:
        get_peft_model(tiny_model(), LoraConfig(target_modules=["c_attn"]))
    assert "self_attn" not in str(error.value)
    with pytest.raises(TargetError, match="did you mean 'q_proj'"):
        get_peft_model(tiny_model(), LoraConfig(target_modules=["qproj"]))


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"hidden_size": 32}], ids=str)
def test_an_adapter_on_a_wrong_base_names_both(tmp_path: Path, changes: dict[str, int]) -> None:
    from transformers import AutoModelForCausalLM

    here, there = save_base(tmp_path / "here"), save_base(tmp_path / "there", **changes)
    get_peft_model(AutoModelForCausalLM.from_pretrained(here), LoraConfig()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(BaseMismatchError) as error:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(there), tmp_path / "adapter")
    assert f"(it names {here}, and this model is {there})" in str(error.value)


def test_numbers_agree_with_their_nouns(run: Any, base: Path, tmp_path: Path) -> None:
    assert [counted(count, "row") for count in (0, 1, 2, 2000)] == ["0 rows", "1 row", "2 rows", "2,000 rows"]
    one = write_lines(tmp_path / "one.jsonl", {"prompt": "tea?", "completion": "yes"})
    looked = run("data", "preview", one).stdout
    assert "1 row\n" in looked
    assert "1 example," in looked
    trained = run("train", base, one, "--output", tmp_path / "out", "--max-steps", 1).stdout
    assert "data: 1 example," in trained
    assert "1 step in" in trained


def test_a_relative_base_is_found_from_any_folder(
    run: Any, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    result = run("train", base.name, data, "--output", tmp_path / "out", "--max-steps", 1)
    assert result.exit_code == 0, result.output
    monkeypatch.chdir("/")
    assert run("merge", tmp_path / "out", "--output", tmp_path / "merged").exit_code == 0


def test_all_files_of_a_result_can_be_read_by_whom_the_umask_lets(run: Any, tuned: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert run("merge", tuned, "--output", tmp_path / "merged").exit_code == 0
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "merged").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {0o640}


def test_use_alone_lists_the_adapters(run: Any, base: Path, tuned: Path) -> None:
    result = run("chat", base, "--adapter", f"one={tuned}", stdin="/use\n/exit\n")
    assert result.exit_code == 0
    assert "/use takes the name of an adapter; there are one" in result.output


def test_predict_refuses_what_writes_text_and_scores_no_unknown_label(
    run: Any, base: Path, tuned: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"order {number}", "label": "ab"[number % 2]} for number in range(6)]
    known = write_lines(tmp_path / "known.jsonl", *rows)
    for folder in (tuned, base):
        refused = run("predict", folder, known)
        assert refused.exit_code == 2
        assert "writes text and gives texts no labels; ask it with slimtune generate" in refused.stderr
    assert run("train", base, known, "--output", tmp_path / "classes", "--max-steps", 1).exit_code == 0
    assert "accuracy" in run("predict", tmp_path / "classes", known).stderr
    strange = write_lines(tmp_path / "strange.jsonl", *rows, {"text": "order", "label": "c"})
    result = run("predict", tmp_path / "classes", strange)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 7
    assert "doesn't know: c; it knows a, b" in result.stderr
    assert "accuracy" not in result.stderr


def test_what_a_plan_of_a_classic_name_prints_can_be_run(run: Any, data: Path) -> None:
    planned = run("plan", "llama-2-7b", "--device", "A100 80GB", "--method", "lora", "--base", "dense")
    assert "slimtune train NousResearch/Llama-2-7b-hf DATA.jsonl" in planned.stdout
    refused = run("train", "llama-2-7b", data, "--output", "out")
    assert refused.exit_code != 0
    assert "its weights are on the Hub: pass NousResearch/Llama-2-7b-hf" in refused.stderr


def test_a_device_of_another_name_is_answered_by_what_gpus_are_called() -> None:
    with pytest.raises(ConfigError, match="no device 'gpu' here: NVIDIA's and AMD's GPUs are called cuda") as refused:
        pick_device("gpu")
    assert "mkldnn" not in str(refused.value)
