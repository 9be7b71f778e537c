"""One run in two gloo processes: the losses, the steps and the files of one process."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.state import GradientState
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.console.process import Process
from slimtune.console.screen import open_screen
from slimtune.data.batches import IGNORED
from slimtune.errors import ConfigError
from slimtune.pipeline.launch import check_devices, launch, read_launch, start
from slimtune.pipeline.train import run
from slimtune.recipe.recipe import Recipe
from slimtune.recipe.training import TrainSettings
from slimtune.train import processes
from slimtune.train.processes import check_processes, share_of
from slimtune.train.trainer import HeldOutMean
from small_text_model import save_base
from tensors import assert_all_near, assert_same

TWO = read_launch("2")
SCRIPT = Path(__file__).with_name("several_processes.py")
TESTS = SCRIPT.parents[1]
PATIENCE = 3600
"""Seconds after which a run is taken to hang: a machine that is busy takes minutes to import torch three times."""

# 20 examples: the last step of each epoch has four, of which the processes get an uneven share.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"training": {"gradient_accumulation": 3, "batch_size": 2}},
    "dora": {"method": {"name": "dora"}, "training": {"logging_steps": 4}},
    "qlora": {"model": {"quantize": "nf4"}},
    "full": {"method": {"name": "full"}},
    "adalora": {"method": {"name": "adalora"}, "training": {"max_steps": 4}},
}
MORE: dict[str, dict[str, Any]] = {
    "a head": {"method": {"name": "lora", "target_modules": ["q_proj", "lm_head"]}},
    "ia3": {"method": {"name": "ia3"}},
    "prompt-tuning": {"method": {"name": "prompt-tuning"}},
    "prefix-tuning": {"method": {"name": "prefix-tuning"}},
    "vera": {"method": {"name": "vera"}},
    "eva": {"method": {"name": "lora", "init_lora_weights": "eva"}},
    "lora+": {"training": {"lora_plus_ratio": 4.0}},
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "packing": {"data": {"packing": True}},
    "grouped": {"training": {"group_prefixes": True}},
    "all tokens": {"training": {"share_prefixes": False}},
    "the best": {"training": {"eval_steps": 1, "keep_best": "loss", "early_stopping_patience": 2, "samples": 1}},
    "answers": {"evaluation": {"limit": 2, "forgetting": False}},
}


@pytest.fixture(scope="module")
def base_and_orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base and orders to learn."""
    folder = tmp_path_factory.mktemp("several")
    save_base(folder / "base")
    orders = ["demo-data", "--output", str(folder / "orders"), "--train", "20", "--held-out", "5"]
    assert CliRunner().invoke(app, orders).exit_code == 0
    return folder


@pytest.fixture
def work(base_and_orders: Path, tmp_path: Path) -> Path:
    """The same in a folder of the test's own, in which no other test has written its runs."""
    return shutil.copytree(base_and_orders, tmp_path / "work")


def recipe(work: Path, output: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    sections: dict[str, Any] = {
        "model": {"name": str(work / "base"), "dtype": "float32", "device": "cpu"},
        "data": {"train": str(work / "orders/train.jsonl"), "held_out": str(work / "orders/held_out.jsonl")},
        "method": {"name": "lora"},
        "training": {"max_steps": 6, "warmup": 0},
        "output": str(work / output),
    }
    return sections | {name: sections.get(name, {}) | dict(changed) for name, changed in changes.items()}


def environment() -> dict[str, str]:
    paths = (str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "OMP_NUM_THREADS": "1"}


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]


def trained(output: Path) -> Mapping[str, Any]:
    name = "adapter_model" if (output / "adapter_config.json").exists() else "model"
    return load_file(output / f"{name}.safetensors")


