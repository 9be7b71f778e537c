"""`slimtune plan`: the answer on the screen and as JSON, pictures, the classic table, exit codes, mistakes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from slimtune.errors import PlanError
from small_text_model import orders, write_lines

NOTHING_FITS = 3
LORA = ("--method", "lora", "--base", "dense")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No calibration of this machine may change what is told."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def refused(result: Any, *said: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("slimtune: ")
    assert result.stderr.count("\n") == 1
    for part in said:
        assert part in result.stderr


def test_a_model_data_and_a_gpu_give_the_answer_in_one_command(run: Any, base: Path, data: Path) -> None:
    result = run("plan", base, "--data", data, "--device", "RTX 3060", "--method", "lora", "--base", "dense")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    for part in (
        "RTX 3060: 12.6 GB",
        "data: 24 examples",
        "% are learned",
        "padding:",
        "lora",
        "w weights",
        "by the data sheet",
        "take lora, rank 16, alpha 32, all linear layers, learning rate 0.0002, batch",
        "Dettmers et al. 2023, arXiv:2305.14314",
        "but: ",
        "vLLM takes it",
        "run it: slimtune train",
    ):
        assert part in shown, part


def test_what_rows_begin_with_alike_is_planned_once(run: Any, base: Path, data: Path) -> None:
    options = ("--data", data, "--device", "T4", *LORA)
    assert "is counted once" in " ".join(run("plan", base, *options).stdout.split())
    shared = json.loads(run("plan", base, *options, "--json").stdout)["choices"][0]
    whole = json.loads(run("plan", base, *options, "training.share_prefixes=false", "--json").stdout)["choices"][0]
    assert 0 < shared["computed_share"] < 0.9
    assert whole["computed_share"] is None
    assert shared["peak_bytes"] < whole["peak_bytes"]
    assert "training.share_prefixes=false" in whole["command"]
    assert "share_prefixes" not in shared["command"]


def test_the_command_that_is_told_runs(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    told = json.loads(run("plan", base, "--data", data, "--device", "cpu", *LORA, "--json").stdout)
    command = shlex.split(told["choices"][0]["command"])
    assert command[:2] == ["slimtune", "train"]
    arguments = [str(tmp_path / "tuned") if word == "tuned" else word for word in command[1:]]
    result = run(*arguments, "--max-steps", 1, "model.device=cpu")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "tuned" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (16, 32)
    stored = (tmp_path / "tuned" / "adapter_model.safetensors").stat().st_size
    assert stored == pytest.approx(told["choices"][0]["adapter_bytes"], rel=0.15)


def test_json_holds_all_of_it(run: Any, base: Path, data: Path) -> None:
    result = run("plan", base, "--data", data, "--device", "t4", "--price", 2, "--memory", 4, *LORA, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["fits"] is True
    assert told["device"]["name"] == "T4"
    assert told["device"]["memory_bytes"] == 4_000_000_000
    assert told["data"]["examples"] == 24
    (choice,) = told["choices"]
    assert choice["peak_bytes"] == sum(choice["parts"].values())
    assert choice["peak_bytes"] < choice["needed_bytes"] < 4e9
    assert choice["time"]["cost"] == pytest.approx(choice["time"]["seconds"] / 3600 * 2)
    assert {reason["rule"] for reason in choice["reasons"]} >= {"all-linear", "rank", "alpha"}
    assert {verdict["engine"] for verdict in choice["engines"]} == {"peft", "vLLM", "llama.cpp"}


def test_examples_that_would_be_cut_are_counted(run: Any, base: Path, data: Path) -> None:
    result = run("plan", base, "--data", data, "--device", "T4", "--max-length", 70, *LORA, "--json")
    told = json.loads(result.stdout)
    assert 0 < told["data"]["cut"] <= 24
    assert "--max-length 70 data.too_long=truncate" in told["choices"][0]["command"]
    shown = run("plan", base, "--data", data, "--device", "T4", "--max-length", 70, *LORA).stdout
    assert f"{told['data']['cut']} examples are longer than 70 tokens" in " ".join(shown.split())


def test_rows_with_labels_are_planned_as_a_classifier(run: Any, base: Path, tmp_path: Path) -> None:
    rows = [{"text": e.messages()[-1]["content"], "label": str(i % 3)} for i, e in enumerate(orders(12))]
    path = write_lines(tmp_path / "rows.jsonl", *rows)
    told = json.loads(run("plan", base, "--data", path, "--device", "T4", *LORA, "--json").stdout)
    assert told["data"]["labels"] == ["0", "1", "2"]
    assert "in-context-first" not in {reason["rule"] for reason in told["choices"][0]["reasons"]}


def test_nothing_fits_is_an_exit_code_of_its_own(run: Any, base: Path) -> None:
    result = run("plan", base, "--device", "RTX 3060", "--memory", 0.43, *LORA)
    assert result.exit_code == NOTHING_FITS
    assert "nothing fits" in result.stdout
    assert "the least is lora with" in " ".join(result.stdout.split())


def test_a_configuration_alone_is_enough(run: Any, base: Path, tmp_path: Path) -> None:
    shutil.copy(base / "config.json", tmp_path / "config.json")
    result = run("plan", tmp_path, "--device", "T4", "--max-length", 32, *LORA)
    assert result.exit_code == 0, result.output
    assert "no data given: time and cost are for 1,000 examples of 32 tokens" in result.stdout


@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
def test_the_memory_is_drawn(run: Any, base: Path, tmp_path: Path, name: str) -> None:
    options = ["--device", "T4", "--max-length", 32, *LORA, "--plot", tmp_path / name]
    assert run("plan", base, *options).exit_code == 0
    assert (tmp_path / name).stat().st_size > 3000


@pytest.mark.slow
def test_the_classic_table(run: Any) -> None:
    result = run("plan", "--table")
    assert result.exit_code == 0, result.output
    for part in ("llama-2-7b", "qwen1.5-110b", "(67)", "(1056)", "(229)", "(138)", "(72)", "QLoRA, 4-bit", "hold"):
        assert part in result.stdout, part


@pytest.mark.slow
@pytest.mark.usefixtures("short_calibration")
def test_calibration_alone(run: Any, base: Path) -> None:
    measured = json.loads(run("plan", "--calibrate", "--json").stdout)
    assert measured["is_measured"] is True
    told = json.loads(run("plan", base, "--device", measured["device"], "--max-length", 32, *LORA, "--json").stdout)
    assert told["rates"]["flops_32bit"] == measured["flops_32bit"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], ["MODEL", "--table", "--calibrate"]),
        (["nowhere/at-all"], ["nowhere/at-all"]),
        (["smollm2-135m-instuct"], ["did you mean 'smollm2-135m-instruct'?"]),
        (["llama-2-7c"], ["did you mean 'llama-2-7b'?"]),
        (["llama-2-7b", "--device", "RTX 50900"], ["did you mean 'rtx 5090'?"]),
        (["llama-2-7b", "--goal", "qualty"], ["did you mean 'quality'?"]),
        (["llama-2-7b", "--method", "lorra"], ["did you mean 'lora'?"]),
        (["llama-2-7b", "--base", "nf5"], ["nf5"]),
        (["llama-2-7b", "--rank", -1], ["rank", "-1"]),
        (["llama-2-7b", "--batch-size", 0], ["batch_size", "0"]),
        (["llama-2-7b", "--max-length", 0], ["max_length", "0"]),
        (["llama-2-7b", "--memory", 0], ["memory", "0"]),
        (["llama-2-7b", "--price", -1], ["price", "-1"]),
        (["llama-2-7b", "training.epochs=-1"], ["epochs", "-1"]),
        (["llama-2-7b", "--devices", 0], ["devices", "0"]),
        (["llama-2-7b", "--devices", 2, "--device", "cpu"], ["cpu can't share a training"]),
        (["llama-2-7b", "--max-length", 5000, "--device", "T4"], ["5000", "4096 positions"]),
        (["llama-2-7b", "task=dop"], ["did you mean 'dpo'?"]),
        (["llama-2-7b", "preferences.generations=4"], ["generations would change nothing"]),
        (["llama-2-7b", "training.optim=adamw_8bits"], ["did you mean 'adamw_8bit'?"]),
        (["llama-2-7b", "--plot", "x.bmp"], ["x.bmp", "PNG or SVG"]),
        (["llama-2-7b", "--data", "nowhere.jsonl"], ["'llama-2-7b' has no tokenizer"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes(run: Any, options: list[Any], said: list[str]) -> None:
    refused(run("plan", *options), *said)


def test_a_folder_without_a_configuration(run: Any, tmp_path: Path) -> None:
    refused(run("plan", tmp_path), "config.json")


def test_code_from_a_models_folder_is_not_run(run: Any, base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')\n")
    refused(run("plan", tmp_path, "--device", "T4"), str(tmp_path), "--trust-remote-code")


def test_a_model_of_pictures_and_texts_is_planned_for_its_part_for_texts(run: Any, tmp_path: Path) -> None:
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    config = transformers.LlavaConfig(text_config=text, architectures=["LlavaForConditionalGeneration"])
    config.save_pretrained(tmp_path)
    result = run("plan", tmp_path, "--device", "T4", "--max-length", 16, *LORA)
    assert result.exit_code == 0, result.output
    assert "note: a LlavaConfig is planned for its part for texts; to train, save that part by itself" in result.stdout


def test_a_model_of_pictures_that_writes_no_text_is_refused(run: Any, tmp_path: Path) -> None:
    transformers.CLIPConfig(architectures=["CLIPModel"]).save_pretrained(tmp_path)
    refused(run("plan", tmp_path, "--device", "T4"), "CLIPConfig", "get_text_config()")


def test_the_runtime_is_counted_in_the_need_and_held_against_the_whole_card(run: Any, base: Path) -> None:
    result = run("plan", base, "--device", "RTX 4090", "--max-length", 32, *LORA)
    shown = " ".join(result.stdout.split())
    assert "RTX 4090: 25.4 GB (sold as 24 GB), of which advice leaves 10% free" in shown
    assert "needs of 25.4 GB" in shown
    assert "r runtime" in shown
    told = json.loads(run("plan", base, "--device", "RTX 4090", "--max-length", 32, *LORA, "--json").stdout)
    (choice,) = told["choices"]
    assert choice["needed_bytes"] == choice["peak_bytes"] + choice["runtime_bytes"]
    assert choice["runtime_bytes"] > told["device"]["context_bytes"]


def test_a_memory_that_is_given_is_not_called_by_a_label(run: Any, base: Path) -> None:
    result = run("plan", base, "--device", "RTX 4090", "--memory", 20, "--max-length", 32, *LORA)
    assert "RTX 4090: 20.0 GB, of which" in " ".join(result.stdout.split())


def test_what_leaves_too_little_room_is_told_as_tight(run: Any, base: Path) -> None:
    options = ("--device", "T4", "--max-length", 32, "--batch-size", 1, *LORA)
    needed = json.loads(run("plan", base, *options, "--json").stdout)["choices"][0]["needed_bytes"]
    tight = (*options, "training.gradient_checkpointing=false", "--memory", needed * 1.04 / 1e9)
    result = run("plan", base, *tight)
    assert result.exit_code == 0, result.output
    assert re.search(r"note: tight: 9[5-7]% of the memory", result.stdout)


def test_pairs_of_answers_are_planned_on_several_devices(run: Any, base: Path, tmp_path: Path) -> None:
    pair = {"prompt": "two large lattes", "chosen": "yes please, with oat milk", "rejected": "no"}
    path = write_lines(tmp_path / "pairs.jsonl", *[pair] * 6)
    where = ("--device", "RTX 4090", "--devices", 2)
    result = run("plan", base, "task=dpo", "--data", path, *where, *LORA, "--merge")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    for part in (
        "on 2 x RTX 4090",
        "with the longer answer of each pair",
        "merging takes",
        "2 devices are estimates for FSDP2",
        "over 31.5 GB/s",
        "run it: slimtune train",
        "--launch 'fsdp2 --num_processes 2'",
        "task=dpo",
    ):
        assert part in shown, part


def test_the_command_starts_as_many_processes_as_were_planned(run: Any, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 8\n")
    options = ("--device", "RTX 4090", "--launch", file, "--max-length", 32, *LORA)
    assert f"--launch {file}" in " ".join(run("plan", base, *options).stdout.split())
    fewer = " ".join(run("plan", base, *options, "--devices", 2).stdout.split())
    assert f"--launch 'accelerate launch --config_file {file} --num_processes 2'" in fewer


def test_data_that_is_not_there_or_without_the_needed_fields(run: Any, base: Path, tmp_path: Path) -> None:
    refused(run("plan", base, "--data", tmp_path / "nowhere.jsonl"), "nowhere.jsonl")
    path = write_lines(tmp_path / "rows.jsonl", {"title": "x", "body": "y"})
    refused(run("plan", base, "--data", path), "rows.jsonl, line 1", "body, title")


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """684 MB of memory, of which 23 MB are left beside Python, its libraries and what the allocator keeps."""
    from slimtune.plan import devices

    monkeypatch.setattr(devices, "_memory_sources", lambda: [684_000_000])


def test_training_plans_first_and_says_what_would_fit(
    run: Any, base: Path, data: Path, tmp_path: Path, small_machine: None
) -> None:
    options = ["-o", tmp_path / "out", "--max-steps", 1, "model.device=cpu", "training.share_prefixes=false"]
    result = run("train", base, data, *options, "--batch-size", 24)
    assert result.exit_code == 1, result.output
    assert "the training needs" in result.stderr
    assert "cpu has 0.7" in result.stderr
    assert "--no-plan" in result.stderr
    assert not (tmp_path / "out").exists()
    told = result.stderr.partition(" tokens peak in ")[2].partition("; ")[2].partition(" needs ")[0]
    fitting = run("train", base, data, *options, *shlex.split(told))
    assert fitting.exit_code == 0, fitting.output
    assert re.search(r"planned: 0\.7 GB of 0\.7 on cpu", fitting.stdout)


def test_examples_that_are_short_enough_need_no_simulation(
    run: Any, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 MB are left: by far enough for these examples, not for such as have all the tokens that they may have."""
    from slimtune.plan import devices

    monkeypatch.setattr(devices, "_memory_sources", lambda: [961_000_000])
    options = ["--max-steps", 1, "model.device=cpu"]
    trained = run("train", base, data, "-o", tmp_path / "short", *options)
    assert trained.exit_code == 0, trained.output
    assert "planned" not in trained.stdout
    long = [{"text": "a b " * 240}, {"text": "b a " * 240}]
    trained = run("train", base, write_lines(tmp_path / "long.jsonl", *long), "-o", tmp_path / "long", *options)
    assert trained.exit_code == 0, trained.output
    assert "planned: " in trained.stdout


def test_a_device_that_no_table_names_stops_no_training(
    run: Any, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> Any:
        raise PlanError(f"the device '{name}' of this machine is in no table")

    monkeypatch.setattr("slimtune.pipeline.memory_check.find", unknown)
    result = run("train", base, data, "-o", tmp_path / "out", "--max-steps", 1, "model.device=cpu")
    assert result.exit_code == 0, result.output
    assert "not planned: the device 'cpu' of this machine is in no table" in result.stdout


def test_training_goes_on_where_a_plan_is_not_wanted(
    run: Any, base: Path, data: Path, tmp_path: Path, small_machine: None
) -> None:
    options = ["-o", tmp_path / "out", "--max-steps", 1, "model.device=cpu", "--batch-size", 24, "--no-plan"]
    assert run("train", base, data, *options).exit_code == 0
