"""What says whether tuning worked: comparisons, and checks of one run, read from the files that the commands leave.

A comparison is a folder that `slimtune compare` wrote. A check is one that the studio begins for a run:

    FOLDER/NAME/check.json                       the run, its base, and on what it is checked
    FOLDER/NAME/data/questions.jsonl             what is asked; written as a comparison writes it, with data/train.jsonl
    FOLDER/NAME/{base,few-shot,tuned}.jsonl      the answers, by `slimtune evaluate`
    FOLDER/.studio/jobs/NUMBER/log               the figures of `slimtune forgetting`
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slimtune.errors import ConfigError, SlimtuneError
from slimtune.metrics.intervals import interval_of_mean
from slimtune.storage.atomic import write_file
from slimtune.storage.source import ADAPTER, base_of
from slimtune.storage.text_files import read_json, read_mapping
from slimtune.studio.history import run_path
from slimtune.studio.jobs import Job, Jobs

CHECK, COMPARISON, REPORT, RECIPE = "check.json", "comparison.json", "report.html", "recipe.yaml"
BASE, FEW_SHOT, TUNED = "base", "few-shot", "tuned"
DATA, QUESTIONS, TRAIN = "data", "questions.jsonl", "train.jsonl"
_RESULTS = "runs/*/result.json"


@dataclass(frozen=True)
class CandidateAnswers:
    """What one candidate answered.

    Attributes:
        name: base, few-shot or tuned, or what a comparison calls it.
        scores: of the questions, more is better.
    """

    name: str
    answers: list[str]
    scores: list[float]
    metric: str

    @property
    def mean(self) -> float:
        """The mean score."""
        return sum(self.scores) / len(self.scores)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the mean, 95%."""
        return interval_of_mean(self.scores)


@dataclass(frozen=True)
class DomainChange:
    """The language loss on texts of a domain, in nats per token."""

    name: str
    before: float
    after: float
    interval: tuple[float, float] | None

    @property
    def difference(self) -> float:
        """Above 0 is forgetting."""
        return self.after - self.before


@dataclass(frozen=True)
class Check:
    """A comparison or a check as its files say it.

    Attributes:
        subject: the run that is checked, or the model that methods are compared on.
        questions: each with the expected answer.
        candidates: those that have answered, each with as many answers as there are questions.
        jobs: the commands, in their order.
        faults: files that can't be read, in sentences.
    """

    name: str
    kind: Literal["comparison", "check"]
    subject: str
    questions: list[tuple[str, str]]
    candidates: list[CandidateAnswers]
    jobs: list[Job]
    forgetting: list[DomainChange] = field(default_factory=list)
    has_report: bool = False
    faults: list[str] = field(default_factory=list)

    @property
    def is_busy(self) -> bool:
        """Whether some of its commands wait or run."""
        return any(job.is_busy for job in self.jobs)


def read_checks(runs: Path, jobs: Jobs) -> list[Check]:
    """All checks and comparisons of a folder, the newest first."""
    by_name = _jobs_by_name(jobs)
    folders = [path for path in runs.iterdir() if path.is_dir() and not path.is_symlink()]
    begun = [path for path in folders if _kind(path) or _compares(by_name.get(path.name, []))]
    newest = sorted(begun, key=lambda path: path.stat().st_mtime, reverse=True)
    there = {path.name for path in newest}
    waiting = [name for name, own in by_name.items() if name not in there and _compares(own)]
    return [read_check(runs, jobs, name, by_name) for name in (*reversed(waiting), *(path.name for path in newest))]


def read_check(runs: Path, jobs: Jobs, name: str, by_name: Mapping[str, list[Job]] | None = None) -> Check:
    """The check or comparison of this name. Raises: NoSuchRunError for a name that is none."""
    folder = run_path(runs, name)
    own = jobs.named(name) if by_name is None else by_name.get(name, [])
    if _kind(folder) == "check":
        return _read_check(folder, own)
    return _read_comparison(folder, own)


@dataclass(frozen=True)
class CheckSettings:
    """What a check asks.

    Attributes:
        held_out: a file of questions; empty for the rows that the run held out.
        limit: the most questions.
        shots: examples in the base's prompt; 0 leaves it out.
        texts: of each shipped set that forgetting is measured on; 0 leaves it out.
    """

    held_out: str = ""
    limit: int = 100
    shots: int = 4
    texts: int = 20


