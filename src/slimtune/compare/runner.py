"""All runs one after the other, each kept as it ends: a comparison that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from slimtune.compare import process
from slimtune.compare.results import RESULT, Result, Stage, read_result, write_questions
from slimtune.compare.setup import ComparisonSetup, write_recipe
from slimtune.compare.stages import ANSWERS, questions_of, result_of, stages_of
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


def results_of(setup: ComparisonSetup, runs: Sequence[Run]) -> list[Result]:
    """What is there already; raises DataError for a damaged file."""
    paths = [setup.place(run) / RESULT for run in runs]
    return [read_result(path) for path in paths if path.is_file()]


def unfinished(setup: ComparisonSetup, runs: Sequence[Run]) -> list[Run]:
    """The runs that are still to be done, those that failed among them: their cause may be gone."""
    done = {(result.candidate, result.seed) for result in results_of(setup, runs) if result.status == "done"}
    return [run for run in runs if (run.candidate.name, run.seed) not in done]


def run_all(setup: ComparisonSetup, runs: Sequence[Run], watcher: Watcher, on_result: Callable[[], object]) -> None:
    """Do what is unfinished; a run that fails is kept as such and stops no other. `on_result` is called after each."""
    for run in unfinished(setup, runs):
        watcher.begin(run)
        result = _done_or_failed(setup, run, watcher)
        result.write(setup.place(run) / RESULT)
        watcher.end(run, result)
        on_result()


def _done_or_failed(setup: ComparisonSetup, run: Run, watcher: Watcher) -> Result:
    place = setup.place(run)
    place.mkdir(parents=True, exist_ok=True)
    try:
        return _do(setup, run, watcher)
    except (TrainingError, DataError) as error:
        return Result(
            candidate=run.candidate.name, seed=run.seed, status="failed", reason=str(error) or type(error).__name__
        )


def _do(setup: ComparisonSetup, run: Run, watcher: Watcher) -> Result:
    place = setup.place(run)
    if run.candidate.is_trained:
        write_recipe(setup, run)
    stages = stages_of(setup, run)
    notes = _run_stages(stages, place, watcher)
    questions = setup.folder / ASKED
    if not questions.exists():
        write_questions(questions, questions_of(place / ANSWERS))
    return result_of(setup, run, stages, notes)


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
