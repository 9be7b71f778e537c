"""What can be taken away: adapters, models and exported files among the runs, and the commands that make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slimtune.errors import ConfigError, SlimtuneError, check_choice
from slimtune.storage.atomic import write_file
from slimtune.storage.source import ADAPTER, base_of
from slimtune.storage.text_files import parse, read_json
from slimtune.studio.checks import free_name, last_json, refuse_code
from slimtune.studio.history import RUN_SUFFIX, run_path
from slimtune.studio.jobs import OWN_FOLDER, Job, Jobs
from slimtune.studio.run_files import files_of

SLIM_REPORT, SLIM_PAGE = "slim_report.json", "slim_report.html"
ResultKind = Literal["ollama", "gguf", "gguf-lora", "slim", "adapter", "model", "nothing"]
_MARKS: dict[str, ResultKind] = {
    "Modelfile": "ollama", "model.gguf": "gguf", "adapter.gguf": "gguf-lora", SLIM_REPORT: "slim", ADAPTER: "adapter",
    "config.json": "model",
}  # fmt: skip
"""Files by which a result is known, the first that it has."""
_COMMANDS = ("export", "merge", "quantize", "slim")
ADAPTER_FORMATS = ("gguf", "ollama", "hf", "peft", "vllm", "gguf-lora")
MODEL_FORMATS = ("gguf", "ollama")
"""What `slimtune export` makes of a whole model; it is one of transformers already."""
SCHEMES = ("W4A16", "W8A16", "W8A8")


@dataclass(frozen=True)
class Use:
    """How a program takes a result: the line to type, or why it doesn't take it."""

    program: str
    takes: bool
    line: str


