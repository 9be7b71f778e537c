"""Making a model smaller, writing it for other programs, and downloads of all that the runs hold."""

from __future__ import annotations

import shlex
from typing import Annotated

from fastapi import Form
from fastapi.responses import Response

from slimtune.errors import ConfigError
from slimtune.studio import run_files
from slimtune.studio.exports import (
    ADAPTER_FORMATS,
    SCHEMES,
    SLIM_PAGE,
    Exported,
    begin_export,
    begin_quantize,
    begin_slim,
    find_exports,
    gguf_kinds,
    read_export,
    slim_recipes,
    sources,
)
from slimtune.studio.history import NoSuchRunError
from slimtune.studio.view import CurrentView, Page, View

PAGE = Page("slim", "/slim", order=60, of_run="/slim?run=")
QUANTIZE = "quantize:"
"""In front of a scheme, where a recipe's name could stand."""


@PAGE.get("/slim")
def show(view: CurrentView, run: str = "") -> Response:
    """Both forms, and what there is to take away."""
    runs = view.studio.folder
    adapters, models = sources(runs)
    return view.render(
        "slim.html.j2",
        adapters=adapters,
        models=models,
        chosen=run,
        recipes=slim_recipes(),
        schemes=[QUANTIZE + scheme for scheme in SCHEMES],
        formats=ADAPTER_FORMATS,
        kinds=gguf_kinds(),
        exports=find_exports(runs, view.studio.jobs),
    )


@PAGE.post("/slim/exports")
def export(
    view: CurrentView,
    run: Annotated[str, Form()],
    to: Annotated[str, Form()] = "gguf",
    kind: Annotated[str, Form()] = "",
) -> Response:
    """Queue an export, and lead to it."""
    name = begin_export(view.studio.shown_folder, view.studio.jobs, run, to, kind)
    return view.go(f"/slim/results/{name}")


@PAGE.post("/slim/models")
def make_smaller(
    view: CurrentView,
    run: Annotated[str, Form()],
    how: Annotated[str, Form()],
    data: Annotated[str, Form()] = "",
    changes: Annotated[str, Form()] = "",
) -> Response:
    """Queue a quantization or a recipe of steps, and lead to it."""
    runs, jobs = view.studio.shown_folder, view.studio.jobs
    if how.startswith(QUANTIZE):
        name = begin_quantize(runs, jobs, run, how.removeprefix(QUANTIZE), data.strip())
    else:
        name = begin_slim(runs, jobs, run, how, data.strip(), _changes(changes))
    return view.go(f"/slim/results/{name}")


@PAGE.get("/slim/results/{name}")
def show_result(view: CurrentView, name: str) -> Response:
    """How it is used, its files, and what its steps came to."""
    export = _export(view, name)
    has_report = (export.path / SLIM_PAGE).is_file()
    return view.render("slim_result.html.j2", export=export, has_report=has_report)


@PAGE.get("/slim/results/{name}/jobs")
def show_jobs(view: CurrentView, name: str) -> Response:
    """How far it is; the page is loaded again once it has ended."""
    export = _export(view, name)
    response = view.render("slim_jobs.html.j2", export=export)
    if not export.is_busy:
        response.headers["hx-refresh"] = "true"
    return response


@PAGE.post("/slim/results/{name}/stop")
def stop(view: CurrentView, name: str) -> Response:
    """Stop the command that makes it."""
    view.studio.jobs.stop_all(_export(view, name).jobs)
    return view.go(f"/slim/results/{name}")


@PAGE.get("/slim/results/{name}/report")
def show_report(view: CurrentView, name: str) -> Response:
    """The report of the steps, for the frame of its page."""
    return run_files.report(run_files.file_path(view.studio.folder, name, SLIM_PAGE))


@PAGE.get("/slim/files/{name}/{inner:path}")
def download(view: CurrentView, name: str, inner: str) -> Response:
    """One file of a run."""
    return run_files.download(run_files.file_path(view.studio.folder, name, inner))


@PAGE.get("/slim/archives/{name}.zip")
def download_all(view: CurrentView, name: str) -> Response:
    """All files of a run."""
    return run_files.archive(_export(view, name).path)


def _export(view: View, name: str) -> Exported:
    export = read_export(view.studio.folder, view.studio.jobs, name)
    if not export.jobs and not export.path.is_dir():
        raise NoSuchRunError(f"there is no run {name}; it may have been deleted")
    return export


def _changes(text: str) -> list[str]:
    """The settings that are changed, as they are typed behind a command. Raises: ConfigError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"the changed settings can't be read: {error}; write section.key=value") from error
    wrong = next((word for word in words if "=" not in word or word.startswith("-")), None)
    if wrong is not None:
        raise ConfigError(f"'{wrong}' is no setting; write section.key=value, with a space between two")
    return words
