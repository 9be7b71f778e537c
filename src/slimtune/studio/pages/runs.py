"""The history of runs."""

from __future__ import annotations

import shlex

from fastapi.responses import Response

from slimtune.studio.history import read_runs
from slimtune.studio.view import CurrentView, Page

PAGE = Page("runs", "/", order=70)


@PAGE.get("/")
def show(view: CurrentView) -> Response:
    """All runs."""
    runs = read_runs(view.studio.folder, view.studio.jobs)
    output = view.studio.folder / "tuned"
    command = shlex.join(["slimtune", "train", "MODEL", "DATA", "--output", str(output)])
    return view.render("runs.html.j2", runs=runs, command_line=command)
