"""One process trains into an output at a time, and what fails before or after training costs nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from killed import holding
from slimtune.cli import app
from slimtune.errors import SlimtuneError, TrainingError
from slimtune.train.run_folder import run_folder
from small_text_model import orders, save_base, write_lines

HOLDS = """
import sys
from pathlib import Path
from slimtune.train.run_folder import run_folder
with run_folder(Path(sys.argv[1]), {}, False, False) as folder:
    folder.begin()
    (folder.path / "loss.jsonl").write_text("mine")
    print("there", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    data = write_lines(folder / "train.jsonl", *({"messages": e.messages()} for e in orders(8)))
    return [save_base(folder / "base"), data]


def train(files: list[Path], output: Path, *more: Any) -> Any:
    words = ["train", *files, "--output", output, "--max-steps", 2, "--rank", 2, "--no-plan", "model.device=cpu", *more]
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("option", [[], ["--overwrite"], ["--resume"]])
def test_a_second_run_touches_nothing_of_the_one_under_way(
    option: list[str], files: list[Path], tmp_path: Path
) -> None:
    output, log = tmp_path / "tuned", tmp_path / "tuned.run" / "loss.jsonl"
    with holding(HOLDS, output) as process:
        before = {path.name: path.stat().st_mtime_ns for path in log.parent.iterdir()}
        refused = train(files, output, *option)
        assert refused.exit_code == 2
        said = " ".join(refused.stderr.split())
        assert f"process {process.pid} trains in {log.parent}" in said.replace("tuned. run", "tuned.run")
        assert log.read_text() == "mine"
        assert {path.name: path.stat().st_mtime_ns for path in log.parent.iterdir()} == before
    # The lock went with its process, and what that left is no run: nothing in it can be resumed.
    assert train(files, output).exit_code == 0
    assert not log.parent.exists()


def test_a_mistake_found_before_training_leaves_an_older_run_as_it_was(files: list[Path], tmp_path: Path) -> None:
    output, run = tmp_path / "tuned", tmp_path / "tuned.run"
    run.mkdir()
    (run / "loss.jsonl").write_text("older")
    assert train([files[0], tmp_path / "none.jsonl"], output, "--overwrite").exit_code == 2
    assert (run / "loss.jsonl").read_text() == "older"
    assert train([files[0], tmp_path / "none.jsonl"], tmp_path / "other").exit_code == 2
    assert {path.name for path in tmp_path.iterdir()} == {"tuned.run"}


def test_an_output_that_can_not_be_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(TrainingError, match="can't be written"),
        run_folder(tmp_path / "file" / "out", {}, False, False),
    ):
        pass
    with pytest.raises(SlimtuneError, match="choose one of at most"):  # noqa: SIM117 - two mistakes
        with run_folder(tmp_path / ("x" * 250), {}, False, False):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("module", ["matplotlib", "accelerate"])
def test_a_library_that_is_missing_is_missed_before_the_data_is_read(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    if module == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused = train([tmp_path / "none", tmp_path / "none.jsonl"], tmp_path / "out")
    assert refused.exit_code == 2
    assert f"needs {module}: run `pip install 'slimtune[train]'`" in " ".join(refused.stderr.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.one_in(2)
@pytest.mark.parametrize("stage", ["plot_losses", "_card", "_results", "evaluate_answers"])
@pytest.mark.parametrize("error", [ValueError("no room"), KeyboardInterrupt()], ids=["fault", "ctrl-c"])
def test_what_fails_after_training_leaves_the_weights(
    stage: str, error: BaseException, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(f"slimtune.pipeline.train.{stage}", fail)
    failed = train(files, tmp_path / "tuned")
    assert failed.exit_code != 0
    written = {path.name for path in (tmp_path / "tuned").iterdir()}
    assert written >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "recipe.yaml",
        "loss.jsonl",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"tuned"}
    if isinstance(error, ValueError):
        said = " ".join(failed.stderr.split())
        assert "the weights are written to" in said
        assert "what comes after training failed: no room" in said
