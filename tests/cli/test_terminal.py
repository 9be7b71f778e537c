"""The command line at a terminal, behind a pipe and in any encoding: no escape of a stranger's, no traceback."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_encoder import reviews, save_encoder
from small_text_model import write_lines

EVIL = "x\x1b]0;OWNED\x07\x1b[2J\x9b31m\u202e"
SHOWN = r"\x1b]0;OWNED"


def slimtune(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    command = [sys.executable, "-m", "slimtune", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options)


def is_text(output: str) -> bool:
    """Whether nothing in it steers a terminal."""
    return not set(output) & set("\x1b\x07\x9b\u202e")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return write_lines(path, {"prompt": EVIL, "completion": EVIL}, {"prompt": "b", "completion": f"c{EVIL}"})


def test_data_is_shown_as_text(run: Any, base: Path, rows: Path, tmp_path: Path) -> None:
    for options in ([], ["--model", base], ["--model", base, "--packing"]):
        result = run("data", "preview", rows, *options)
        assert result.exit_code == 0, result.output
        assert SHOWN in result.output
        assert is_text(result.output)
    columns = write_lines(tmp_path / "columns.jsonl", {f"zzz{EVIL}": "b", "completion": "c"})
    refused = run("data", "preview", columns)
    assert refused.exit_code == 2
    assert is_text(refused.output)


def test_labels_names_and_errors_are_shown_as_text(run: Any, tmp_path: Path) -> None:
    labelled = [{**row, "label": f"{row['label']}{EVIL}"} for row in reviews(12)]
    rows, judge = write_lines(tmp_path / "rows.jsonl", *labelled), tmp_path / f"judge{EVIL}"
    base = save_encoder(tmp_path / "base")
    trained = run("train", base, rows, "-o", judge, "--method", "features", "method.solver=torch")
    assert trained.exit_code == 0, trained.output
    shown = [trained, run("predict", judge, rows), run("evaluate", judge, rows), run("info", judge)]
    assert all(result.exit_code == 0 for result in shown), [result.output for result in shown]
    assert SHOWN in shown[1].stdout
    shown += [run("train", base, rows, "-o", judge), run("info", tmp_path / EVIL), run("generate", EVIL, EVIL)]
    shown += [run("predict", judge, rows, "--dtype", EVIL), run("methods", EVIL), run("plan", EVIL, f"{EVIL}=1")]
    for result in shown:
        assert is_text(result.output), result.output
    exact = run("predict", judge, rows, "--json")
    assert {json.loads(line)["label"] for line in exact.stdout.splitlines()} <= {f"good{EVIL}", f"bad{EVIL}"}


def test_a_line_break_in_a_name_does_not_break_the_sentence(run: Any, base: Path, tuned: Path, tmp_path: Path) -> None:
    tensors = load_file(tuned / "adapter_model.safetensors")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text((tuned / "adapter_config.json").read_text())
    save_file(tensors | {f"base_model.model.a\n\nslimtune: all is well{EVIL}.lora_A.weight": torch.zeros(2, 2)},
              folder / "adapter_model.safetensors")  # fmt: skip
    result = run("generate", base, "hi", "--adapter", folder)
    assert result.exit_code == 2, result.output
    assert len([line for line in result.stderr.splitlines() if line.startswith("slimtune: ")]) == 1
    assert is_text(result.output)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize(
    "command", [["recipe", "list"], ["methods"], ["plan", "--help"], ["info", "no such folder \u2713"]]
)
def test_output_in_another_encoding(command: list[str], encoding: str) -> None:
    process = slimtune(*command, env={"PYTHONIOENCODING": encoding})
    out, errors = (stream.decode(encoding) for stream in process.communicate(timeout=120))
    assert "Traceback" not in errors
    assert process.returncode == (2 if command[0] == "info" else 0), errors
    assert out or errors


@pytest.mark.slow
def test_answers_in_another_encoding(base: Path, rows: Path) -> None:
    letters = write_lines(rows.parent / "letters.jsonl", {"prompt": "\u2713 \u65e5\u672c", "completion": "\u00e9"})
    process = slimtune("data", "preview", letters, env={"PYTHONIOENCODING": "ascii"})
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert rb"\u2713 \u65e5\u672c" in out
    assert rb"\xe9" in out


@pytest.mark.one_in(2)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_goes_away_ends_it_without_a_word(tmp_path: Path, options: list[str]) -> None:
    many = write_lines(tmp_path / "many.jsonl", *({"prompt": "p" * 99, "completion": "c" * 99} for _ in range(3000)))
    process = slimtune("data", "preview", many, "--examples", 3000, *options)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == b""


def test_main_memory_that_runs_out_is_a_sentence() -> None:
    # Enough for the libraries, and not for the model.
    limit = 950_000_000
    process = slimtune("generate", "smollm2-135m-instruct", "hi",
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))  # fmt: skip
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert errors.decode().splitlines()[-1].startswith("slimtune: main memory ran out")
    assert b"Traceback" not in errors


def test_ctrl_c_is_a_word_and_its_exit_code(base: Path) -> None:
    # A shell lets what it runs in the background ignore Ctrl-C, and so would the process here.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = slimtune("chat", base, stdin=subprocess.PIPE, preexec_fn=heed)
    assert process.stderr is not None
    while b"/help lists" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, b"slimtune: stopped\n")


def test_a_folder_whose_name_has_dots_is_an_adapter(run: Any, base: Path, tuned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama-3.1-lora-v1.0"
    shutil.copytree(tuned, folder)
    result = run("chat", base, "--adapter", folder, "--max-new-tokens", 2, stdin="hi\n/adapters\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "llama-3_1-lora-v1_0"


def test_a_name_that_is_too_long_is_refused_before_anything_is_loaded(
    run: Any, base: Path, data: Path, tmp_path: Path
) -> None:
    for name in ("n" * 250, "\u00e9" * 130, "n" * 300):
        result = run("train", base, data, "-o", tmp_path / name, "--max-steps", 1)
        assert result.exit_code == 2, result.output
        assert "choose one of at most" in result.stderr
        assert "training" not in result.stderr


@pytest.mark.slow
def test_bars_in_a_terminal_without_blocks(base: Path, data: Path) -> None:
    process = slimtune("data", "preview", data, env={"PYTHONIOENCODING": "ascii"})
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert b"##" in output
    assert b"\\u2588" not in output


def test_what_was_trained_is_on_disk_though_nobody_reads_the_output(base: Path, data: Path, tmp_path: Path) -> None:
    command = ["train", base, data, "-o", tmp_path / "tuned", "--max-steps", 4, "--batch-size", 2, "--rank", 2]
    process = slimtune(*command)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors
    assert b"Traceback" not in errors
    assert (tmp_path / "tuned" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "tuned" / "results.json").is_file()


def at_a_terminal(*arguments: Any) -> tuple[int, str]:
    """The exit code of `slimtune`, and all that it draws on a terminal of its own."""
    import pty

    ours, theirs = pty.openpty()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "120"}
    command = [sys.executable, "-m", "slimtune", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        drawn = b""
        try:
            while part := os.read(ours, 65536):
                drawn += part
        except OSError:
            # Linux ends a terminal that nobody holds any more with an error in place of an empty read.
            pass
        finally:
            os.close(ours)
    return process.returncode, drawn.decode()


@pytest.mark.one_in(5)
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
@pytest.mark.parametrize("command", ["train", "evaluate", "preview", "generate", "forgetting"])
def test_bars_are_drawn_at_a_terminal(command: str, base: Path, data: Path, tuned: Path, tmp_path: Path) -> None:
    arguments = {
        "train": ["train", base, data, "--output", tmp_path / "adapter", "--max-steps", 2, "data.held_out=0.2"],
        "evaluate": ["evaluate", tuned, data, "--limit", 4],
        "preview": ["data", "preview", data, "--model", base],
        "generate": ["generate", tuned, "--input", data, "--max-new-tokens", 2],
        "forgetting": ["forgetting", tuned, "--texts", 2, "--max-length", 128],
    }[command]
    code, drawn = at_a_terminal(*arguments)
    assert code == 0, drawn
    assert "Traceback" not in drawn
    # Answers come alone; where nothing moves, nothing needs to be taken back.
    assert command == "generate" or "\x1b[" in drawn
