"""The page on several GPUs: its files start what they say, its plans are told."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import parse_args
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.errors import ConfigError
from slimtune.pipeline.launch import ACCELERATE, FOLDER, SHIPPED, TORCHRUN, read_launch, with_processes
from small_text_model import save_base

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text()
FILES = ROOT / "docs" / "scale"
VALUES = {"rank": "1", "#": "2", "HEAD": "node0", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SKYPILOT_NODE_RANK": "1"}
VALUES |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}


def launches(text: str) -> list[str]:
    """What stands behind --launch in a shell script, with the values that the machines set."""
    text = re.sub(r"\\\n[# ]*", "", text)
    found = [double or single for double, single in re.findall(r"--launch (?:\"([^\"]+)\"|'([^']+)')", text)]
    return [re.sub(r"\$(\w+|#)", lambda match: VALUES[match[1]], launch) for launch in found]


def test_every_file_is_on_the_page() -> None:
    linked = set(re.findall(r"\]\(scale/([^)]+)\)", PAGE))
    assert linked == {path.name for path in FILES.iterdir() if path.is_file()}
    for target in re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


TWO_NODES = str(FILES / "fsdp2-two-nodes.yaml")


@pytest.mark.parametrize("how", [TWO_NODES, *SHIPPED])
def test_accelerate_reads_its_files(how: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{how}.yaml") if how in SHIPPED else how)
    chosen = read_launch(how)
    assert chosen.program == ACCELERATE
    assert chosen.processes == (16 if how == TWO_NODES else None)
    assert chosen.shards
    assert config.distributed_type == "FSDP"
    assert chosen.offloads == (how == "fsdp2-offload")
    known = {option.lstrip("-") for action in launch_command_parser()._actions for option in action.option_strings}
    assert set(config.fsdp_config) <= known


@pytest.mark.parametrize("how", SHIPPED)
def test_a_file_that_ships_takes_options_of_accelerate(how: str) -> None:
    chosen = read_launch(f"{how} --num_processes 4 --gpu_ids 0,1,2,3")
    assert chosen.processes == 4
    arguments = launch_command_parser().parse_args([*chosen.options, "-m", "slimtune", "train"])
    assert (arguments.num_processes, arguments.gpu_ids) == (4, "0,1,2,3")
    assert Path(arguments.config_file) == FOLDER / f"{how}.yaml"
    assert with_processes(how, 8) == f"{how} --num_processes 8"
    with pytest.raises(ConfigError, match="at least 2, found '1'"):
        read_launch(f"{how} --num_processes 1")


@pytest.mark.parametrize("name", ["ssh.sh", "slurm.sh"])
def test_scripts_start_the_processes_of_all_machines(name: str) -> None:
    subprocess.run(["bash", "-n", FILES / name], check=True)
    assert os.access(FILES / name, os.X_OK)
    text = (FILES / name).read_text()
    for how in launches(text):
        chosen = read_launch(how)
        command = ["-m", "slimtune", "train", "recipe.yaml"]
        if chosen.program == TORCHRUN:
            arguments = parse_args([*chosen.options, *command])
            assert (arguments.nnodes, arguments.node_rank, arguments.nproc_per_node) == ("2", 1, "8")
        else:
            arguments = launch_command_parser().parse_args([*chosen.options, *command])
            assert (arguments.machine_rank, arguments.main_process_ip) == (1, "node0")
            assert (ROOT / arguments.config_file).is_file()
        assert arguments.training_script == "slimtune"
    assert len(launches(text)) == (2 if name == "slurm.sh" else 1)


def test_skypilot() -> None:
    task = yaml.safe_load((FILES / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2
    (how,) = launches(task["run"])
    arguments = parse_args([*read_launch(how).options, "-m", "slimtune"])
    assert (arguments.nnodes, arguments.node_rank, arguments.master_addr) == ("2", 1, "node0")


def test_kubeflow(monkeypatch: pytest.MonkeyPatch) -> None:
    job = yaml.safe_load((FILES / "kubeflow.yaml").read_text())
    trainer = job["spec"]["trainer"]
    assert (job["kind"], job["spec"]["runtimeRef"]["name"]) == ("TrainJob", "torch-distributed")
    command = trainer["command"] + trainer["args"]
    chosen = read_launch(command[command.index("--launch") + 1])
    # What the runtime sets.
    for name, value in {"NNODES": "2", "NPROC_PER_NODE": "8", "NODE_RANK": "1", "MASTER_ADDR": "node0"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    arguments = parse_args([*chosen.options, "-m", "slimtune"])
    assert arguments.nnodes == str(trainer["numNodes"])
    assert arguments.nproc_per_node == str(trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"])
    assert (int(arguments.node_rank), arguments.master_addr) == (1, "node0")


def test_ray_runs_what_is_there() -> None:
    tree = ast.parse((FILES / "ray_train.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("slimtune"):
            module = __import__(str(node.module), fromlist=["any"])
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_plans_say_what_each_device_holds(tmp_path: Path) -> None:
    """By the page's own commands, on a model that is planned in no time."""
    save_base(tmp_path / "base")
    commands = [shlex.split(line)[1:] for line in re.findall(r"^slimtune plan .*$", PAGE, re.MULTILINE)]
    assert len(commands) == 3
    for words in commands:
        words = [str(tmp_path / "base") if word == "llama-3-70b" else word for word in words]
        result = CliRunner().invoke(app, [*words, "--batch-size", "1", "--max-length", "32"])
        assert result.exit_code == 0, result.output
        held = re.findall(r"each device holds (.*)", result.stdout)
        offloads = "offload" in " ".join(words)
        assert ("weights" in held[0]) == (not offloads)
        assert f"FSDP2{' with offloading' * offloads}: parameters and examples are divided" in result.stdout
        assert "--launch" in result.stdout.partition("run it:")[2]


def test_devices_and_launch_that_disagree() -> None:
    result = CliRunner().invoke(app, ["plan", "llama-2-7b", "--devices", "2", "--launch", "4"])
    assert result.exit_code == 2
    assert "--launch starts 4 processes, and --devices says 2" in result.stderr
