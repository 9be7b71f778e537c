"""Commands whose answer a page waits for: kept as long as their files stay, and never a place that stays taken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from slimtune.studio.answers import MOST_AT_ONCE, Answer, Answers
from small_server import wait_until
from small_text_model import write_lines

CANNOT_START = """
import multiprocessing, time
from slimtune.studio.answers import Answers
multiprocessing.set_executable("/nowhere/python")
answers = Answers()
for question in ("--version", "--help", "--version", "methods"):
    while (answer := answers.ask("tab", [question])) is None:
        time.sleep(0.01)
    print(answer.exit_code, answer.sentence)
"""


def awaited(answers: Answers, arguments: Sequence[str]) -> Answer:
    found: list[Answer] = []

    def look() -> bool:
        found.extend(filter(None, [answers.ask("tab", arguments)]))
        return bool(found)

    wait_until(look, 120)
    return found[0]


def test_an_answer_is_kept_until_its_file_changes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *({"text": f"row {number}"} for number in range(3)))
    answers, arguments = Answers(), ["data", "preview", str(path), "--json"]
    first = awaited(answers, arguments)
    assert (first.exit_code, first.value["examples"]) == (0, 3)
    assert answers.ask("another tab", arguments) is first
    write_lines(path, {"text": "one row, and a longer one"})
    assert awaited(answers, arguments).value["examples"] == 1


def test_a_process_that_cannot_be_started_is_a_sentence_and_leaves_room_for_others() -> None:
    done = subprocess.run([sys.executable, "-c", CANNOT_START], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == 4 > MOST_AT_ONCE
    assert all(line.startswith("1 no process can be started to work on it") for line in answers), answers


def test_a_killed_process_is_a_sentence_and_the_next_question_is_asked_anew(tmp_path: Path) -> None:
    pipe = tmp_path / "rows.jsonl"
    # Whoever reads it waits for a row that never comes.
    os.mkfifo(pipe)
    answers, arguments = Answers(), ["data", "preview", str(pipe), "--json"]
    assert answers.ask("tab", arguments) is None
    (work,) = answers._running.values()
    wait_until(lambda: work.process.pid is not None, 120)
    os.kill(work.process.pid, signal.SIGKILL)
    answer = awaited(answers, arguments)
    assert (answer.exit_code, "ended with -9" in answer.sentence) == (1, True)
    assert answers.ask("tab", arguments) is None
    # Whoever asks for something else gives up what was asked before.
    assert awaited(answers, ["--version"]).exit_code == 0
    wait_until(lambda: not answers._running, 30)
