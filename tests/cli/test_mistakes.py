"""What a user can get wrong: one sentence on standard error, exit code 2, and nothing is lost or left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from small_text_model import save_base, write_lines


def refused(result: Any, *said: str) -> None:
    """Exit code 2 and one sentence that says all of this."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("slimtune: ")
    assert result.stderr.count("\n") == 1
    assert "not planned" not in result.stdout
    assert "Traceback" not in result.output
    for part in said:
        assert part in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rank", 0], ["0"]),
        (["--rank", -3], ["-3"]),
        (["method.lora_dropout=1.5"], ["1.5"]),
        (["method.target_modules=[q_prj]"], ["q_prj", "did you mean 'q_proj'?"]),
        (["method.target_modules=[q_proj,nothing_like_it]"], ["nothing_like_it"]),
        ([r"method.target_modules=.*nowhere\.x"], ["nowhere"]),
        (["--method", "lorra"], ["did you mean 'lora'?"]),
        (["--method", "full", "--rank", 4], ["--rank", "--method full"]),
        (["method.bias=some"], ["some"]),
        (["method.init_lora_weights=gausian"], ["did you mean 'gaussian'?"]),
        (["method.layers_to_transform=[0,x]"], ["layers_to_transform", "x"]),
        (["method.layers_to_transform=[7]", "method.target_modules=[q_proj]"], ["7"]),
        (["method.rank_pattern=q_proj"], ["q_proj", "method.rank_pattern"]),
        (["--learning-rate", 0], ["learning_rate"]),
        (["--learning-rate", "nan"], ["learning_rate"]),
        (["--max-steps", 0], ["max_steps"]),
        (["--batch-size", 0], ["batch_size"]),
        (["training.scheduler=cosin"], ["did you mean 'cosine'?"]),
        (["data.too_long=cut"], ["truncate"]),
        (["model.dtype=bfloat61"], ["did you mean 'bfloat16'?"]),
        (["model.device=cuda:9"], ["cuda:9"]),
        (["data.held_out=0.5", "data.held_out=x.jsonl"], ["data.held_out", "twice"]),
        (["--max-length", 4], ["longer than 4 tokens"]),
        (["--max-length", 4, "data.too_long=truncate"], ["0%"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_options_of_train(
    run: Any, base: Path, data: Path, tmp_path: Path, options: list[Any], said: list[str]
) -> None:
    refused(run("train", base, data, "-o", tmp_path / "out", "--max-steps", 2, *options), *said)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_named_with_the_nearest(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    result = run("train", base, data, "-o", tmp_path / "out", "--learning-rat", "1e-4")
    assert result.exit_code == 2
    assert "--learning-rat" in result.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ["no example"]),
        ('{"messages": [', ["line 1", "JSON"]),
        ('{"prompt": "a", "completion": "b"}\n[1]\n', ["line 2", "list"]),
        ('{"mesages": []}', ["line 1", "did you mean 'messages'?"]),
        ('{"prompt": "a", "my_answer": "b"}', ["line 1", "answer", "completion"]),
        ('{"messages": []}', ["line 1", "messages"]),
        ('{"messages": [{"role": "robot", "content": "x"}]}', ["line 1", "role"]),
        ('{"messages": [{"role": "user", "content": 3}]}', ["line 1", "content"]),
        ('{"messages": [{"role": "user", "content": "x"}]}', ["line 1", "no assistant turn"]),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', ["begins with the assistant"]),
    ],
)
def test_data_that_can_not_be_learned_from(run: Any, base: Path, tmp_path: Path, content: str, said: list[str]) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    refused(run("train", base, tmp_path / "data.jsonl", "-o", tmp_path / "out"), *said)
    assert not (tmp_path / "out").exists()