def begin_check(runs: Path, jobs: Jobs, run: str, settings: CheckSettings) -> str:
    """Write the questions of a check down and queue its commands; its name.

    Raises: ConfigError, DataError, for a run that held nothing out, or data that can't be asked.
    """
    from slimtune.compare.dataset import write_dataset
    from slimtune.data.reading import task_of
    from slimtune.recipe.recipe import Recipe

    source = run_path(runs, run)
    values = _recipe_values(source)
    if settings.held_out:
        values["data"]["held_out"] = settings.held_out
    recipe = Recipe.of(values)
    base = base_of(source) if (source / ADAPTER).is_file() else recipe.model.source
    name = free_name(runs, f"{run}-check")
    folder = runs / name
    write_dataset(recipe.data, recipe.task, recipe.training.seed, settings.limit, folder / DATA)
    write_file(folder / CHECK, json.dumps({"run": run, "base": base, "limit": settings.limit}, ensure_ascii=False))
    questions = str(folder / DATA / QUESTIONS)
    quantize = ["--quantize", recipe.model.quantize] if recipe.model.quantize else []

    def evaluate(model: str, who: str, *options: str) -> None:
        answers = ["--answers", str(folder / f"{who}.jsonl")]
        jobs.add(name, ["evaluate", model, questions, *answers, *options, *quantize])

    evaluate(str(source), TUNED)
    # A base has no head for labels before one is trained, and no language loss to lose.
    if task_of(Path(questions)) == "text":
        evaluate(base, BASE)
        if settings.shots:
            examples = str(folder / DATA / TRAIN)
            evaluate(base, FEW_SHOT, "--shots", str(settings.shots), "--examples", examples)
        if settings.texts:
            jobs.add(name, ["forgetting", str(source), "--texts", str(settings.texts), *quantize, "--json"])
    return name


@dataclass(frozen=True)
class ComparisonSettings:
    """The budget of a comparison, as options of `slimtune compare`.

    Attributes:
        held_out: a file or a share; empty for what the run's recipe holds out.
    """

    methods: str = "lora"
    shots: str = "0,4"
    seeds: int = 3
    max_steps: int | None = None
    questions: int | None = 100
    texts: int = 20
    held_out: str = ""


def begin_comparison(runs: Path, jobs: Jobs, run: str, settings: ComparisonSettings) -> str:
    """Queue a comparison by the recipe of a run; its name.

    Raises: ConfigError, for a run without a recipe, or one that would run code.
    """
    source = run_path(runs, run)
    values = _recipe_values(source)
    refuse_code(values)
    held_out = values["data"].get("held_out")
    if not settings.held_out and not held_out:
        raise ConfigError(f"{run} held no rows out to ask; name a file of questions, or a share such as 0.1")
    name = free_name(runs, f"{run}-comparison")
    options = [f"data.held_out={settings.held_out}"] if settings.held_out else []
    options += ["--methods", settings.methods, "--shots", settings.shots, "--seeds", str(settings.seeds)]
    for option, value in (("--max-steps", settings.max_steps), ("--questions", settings.questions)):
        options += [option, str(value)] if value else []
    output = ["--texts", str(settings.texts), "--output", str(runs / name)]
    jobs.add(name, ["compare", str(source / RECIPE), *options, *output])
    return name