def assert_all_near_in_norm(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> None:
    """|actual - expected| <= bound |expected|, in the norm of a tensor.

    Sharded processes sum gradients in another order. Where one is nearly zero in all steps, Adam makes a visible part
    of a step of its rounding, in one element.
    """
    assert sorted(actual) == sorted(expected)
    for key, tensor in expected.items():
        error = float((actual[key].double() - tensor.double()).norm() / tensor.double().norm())
        assert error <= bound, f"{key}: {error:.2e}"


def assert_two_are_one(
    work: Path, cases: Mapping[str, Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch, capfd: Any, *options: str,
    assert_near: Callable[[Any, Any, float], None] = assert_all_near, bound: float = 1e-4,
) -> None:  # fmt: skip
    """The same processes run all cases, one after the other; one process runs each again."""
    file = work / "recipes.json"
    file.write_text(json.dumps([recipe(work, f"two/{name}", changes) for name, changes in cases.items()]))
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    assert start(TWO, [str(SCRIPT), str(file), *options]) == 0, capfd.readouterr().err[-6000:]
    shown = capfd.readouterr().out
    for name, changes in cases.items():
        run(Recipe.of(recipe(work, f"one/{name}", changes)), open_screen(True), plans=False)
        one, two = lines(work / "one" / name), lines(work / "two" / name)
        assert len({entry["loss"] for entry in one if "loss" in entry}) > 1
        for before, after in zip(one, two, strict=True):
            assert after == pytest.approx(before, rel=1e-5, abs=1e-9), name
        assert_near(trained(work / "two" / name), trained(work / "one" / name), bound)
        results = [json.loads((work / n / name / "results.json").read_text()) for n in ("one", "two")]
        assert results[0]["steps"] == results[1]["steps"] == two[-1]["step"]
        assert results[1]["tokens"] == results[0]["tokens"]
    assert shown.count("trained in float32") == len(cases)


def test_two_processes_train_as_one(work: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    assert_two_are_one(work, METHODS, monkeypatch, capfd)


@pytest.mark.soak
def test_two_processes_train_other_methods_and_settings_as_one(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    assert_two_are_one(work, MORE, monkeypatch, capfd)


@pytest.mark.soak
def test_two_processes_that_shard_the_model_train_as_one_and_go_on(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    cases = {name: METHODS[name] for name in ("lora", "dora", "qlora", "full")}
    assert_two_are_one(
        work, cases, monkeypatch, capfd, "--sharded", assert_near=assert_all_near_in_norm, bound=5e-5
    )  # fmt: skip
    for name in cases:
        shutil.move(work / "two" / name, work / "whole" / name)
    # Broken off after step 5, within an epoch, where a process is told to stop, and gone on with.
    for options in (["--stop-after", "5"], ["--resume"]):
        assert start(TWO, [str(SCRIPT), str(work / "recipes.json"), "--sharded", *options]) == 0
        assert all((work / "two" / name).exists() == (options == ["--resume"]) for name in cases)
    for name in cases:
        assert lines(work / "two" / name) == lines(work / "whole" / name)
        tensors = trained(work / "whole" / name)
        assert_same(trained(work / "two" / name), tensors)


FAILING = """
import os, sys, time
from slimtune.console.process import report_failure
rank = os.environ["RANK"]
if rank == sys.argv[1]:
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), 9)
    if report_failure(f"what {rank} found"):
        print(f"slimtune: what {rank} found", file=sys.stderr)
    sys.exit(2)
if sys.argv[2] == "follow":
    time.sleep(2)
    report_failure("another one has ended", follows=True)
    sys.exit(2)
time.sleep(60)
"""


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("rank", "how", "said"),
    [
        ("0", "say", "slimtune: what 0 found"),
        ("1", "say", "slimtune: process 1: what 1 found"),
        ("1", "follow", "slimtune: process 1: what 1 found"),
        ("1", "kill", "slimtune: process 1 of the run was killed by SIGKILL, and the others were stopped"),
    ],
)
def test_what_ended_the_processes_is_one_sentence(
    rank: str, how: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "failing.py").write_text(FAILING)
    logging.disable(logging.ERROR)
    try:
        assert start(TWO, [str(tmp_path / "failing.py"), rank, how]) == (1 if how == "kill" else 2)
    finally:
        logging.disable(logging.NOTSET)
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith(said)


def slimtune(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "slimtune", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip


def train(work: Path, output: str, *words: str) -> subprocess.Popen[str]:
    """Twenty steps with a checkpoint after every second one."""
    settings = ["--output", str(work / output), "--max-steps", "20", "model.dtype=float32", "training.save_steps=2"]
    base, data = str(work / "base"), str(work / "orders/train.jsonl")
    return slimtune("train", base, data, *settings, "model.device=cpu", *words)


def workers(launcher: int) -> dict[str, int]:
    """The processes that a launcher started, by their rank."""
    ranks = {}
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().decode().split("\0") if parent == launcher else []
        except (OSError, ValueError, IndexError):
            continue
        ranks |= {word.partition("=")[2]: int(folder.name) for word in variables if word.startswith("RANK=")}
    return ranks


def until_checkpoint(work: Path, output: str, process: subprocess.Popen[str], steps: str = "[46]") -> None:
    while not list((work / f"{output}.run").glob(f"checkpoint-{steps}")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.soak
def test_a_run_that_lost_a_process_or_was_stopped_goes_on_to_the_same_bits(work: Path) -> None:
    whole = train(work, "uninterrupted", "--launch", "2")
    assert whole.wait(PATIENCE) == 0, whole.communicate()

    killed = train(work, "killed", "--launch", "2")
    until_checkpoint(work, "killed", killed)
    os.kill(workers(killed.pid)["1"], signal.SIGKILL)
    _, errors = killed.communicate(timeout=PATIENCE)
    assert killed.returncode == 1
    assert len(errors.strip().splitlines()) == 1, errors
    assert errors.startswith("slimtune: process 1 of the run was killed by SIGKILL")
    assert not (work / "killed").exists()
    shutil.copytree(work / "killed.run", work / "alone.run")

    stopped = train(work, "killed", "--launch", "2", "--resume")
    until_checkpoint(work, "killed", stopped, "1[02]")
    stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate(timeout=PATIENCE)
    assert stopped.returncode == 130
    assert len(errors.strip().splitlines()) == 1, errors
    assert "stopped by SIGINT after step" in errors

    resumed = train(work, "killed", "--launch", "2", "--resume")
    assert resumed.wait(PATIENCE) == 0, resumed.communicate()
    assert lines(work / "killed") == lines(work / "uninterrupted")
    name = "adapter_model.safetensors"
    assert (work / "killed" / name).read_bytes() == (work / "uninterrupted" / name).read_bytes()

    # By another number of processes: to the same loss, and that the bits may differ is said.
    alone = train(work, "alone", "--resume")
    shown, _ = alone.communicate(timeout=PATIENCE)
    assert alone.returncode == 0
    assert "processes 2 then, 1 now" in shown
    for before, after in zip(lines(work / "uninterrupted"), lines(work / "alone"), strict=True):
        assert after == pytest.approx(before, rel=1e-5, abs=1e-9)


@pytest.mark.soak
def test_a_mistake_is_said_once_and_ends_the_launch(work: Path) -> None:
    mistaken = train(work, "mistaken", "training.batch_size=3", "--launch", "2")
    shown, errors = mistaken.communicate(timeout=PATIENCE)
    assert mistaken.returncode == 2
    assert shown == ""
    assert len(errors.strip().splitlines()) == 1, errors
    assert "3 examples of a step (batch_size x gradient_accumulation) don't divide among 2 processes" in errors
    assert not (work / "mistaken.run").exists()


class TestWhatCannotStart:
    """Refused before anything is loaded."""

    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ("0", "takes a number of processes"),
            ("tochrun --nproc_per_node 2", "did you mean 'torchrun'"),
            ("none.yaml", "none.yaml is not there"),
        ],
    )
    def test_launch_names_what_it_takes(self, how: str, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            read_launch(how)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("distributed_type: DEEPSPEED", "DeepSpeed keeps.*--launch fsdp2"),
            ("distributed_type: MEGATRON_LM", "Megatron-LM replaces"),
            ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "set fsdp_version: 2"),
            ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}", "there is one; .*optim=adamw_offload"),
            ("parallelism_config: {parallelism_config_tp_size: 2}", "tensor parallelism splits"),
            ("mixed_precision: bf16", "model.dtype"),
            ("num_processes: two", "num_processes must be a whole number"),
        ],
    )
    def test_a_file_of_accelerate_says_what_a_run_is_not_made_for(self, text: str, said: str, tmp_path: Path) -> None:
        (tmp_path / "accelerate.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_launch(str(tmp_path / "accelerate.yaml"))

    @pytest.mark.parametrize("name", ["kubeflow.yaml", "skypilot.yaml"])
    def test_a_file_of_another_tool_is_not_taken_for_one_of_accelerate(self, name: str) -> None:
        with pytest.raises(ConfigError, match=r"is no file of accelerate \(it has (apiVersion|file_mounts)"):
            read_launch(str(TESTS.parent / "docs" / "scale" / name))

    def test_fsdp_on_a_cpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "accelerate.yaml"
        file.write_text("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2}")
        with pytest.raises(ConfigError, match=r"FSDP shards a model over GPUs.*on the CPU"):
            check_devices(read_launch(str(file)), "cpu")
        monkeypatch.setattr(processes, "this_process", lambda: Process(0, 2, 0, 2))
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        with pytest.raises(ConfigError, match=r"FSDP shards a model over GPUs.*on the CPU"):
            check_processes("cpu", TrainSettings())

    def test_more_processes_than_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        visible = __import__("torch").cuda.device_count()
        with pytest.raises(ConfigError, match=rf"asks for {visible + 1} processes.*and {visible} GPUs are visible"):
            check_devices(read_launch(str(visible + 1)), "cuda")
        monkeypatch.setattr(processes, "this_process", lambda: Process(0, visible + 2, 0, visible + 2))
        with pytest.raises(ConfigError, match=rf"{visible + 2} processes on this machine, and {visible} GPUs"):
            check_processes("cuda", TrainSettings(gradient_accumulation=visible + 2))

    @pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"])
    def test_what_the_launcher_set(self, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "this_process", lambda: Process(1, 2, 1, 2))
        monkeypatch.setenv(variable, "true" if "USE" in variable else "bf16")
        with pytest.raises(ConfigError, match="DeepSpeed" if "USE" in variable else "mixed_precision"):
            check_processes("cpu", TrainSettings())

    def test_state_in_main_memory_for_each_of_several(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "this_process", lambda: Process(0, 2, 0, 2))
        with pytest.raises(ConfigError, match=r"for one GPU; for several, offload with FSDP2"):
            check_processes("cuda", TrainSettings(optim="adamw_offload"))

    def test_a_launch_within_a_launch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match="this is one of 2 already"):
            launch("2", [], "cpu")

    def test_a_method_without_steps(self, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        words = ["train", str(work / "base"), "none.jsonl", "--output", str(work / "none"), "--method", "features"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2
        assert "features, which takes no steps, runs in one process, and there are 2" in result.stderr

    def test_accelerate_that_starts_one_process_is_told(self, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        words = ["train", str(work / "base"), "none.jsonl", "--output", str(work / "none")]
        result = CliRunner().invoke(app, words)
        assert "accelerate launch starts one process on a CPU" in result.stdout


@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_fills_up_a_last_batch_is_told_in_an_epoch_that_is_gone_on_with(rank: int, skipped: int) -> None:
    """10 rows for two processes in batches of 3 each: the last four are 3 and 1, filled up with the first two."""
    PartialState()
    rows = [{"input_ids": torch.tensor([n]), "labels": torch.tensor([n])} for n in range(10)]
    shards = DataLoader(rows, batch_size=3)  # type: ignore[arg-type]
    loader = prepare_data_loader(shards, num_processes=2, process_index=rank, put_on_device=False)
    trainer: Any = HeldOutMean()
    trainer.accelerator = SimpleNamespace(gradient_state=GradientState())
    trainer.args = SimpleNamespace(world_size=2, process_index=rank)
    batches = [trainer._without_repeated(batch) for batch in skip_first_batches(loader, skipped)]
    learned = [batch["labels"].flatten().tolist() for batch in batches]
    own: list[list[int]] = [[0, 1, 2], [6, 7, 8]] if rank == 0 else [[3, 4, 5], [9, IGNORED, IGNORED]]
    assert learned == own[skipped:]


@pytest.mark.parametrize(
    ("count", "batch", "accumulation", "share"),
    [(2, 8, 1, (4, 1)), (2, 8, 4, (8, 2)), (4, 8, 2, (4, 1)), (8, 8, 1, (1, 1)), (6, 8, 3, (4, 1)), (1, 8, 3, (8, 3))],
)
def test_a_step_has_the_same_examples_however_many_processes_there_are(
    count: int, batch: int, accumulation: int, share: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "this_process", lambda: Process(0, count, 0, count))
    settings = share_of(TrainSettings(batch_size=batch, gradient_accumulation=accumulation))
    assert (settings.batch_size, settings.gradient_accumulation) == share