def test_a_data_file_that_is_not_there(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    refused(run("train", base, data.with_name("trian.jsonl"), "-o", tmp_path / "out"), "did you mean 'train.jsonl'?")


def test_a_data_file_that_is_not_text(run: Any, base: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    refused(run("train", base, tmp_path / "data.jsonl", "-o", tmp_path / "out"), "UTF-8")


def test_a_template_that_rewrites_earlier_turns(run: Any, tmp_path: Path) -> None:
    forgetful = "{% for m in messages %}{{ m['role'] }}:{% if loop.last %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    model = save_base(
        tmp_path / "base", chat_template=forgetful + "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    rows = write_lines(tmp_path / "data.jsonl", {"messages": turns})
    refused(run("train", model, rows, "-o", tmp_path / "out"), "renders turn 2 of 4 differently")


def test_an_output_folder_that_holds_something_is_refused_before_any_work(run: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    # The model doesn't exist either: the folder is looked at first.
    refused(run("train", tmp_path / "no-model", data, "-o", tmp_path / "out"), "already holds", "--overwrite")
    refused(run("demo", "-o", tmp_path / "out"), "already holds")
    refused(run("demo-data", "-o", tmp_path / "out"), "already holds")
    refused(run("merge", tmp_path / "no-adapter", "-o", tmp_path / "out"), "already holds")
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_an_output_that_is_a_file(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused(run("train", base, data, "-o", tmp_path / "out"), "is a file")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_models_that_are_not_there(run: Any, base: Path, tmp_path: Path, command: str) -> None:
    refused(run(command, "smollm2-135m-instrct", stdin="x"), "did you mean 'smollm2-135m-instruct'?")
    refused(run(command, str(base)[:-1], stdin="x"), f"did you mean '{base}'?")
    (tmp_path / "empty").mkdir()
    refused(run(command, tmp_path / "empty", stdin="x"), "config.json is missing")


def test_a_model_of_pickled_weights(run: Any, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    refused(run("generate", tmp_path / "pickled", "x"), "pytorch_model.bin", "run any code")
    refused(run("info", tmp_path / "pickled"), "pytorch_model.bin", "run any code")


def test_a_model_whose_weights_are_cut_off(run: Any, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(run("generate", tmp_path / "cut", "x"), "damaged")
    refused(run("info", tmp_path / "cut"), "damaged")


def test_a_model_that_writes_no_text(run: Any, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    refused(run("generate", tmp_path / "bert", "x"), "BertForSequenceClassification", "writes no text")


@pytest.mark.parametrize("damage", ["cut", "empty", "tampered", "missing", "pickled"])
def test_damaged_adapters(run: Any, base: Path, tuned: Path, tmp_path: Path, damage: str) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(tuned, adapter)
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    if damage in ("missing", "pickled"):
        weights.unlink()
    if damage == "pickled":
        torch.save({}, adapter / "adapter_model.bin")
    changed = {"cut": content[:-100], "empty": b"", "tampered": content[:-1] + bytes([content[-1] ^ 1])}
    if damage in changed:
        weights.write_bytes(changed[damage])
    refused(run("generate", base, "x", "--adapter", adapter), str(adapter))
    refused(run("merge", adapter, "-o", tmp_path / "merged"), str(adapter))
    if damage != "tampered":
        refused(run("info", adapter), str(adapter))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_an_adapter_for_another_base(run: Any, tuned: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", hidden_size=32)
    refused(run("generate", other, "x", "--adapter", tuned), "q_proj")


def test_an_adapter_whose_base_is_gone(run: Any, tuned: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(tuned, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    gone = str(tmp_path / "gone" / "away" / "model")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": gone}))
    refused(run("generate", adapter, "x"), gone)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    refused(run("merge", adapter, "-o", tmp_path / "merged"), "names no base model")


def test_an_adapter_with_an_unknown_field_that_changes_the_result(
    run: Any, base: Path, tuned: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(tuned, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_magic": True}))
    refused(run("generate", base, "x", "--adapter", adapter), "use_magic")


def test_adapters_on_the_command_line(run: Any, base: Path, tuned: Path, tmp_path: Path) -> None:
    refused(run("generate", base, "x", "-a", tuned, "-a", tuned), "two adapters are called 'tuned'")
    refused(run("generate", base, "x", "-a", tmp_path / "none"), "no adapter folder")
    refused(run("merge", base, "-o", tmp_path / "merged"), "adapter_config.json is missing")
    refused(run("train", tuned, tmp_path / "x", "-o", tmp_path / "out"), "data file")


def test_training_an_adapter_folder_is_refused(run: Any, tuned: Path, data: Path, tmp_path: Path) -> None:
    refused(run("train", tuned, data, "-o", tmp_path / "out"), "is an adapter already")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "good", "label": "yes"}\n{"text": "bad", "label": "no"}\n' * 4)
    features = ("train", tuned, rows, "--method", "features", "-o", tmp_path / "out")
    refused(run(*features), "is an adapter already")


def test_prompts(run: Any, base: Path, tmp_path: Path) -> None:
    refused(run("generate", base, "   "), "empty")
    refused(run("generate", base, "x", "--input", tmp_path / "y.jsonl"), "pass one of them")
    rows = write_lines(tmp_path / "rows.jsonl", {"my_question": "x"})
    refused(run("generate", base, "--input", rows), "line 1", "question")


def test_a_real_process_ends_with_2_and_debug_shows_where(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slimtune"]
    plain = subprocess.run([*command, "info", tmp_path / "none"], capture_output=True, text=True)
    assert plain.returncode == 2
    assert plain.stdout == ""
    assert plain.stderr.startswith("slimtune: no folder")
    debugged = subprocess.run([*command, "--debug", "info", tmp_path / "none"], capture_output=True, text=True)
    assert debugged.returncode != 0
    assert "Traceback" in debugged.stderr


def test_a_process_without_a_number_is_refused_before_anything_is_read(
    run: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("train", base, tmp_path / "none.jsonl", "--output", tmp_path / "tuned")
    assert result.exit_code == 2, result.output
    assert "WORLD_SIZE says 2 processes, and RANK and LOCAL_RANK don't say which" in result.stderr
    assert list(tmp_path.iterdir()) == []
