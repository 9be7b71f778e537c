"""A comparison as a whole: from a recipe to its folder of runs and its page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from slimtune.compare.dataset import QUESTIONS, TRAIN, write_dataset
from slimtune.compare.record import FACTS, ComparisonRecord, machine, read_record, today
from slimtune.compare.remarks import constant_of, environment_changes, remarks
from slimtune.compare.report import ComparisonReport, check_dependencies, report, write_report
from slimtune.compare.results import read_questions
from slimtune.compare.runner import ASKED, Watcher, results_of, run_all
from slimtune.compare.setup import ComparisonSetup, check_candidates, check_unchanged, refuse_changes
from slimtune.compare.summary import summarize
from slimtune.data.reading import peek_splits, task_of
from slimtune.errors import ConfigError, OutputExistsError, SlimtuneError
from slimtune.recipe.candidates import Run, runs_of
from slimtune.recipe.compare import CompareSettings

if TYPE_CHECKING:
    from slimtune.recipe.recipe import ModelSettings, Recipe

DATA, SECTION = "data", "compare"
BUDGET = ("questions", "scorer", "max_new_tokens", "texts")
"""What of the settings must stay as it is while methods and seeds are added."""


@dataclass(frozen=True)
class Comparison:
    """What is run and what is known of it."""

    setup: ComparisonSetup
    facts: ComparisonRecord

    @property
    def runs(self) -> list[Run]:
        """All of them, in their order."""
        return runs_of(self.setup.settings.candidates, self.setup.settings.seeds)

    def run(self, watcher: Watcher) -> ComparisonReport:
        """Do what is unfinished, with the page written anew after each run.

        Raises: OutputExistsError, while another process does so in the same folder.
        """
        from filelock import FileLock, Timeout

        folder = self.setup.folder
        try:
            # Not waiting: a second command in the same folder is a mistake. The system frees the lock of a process that
            # was killed.
            with FileLock(folder / ".lock", timeout=0):
                run_all(self.setup, self.runs, watcher, self._write)
                return self._write()
        except Timeout as error:
            raise OutputExistsError(
                f"another comparison runs in {folder}; wait for it, or choose another --output"
            ) from error

    def report(self) -> ComparisonReport:
        """What follows from the runs that are there."""
        questions = self.setup.folder / ASKED
        settings = self.setup.settings
        summary = summarize(settings.candidates, results_of(self.setup, self.runs), settings.seeds)
        return report(summary, self.facts, read_questions(questions) if questions.is_file() else [])

    def _write(self) -> ComparisonReport:
        report = self.report()
        write_report(self.setup.folder, report)
        return report


def prepare(
    path: Path,
    overrides: Sequence[str],
    options: Mapping[str, Any],
    output: Path,
    price: str | None = None,
    trust_remote_code: bool = False,
    scratch: Path | None = None,
) -> Comparison:
    """A recipe made ready: read, checked, its data written down; nothing is loaded yet.

    Args:
        options: settings of the comparison that come before those of the recipe.
        price: of an hour, in US dollars or as the name of a device.
        trust_remote_code: run Python code that comes with the model; a recipe can't allow that by itself.
        scratch: where the data is written instead, for a comparison that is looked at and not run.

    Raises:
        ConfigError, DataError: a mistake in the recipe, or data that can't be compared on.
        MissingDependencyError: a library of a candidate or of the report isn't installed.
        ModelNotFoundError: the recipe's model is nowhere.
        OutputExistsError: the folder holds another comparison, or something else, or was begun with other data.
    """
    from slimtune.recipe.recipe import Recipe, overridden
    from slimtune.storage.text_files import read_mapping

    check_dependencies()
    values = overridden(read_mapping(path), overrides)
    settings = CompareSettings.of({**(values.pop(SECTION, None) or {}), **options})
    base = Recipe.of(values).trusting(trust_remote_code)
    if trust_remote_code:
        # Into the values as well, for the processes of the runs read those and not this object.
        values["model"] |= {"trust_remote_code": True}
    data = output / DATA if scratch is None else scratch
    setup = ComparisonSetup(output, values, settings, data / TRAIN, data / QUESTIONS)
    check_candidates(setup)
    same = {"recipe": base.to_dict() | {"output": ""}, **{name: getattr(settings, name) for name in BUDGET}}
    before = _same_as_before(output, same)
    check_unchanged(setup, runs_of(settings.candidates, settings.seeds))
    priced = _priced(price)
    kind, is_prompted = _kind(base, setup.train), _writes_text(base.model)
    # One that goes on computes as it was begun: runs in two dtypes wouldn't compare.
    computes = before is None or before.computes
    setup = replace(setup, kind=kind, settings=settings.for_task(kind, is_prompted), computes=computes)
    name = _written(base, settings, data, before if scratch is None else None)
    facts = _facts(setup, name, same, before, priced, is_prompted)
    if scratch is None:
        facts.write(output)
    return Comparison(setup, facts)


def _facts(
    setup: ComparisonSetup,
    data: str,
    same: dict[str, Any],
    before: ComparisonRecord | None,
    priced: tuple[float | None, str],
    prompted: bool,
) -> ComparisonRecord:
    from slimtune.storage.text_files import dump
    from slimtune.train.results import versions

    settings, constant = setup.settings, constant_of(setup)
    now = {"machine": machine(), "versions": versions()}
    return ComparisonRecord(
        model=setup.recipe["model"]["name"],
        data=data,
        command=shlex.join(["slimtune", *sys.argv[1:]]),
        date=today(),
        recipe=dump(setup.recipe | {SECTION: _listed(settings)}),
        candidates=[candidate.name for candidate in settings.candidates],
        seeds=settings.seeds,
        same=same,
        price_per_hour=priced[0],
        price_of=priced[1],
        constant=constant,
        computes=setup.computes,
        remarks=remarks(setup, prompted, constant),
        moved=[] if before is None else environment_changes(before, **now),
        **now,
    )


def _kind(base: Recipe, written: Path) -> str:
    """The task that the data is for, by its first row; raises ConfigError, DataError."""
    return task_of(written) if written.is_file() else peek_splits(base.data, base.task).task


def _writes_text(model: ModelSettings) -> bool:
    """Whether a model can be prompted, by the class that its configuration names; raises ModelNotFoundError."""
    import transformers

    from slimtune.plan.build import config_of

    named = config_of(model.source, model.trust_remote_code).architectures or []
    # Classes of code that comes with the model aren't transformers'; they are taken to write text.
    return all(getattr(transformers, name).can_generate() for name in named if hasattr(transformers, name))


def _written(base: Recipe, settings: CompareSettings, data: Path, before: ComparisonRecord | None) -> str:
    """What the data is called, once it is written down.

    Raises: OutputExistsError, where it has changed since the comparison was begun.
    """

    def write(folder: Path) -> str:
        return write_dataset(base.data, base.task, base.training.seed, settings.questions, folder)

    if before is None or not (data / TRAIN).is_file():
        return write(data)
    with TemporaryDirectory() as fresh:
        try:
            write(Path(fresh))
        except SlimtuneError:
            # The source is gone, and what was written of it is all that is needed.
            return before.data
        written = (TRAIN, QUESTIONS)
        # By bytes: the file is written by this code in a fixed order, so that equal rows are equal bytes.
        changed = any((Path(fresh) / name).read_bytes() != (data / name).read_bytes() for name in written)
    if changed:
        raise OutputExistsError(
            f"{before.data} has changed since the comparison in {data.parent} was begun, and its runs would not have "
            "the same data; choose another --output, or go back to what it was"
        )
    return before.data


def _same_as_before(output: Path, same: Mapping[str, Any]) -> ComparisonRecord | None:
    """The facts of a comparison that goes on; raises OutputExistsError for another one."""
    before = read_record(output)
    if before is None:
        # A folder that was begun holds data at most; anything else isn't ours.
        strangers = [entry.name for entry in output.iterdir() if entry.name != DATA] if output.is_dir() else []
        if strangers or output.is_file():
            what = f"holds {min(strangers)} and no {FACTS}" if strangers else "is a file"
            raise OutputExistsError(f"the output {output} {what}; choose another folder")
        return None
    refuse_changes(before.same, same, f"the comparison in {output}")
    return before


def _priced(price: str | None) -> tuple[float | None, str]:
    """US dollars an hour and what they are for; raises ConfigError for what is neither a number nor a device."""
    if price is None:
        return None, ""
    try:
        value = float(price)
    except ValueError:
        from slimtune.plan.devices import find

        device = find(price)
        if device.price_per_hour is None:
            raise ConfigError(f"nobody rents out a {device.name} in the table; pass its price, --price 0.40") from None
        return device.price_per_hour, f"{device.name}, {device.price_date}"
    if not 0 <= value < float("inf"):
        raise ConfigError(f"a price is 0 or more, found {price}")
    return value, "given"


def _listed(settings: CompareSettings) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
