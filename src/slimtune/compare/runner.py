"""All runs one after the other, each kept as it ends: a comparison that was killed goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from slimtune.compare import process
from slimtune.compare.arms import Run
from slimtune.compare.results import RESULT, Result, read_result, write_questions
from slimtune.compare.stages import ANSWERS, Stage, questions_of, result_of, stages_of
from slimtune.compare.task import Task
from slimtune.errors import DataError, TrainingError
from slimtune.staging import staged_file

LOG, ASKED = "log.txt", "questions.jsonl"


class Watcher(Protocol):
    """Who is told how far the runs are."""

    def begin(self, run: Run) -> None:
        """A run begins."""
        ...

    def stage(self, name: str) -> None:
        """It comes to its next command."""
        ...

    def advance(self, done: int, total: int) -> None:
        """The command is so far."""
        ...

    def end(self, run: Run, result: Result) -> None:
        """The run is done, or failed."""
        ...


def results_of(task: Task, runs: Sequence[Run]) -> list[Result]:
    """What is there already; raises DataError for a damaged file."""
    paths = [task.place(run) / RESULT for run in runs]
    return [read_result(path) for path in paths if path.is_file()]


def unfinished(task: Task, runs: Sequence[Run]) -> list[Run]:
    """The runs that are still to be done, those that failed among them: their cause may be gone."""
    done = {(result.arm, result.seed) for result in results_of(task, runs) if result.status == "done"}
    return [run for run in runs if (run.arm.name, run.seed) not in done]


def run_all(task: Task, runs: Sequence[Run], watcher: Watcher, on_result: Callable[[], object]) -> None:
    """Do what is unfinished; a run that fails is kept as such and stops no other. `on_result` is called after each."""
    for run in unfinished(task, runs):
        watcher.begin(run)
        result = _done_or_failed(task, run, watcher)
        result.write(task.place(run) / RESULT)
        watcher.end(run, result)
        on_result()


def _done_or_failed(task: Task, run: Run, watcher: Watcher) -> Result:
    place = task.place(run)
    place.mkdir(parents=True, exist_ok=True)
    try:
        return _do(task, run, watcher)
    except (TrainingError, DataError) as error:
        return Result(arm=run.arm.name, seed=run.seed, status="failed", reason=str(error) or type(error).__name__)


def _do(task: Task, run: Run, watcher: Watcher) -> Result:
    place, found, notes = task.place(run), {}, []
    for stage in stages_of(task, run):
        watcher.stage(stage.name)
        try:
            found[stage.name] = _answer(stage, place, watcher)
        except TrainingError as error:
            if stage.is_needed:
                raise TrainingError(f"{stage.name}: {error}") from error
            notes.append(f"{stage.name} was not measured: {error}")
    asked = task.folder / ASKED
    if not asked.exists():
        write_questions(asked, questions_of(place / ANSWERS))
    return result_of(task, run, found, notes)


def _answer(stage: Stage, place: Path, watcher: Watcher) -> dict[str, Any]:
    """What the command says, or what it said when it was done before the comparison was killed."""
    kept = place / f"{stage.name}.json"
    if kept.is_file():
        try:
            return json.loads(kept.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{kept} is damaged; delete its folder, and the run is done again") from error
    stage.before()
    found = process.run(stage.arguments, place / LOG, watcher.advance)
    with staged_file(kept) as scratch:
        scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found