def free_name(runs: Path, stem: str) -> str:
    """A name of a run that isn't taken."""
    taken = {path.name for path in runs.iterdir()} | set(Jobs(runs).latest())
    names = (stem if number == 1 else f"{stem}-{number}" for number in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def refuse_code(values: Any, place: str = "") -> None:
    """Raises: ConfigError, for settings by which a command would run a file of Python, or a model's own code."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            refuse_code(value, f"{place}.{name}".lstrip("."))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            refuse_code(value, f"{place}.{number}")
    runs_code = (isinstance(values, str) and ".py:" in values) or (
        values is True and place.endswith("trust_remote_code")
    )
    if runs_code:
        raise ConfigError(f"{place} has code in a file run, which the studio doesn't do; use the command in a terminal")


def checkable(runs: Path) -> list[str]:
    """The runs with a recipe and something that it tuned, the newest first."""
    folders = [path.parent for path in runs.glob(f"*/{RECIPE}") if not path.parent.is_symlink()]
    tuned = [path for path in folders if (path / ADAPTER).is_file() or (path / "config.json").is_file()]
    return [path.name for path in sorted(tuned, key=lambda path: path.stat().st_mtime, reverse=True)]


def _recipe_values(folder: Path) -> dict[str, Any]:
    if not (folder / RECIPE).is_file():
        raise ConfigError(f"{folder.name} has no {RECIPE}, which says what it was trained on; choose another run")
    values = read_mapping(folder / RECIPE)
    if not isinstance(values.get("data"), dict):
        raise ConfigError(f"the recipe of {folder.name} names no data; choose another run")
    return values


def _kind(folder: Path) -> str | None:
    return "check" if (folder / CHECK).is_file() else "comparison" if (folder / COMPARISON).is_file() else None


def _compares(jobs: list[Job]) -> bool:
    return any(job.arguments[:1] == ("compare",) for job in jobs)


def _jobs_by_name(jobs: Jobs) -> dict[str, list[Job]]:
    by_name: dict[str, list[Job]] = {}
    for job in jobs:
        by_name.setdefault(job.name, []).append(job)
    return by_name


def _read_check(folder: Path, jobs: list[Job]) -> Check:
    faults: list[str] = []
    subject, questions, candidates = folder.name, [], []
    try:
        subject = str(read_json(folder / CHECK)["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        faults.append(f"{folder.name}/{CHECK} can't be read: {error}")
    for who in (BASE, FEW_SHOT, TUNED):
        path = folder / f"{who}.jsonl"
        if not path.is_file():
            continue
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            asked = [(_as_text(line["question"]), str(line["expected"])) for line in lines]
            answers, scores = [str(line["answer"]) for line in lines], [float(line["score"]) for line in lines]
            metric = next(iter(lines[0].get("scores") or ["score"]))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            faults.append(f"{folder.name}/{path.name} can't be read: {error!r}")
            continue
        questions = questions or asked
        candidates.append(CandidateAnswers(who, answers, scores, metric))
    forgetting = [change for job in jobs if job.arguments[:1] == ("forgetting",) for change in _changes(job)]
    return Check(folder.name, "check", subject, questions, candidates, jobs, forgetting, faults=faults)


def _read_comparison(folder: Path, jobs: list[Job]) -> Check:
    from slimtune.compare.record import read_record
    from slimtune.compare.results import read_questions, read_result

    faults: list[str] = []
    subject, questions = folder.name, []
    candidates: list[CandidateAnswers] = []
    try:
        record = read_record(folder)
        subject = record.model if record else folder.name
        if (folder / QUESTIONS).is_file():
            questions = [(question.text, question.answer) for question in read_questions(folder / QUESTIONS)]
    except SlimtuneError as error:
        faults.append(str(error))
    for path in sorted(folder.glob(_RESULTS)):
        try:
            result = read_result(path)
        except SlimtuneError as error:
            faults.append(str(error))
            continue
        if result.score is not None and result.seed == 0:
            score = result.score
            candidates.append(CandidateAnswers(result.candidate, score.answers, score.per_question, score.name))
        elif result.reason:
            faults.append(f"{result.candidate}, seed {result.seed}: {result.reason}")
    has_report = (folder / REPORT).is_file()
    return Check(folder.name, "comparison", subject, questions, candidates, jobs, [], has_report, faults)


def last_json(job: Job) -> Mapping[str, Any]:
    """What a command with --json printed at its end; empty where it did not."""
    for line in reversed(job.log_tail(1_000_000).splitlines()):
        if line.startswith("{"):
            try:
                values = json.loads(line)
            except ValueError:
                continue
            return values if isinstance(values, dict) else {}
    return {}


def _changes(job: Job) -> Iterator[DomainChange]:
    told = last_json(job)
    for name, change in (told.get("domains") or {}).items():
        interval = change.get("interval")
        bounds = (float(interval[0]), float(interval[1])) if interval else None
        yield DomainChange(str(name), float(change["before"]), float(change["after"]), bounds)


def _as_text(question: Any) -> str:
    """A question as one text: that of its last turn, behind a conversation all of it."""
    if not isinstance(question, list):
        return str(question)
    turns = [turn for turn in question if turn.get("role") != "system"]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