@dataclass(frozen=True)
class Exported:
    """A folder that can be taken away.

    Attributes:
        files: within it, each with its bytes.
        jobs: the commands that made it, where the studio ran them.
        uses: how it is used.
        notes: what a reader should know, and how it was checked.
        steps: of a slim recipe, a row a step, the cells by column.
    """

    path: Path
    kind: ResultKind
    files: list[tuple[Path, int]]
    jobs: list[Job]
    uses: list[Use] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: list[dict[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's."""
        return self.path.name

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(size for _, size in self.files)

    @property
    def is_busy(self) -> bool:
        """Whether a command that makes it waits or runs."""
        return any(job.is_busy for job in self.jobs)


def find_exports(runs: Path, jobs: Jobs) -> list[Exported]:
    """All results of a folder of runs, the newest first, and before them those that are being made."""
    by_name: dict[str, list[Job]] = {}
    for job in jobs:
        if job.arguments[:1] and job.arguments[0] in _COMMANDS:
            by_name.setdefault(job.name, []).append(job)
    folders = {path.name: path for path in runs.iterdir() if _is_run(path) and _kind(path) != "nothing"}
    newest = sorted(folders.values(), key=lambda path: path.stat().st_mtime, reverse=True)
    begun = [runs / name for name in reversed(by_name) if name not in folders]
    return [_outline(path, by_name.get(path.name, [])) for path in (*begun, *newest)]


def read_export(runs: Path, jobs: Jobs, name: str) -> Exported:
    """A result with how it is used and what its steps were. Raises: NoSuchRunError, for a name that is none."""
    outline = _outline(run_path(runs, name), jobs.named(name))
    uses, notes, steps = [], [], []
    told = next((last_json(job) for job in reversed(outline.jobs) if job.arguments[:1] == ("export",)), {})
    if told.get("use"):
        uses.append(Use(str(told.get("format", "")), True, str(told["use"])))
        notes += [str(told["check"]), *map(str, told.get("notes", []))]
    try:
        if outline.kind == "adapter" and not uses:
            uses = _adapter_uses(outline.path)
        if outline.kind == "slim":
            steps = _slim_steps(outline.path / SLIM_REPORT)
    except SlimtuneError as error:
        notes.append(str(error))
    return Exported(outline.path, outline.kind, outline.files, outline.jobs, uses, notes, steps)


def sources(runs: Path) -> tuple[list[str], list[str]]:
    """The adapters and the whole models among the runs, the newest first."""
    folders = sorted(filter(_is_run, runs.iterdir()), key=lambda path: path.stat().st_mtime, reverse=True)
    adapters = [path.name for path in folders if (path / ADAPTER).is_file()]
    return adapters, [path.name for path in folders if path.name not in adapters and (path / "config.json").is_file()]


def begin_export(runs: Path, jobs: Jobs, run: str, to: str, kind: str) -> str:
    """Queue `slimtune export`; the name of what it writes."""
    source = _source(runs, run)
    allowed = ADAPTER_FORMATS if (source / ADAPTER).is_file() else MODEL_FORMATS
    if to not in allowed:
        raise ConfigError(f"{run} can't be written as {to}; choose {', '.join(allowed)}")
    name = free_name(runs, f"{run}-{'merged' if to == 'hf' else to}")
    options = ["--type", kind] if kind and to in ("gguf", "ollama") else []
    jobs.add(name, ["export", str(source), "--to", to, *options, "--output", str(runs / name), "--json"])
    return name


def begin_quantize(runs: Path, jobs: Jobs, run: str, scheme: str, data: str) -> str:
    """Queue `slimtune quantize`; the name of what it writes. Raises: ConfigError."""
    check_choice("the scheme", scheme, SCHEMES)
    source = _source(runs, run)
    name = free_name(runs, f"{run}-{scheme.lower()}")
    options = ["--data", data] if data else []
    jobs.add(name, ["quantize", str(source), "--scheme", scheme, *options, "--output", str(runs / name)])
    return name


def begin_slim(runs: Path, jobs: Jobs, run: str, recipe: str, data: str, changes: Sequence[str]) -> str:
    """Queue `slimtune slim` with a recipe that ships; the name of what it writes. Raises: ConfigError."""
    from slimtune.recipe.recipe import overridden
    from slimtune.slim.recipe import SlimRecipe, shipped

    known = shipped()
    if recipe not in known:
        raise ConfigError(f"no recipe '{recipe}' ships; there are {', '.join(known)}")
    source, name = _source(runs, run), free_name(runs, f"{run}-{recipe}")
    if not data:
        raise ConfigError("the steps learn from data and are scored on it; name the file of the training data")
    path = runs / OWN_FOLDER / "recipes" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, known[recipe])
    overrides = [f"model={source}", f"data.train={data}", *changes]
    refuse_code(overridden(parse(known[recipe]), overrides))
    # What can be wrong is said now and not by a job that fails.
    SlimRecipe.read(path, overrides, runs / name)
    jobs.add(name, ["slim", str(path), *overrides, "--output", str(runs / name)])
    return name


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe of `slimtune slim`: what it is for, and its steps with their settings."""

    name: str
    summary: str
    steps: list[tuple[str, str]]


def slim_recipes() -> list[ShippedRecipe]:
    """Those that ship."""
    from slimtune.slim.recipe import shipped

    recipes = []
    for name, text in shipped().items():
        steps = [(kind, _shown(fields)) for step in parse(text)["steps"] for kind, fields in step.items()]
        recipes.append(ShippedRecipe(name, text.partition("\n")[0].removeprefix("# "), steps))
    return recipes


def gguf_kinds() -> list[str]:
    """The types of numbers in GGUF."""
    from slimtune.export.gguf.model import K_QUANTS, KINDS

    return [*KINDS, *K_QUANTS]


def _source(runs: Path, run: str) -> Path:
    path = run_path(runs, run)
    if not (path / ADAPTER).is_file() and not (path / "config.json").is_file():
        raise ConfigError(f"{run} holds neither an adapter nor a model; choose another run")
    return path


def _is_run(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not path.name.startswith(".") and path.suffix != RUN_SUFFIX


def _kind(path: Path) -> ResultKind:
    for mark, kind in _MARKS.items():
        if (path / mark).is_file():
            return kind
    return "nothing"


def _outline(path: Path, jobs: list[Job]) -> Exported:
    files = files_of(path) if path.is_dir() else []
    return Exported(path, _kind(path), [(name, (path / name).stat().st_size) for name in files], jobs)


def _adapter_uses(path: Path) -> list[Use]:
    """Which programs take an adapter as it is, by what its files say."""
    from slimtune.models.compatibility import verdicts
    from slimtune.models.headers import read_folder

    stored = read_folder(path, ADAPTER, "adapter_model*.safetensors")
    # What stands for a base and a folder in the notes of the engines.
    places = {"BASE": base_of(path), "NAME=FOLDER": f"{path.name}={path}", "FOLDER": str(path)}
    places |= {"DIR": f"{path}-gguf-lora", ", folder)": f", {str(path)!r})"}
    uses = []
    for verdict in verdicts(dict(stored.config), stored.tensors):
        line = verdict.note
        for place, value in places.items() if verdict.takes else ():
            line = line.replace(place, value, 1)
        uses.append(Use(verdict.engine, verdict.takes, line))
    return uses


def _slim_steps(path: Path) -> list[dict[str, str]]:
    from slimtune.slim.measure import SlimRow
    from slimtune.slim.report import SlimReport, table

    try:
        values: Any = read_json(path)
        return table(SlimReport(str(values["model"]), [SlimRow(**row) for row in values["rows"]]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path.parent.name}/{path.name} can't be read: {error}") from error


def _shown(fields: Any) -> str:
    if not isinstance(fields, dict):
        return ""
    flat = (
        (f"{name}.{key}", v) for name, value in fields.items() if isinstance(value, dict) for key, v in value.items()
    )
    plain = ((name, value) for name, value in fields.items() if not isinstance(value, dict))
    return ", ".join(f"{name} {value}" for name, value in (*plain, *flat))
