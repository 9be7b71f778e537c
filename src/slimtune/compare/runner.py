"""All runs one after the other, each kept as it ends: a comparison that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from slimtune.compare import process
from slimtune.compare.results import RESULT, Result, read_result, write_questions
from slimtune.compare.stages import ANSWERS, Stage, questions_of, result_of, stages_of
from slimtune.compare.task import ComparisonSetup, write_recipe
from slimtune.errors import DataError, TrainingError
from slimtune.recipe.candidates import Run

LOG, ASKED = "log.txt", "questions.jsonl"


class Watcher(process.Listener, Protocol):
    """Who is told how far the runs are."""

    def begin(self, run: Run) -> None:
        """A run begins."""
        ...

    def end(self, run: Run, result: Result) -> None:
        """The run is done, or failed."""
        ...


def results_of(task: ComparisonSetup, runs: Sequence[Run]) -> list[Result]:
    """What is there already; raises DataError for a damaged file."""
    paths = [task.place(run) / RESULT for run in runs]
    return [read_result(path) for path in paths if path.is_file()]


def unfinished(task: ComparisonSetup, runs: Sequence[Run]) -> list[Run]:
    """The runs that are still to be done, those that failed among them: their cause may be gone."""
    done = {(result.candidate, result.seed) for result in results_of(task, runs) if result.status == "done"}
    return [run for run in runs if (run.candidate.name, run.seed) not in done]


def run_all(task: ComparisonSetup, runs: Sequence[Run], watcher: Watcher, on_result: Callable[[], object]) -> None:
    """Do what is unfinished; a run that fails is kept as such and stops no other. `on_result` is called after each."""
    for run in unfinished(task, runs):
        watcher.begin(run)
        result = _done_or_failed(task, run, watcher)
        result.write(task.place(run) / RESULT)
        watcher.end(run, result)
        on_result()


def _done_or_failed(task: ComparisonSetup, run: Run, watcher: Watcher) -> Result:
    place = task.place(run)
    place.mkdir(parents=True, exist_ok=True)
    try:
        return _do(task, run, watcher)
    except (TrainingError, DataError) as error:
        return Result(
            candidate=run.candidate.name, seed=run.seed, status="failed", reason=str(error) or type(error).__name__
        )


def _do(task: ComparisonSetup, run: Run, watcher: Watcher) -> Result:
    place = task.place(run)
    if run.candidate.is_trained:
        write_recipe(task, run)
    stages = stages_of(task, run)
    notes = _run_stages(stages, place, watcher)
    questions = task.folder / ASKED
    if not questions.exists():
        write_questions(questions, questions_of(place / ANSWERS))
    results = {stage.name: stage.read(place) for stage in stages if stage.kept(place).is_file()}
    return result_of(task, run, results, notes)


def _run_stages(stages: Sequence[Stage], place: Path, watcher: Watcher) -> list[str]:
    """Do what was not done before the comparison was killed; what is missing and why. Raises: TrainingError."""
    left, notes = [stage for stage in stages if not stage.kept(place).is_file()], []
    while left:
        failure = process.run(left, place, place / LOG, watcher)
        if failure is None:
            break
        number = [stage.name for stage in left].index(failure.stage)
        if left[number].is_needed:
            raise TrainingError(f"{failure.stage}: {failure.reason}")
        notes.append(f"{failure.stage} was not measured: {failure.reason}")
        left = left[number + 1 :]
    return notes
