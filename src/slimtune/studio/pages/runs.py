"""The history of runs: a list with search, curves and recipes side by side, and the page of one run while it learns."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Query
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from slimtune.errors import ConfigError, SlimtuneError
from slimtune.storage.atomic import write_file
from slimtune.storage.text_files import dump, read_mapping
from slimtune.studio import forms
from slimtune.studio.figures import Numbers
from slimtune.studio.history import BusyRunError, Run, delete_run, read_json_mapping, read_run, read_runs
from slimtune.studio.jobs import OWN_FOLDER, interrupt
from slimtune.studio.logs import LOSSES, PROGRESS, SAMPLES, Lines, curves, read_lines, series
from slimtune.studio.view import CurrentView, Page, View

PAGE = Page("runs", "/", order=70)
LOOK_SECONDS = 1.0
HEARTBEAT = 15
"""Looks between two signs of life, at which a browser that has gone is noticed."""
_MAX_COMPARED = 12
_LAST_SAMPLES = 8


@PAGE.get("/")
def show(view: CurrentView, search: str = "") -> Response:
    """All runs, or those in which the words of a search stand."""
    runs = read_runs(view.studio.folder, view.studio.jobs)
    words = search.lower().split()
    chosen = [run for run in runs if all(word in run.search_text for word in words)]
    output = view.studio.shown_folder / "tuned"
    command = forms.command_of(["train", "MODEL", "DATA", "--output", str(output)])
    return view.render("runs.html.j2", runs=chosen, has_runs=bool(runs), search=search, command_line=command)


@PAGE.get("/curves")
def compare(view: CurrentView, name: Annotated[list[str] | None, Query()] = None) -> Response:
    """The curves of some runs over each other, and in what their recipes differ."""
    runs = [read_run(view.studio.folder, view.studio.jobs, each) for each in (name or [])[:_MAX_COMPARED]]
    recipes = {run.name: _by_place(recipe_of(run)) for run in runs}
    lines = [_lines(view, run, with_name=True) for run in runs]
    return view.render(
        "runs_compared.html.j2",
        runs=runs,
        lines=[line for group in lines for line in group],
        differences=differences(recipes),
        without_recipe=[name for name, recipe in recipes.items() if not recipe],
    )


@PAGE.get("/runs/{name}")
def show_run(view: CurrentView, name: str) -> Response:
    """One run, live while it waits or runs."""
    return view.render("run.html.j2", **_page_of(view, name))


@PAGE.get("/runs/{name}/events")
async def events(view: CurrentView, name: str, at: str = "") -> Response:
    """What changes on the page of a run, as server-sent events, until it ends.

    Args:
        at: where the page stopped reading; a browser that lost the connection says it in a header.
    """
    # Here, so that a run that isn't there is a status and not an event.
    await run_in_threadpool(read_run, view.studio.folder, view.studio.jobs, name)
    place = Place.read(view.request.headers.get("last-event-id") or at)
    # nginx would collect events into blocks otherwise.
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_events(view, name, place), media_type="text/event-stream", headers=headers)


@PAGE.post("/runs/{name}/stop")
def stop(view: CurrentView, name: str) -> Response:
    """Stop a run as Ctrl-C does, with a checkpoint, whoever began it."""
    run = read_run(view.studio.folder, view.studio.jobs, name)
    if run.job is not None and run.job.is_busy:
        # A check has several, and the next one would begin in place of the one that is stopped.
        view.studio.jobs.stop_all(view.studio.jobs.named(name))
    elif run.process is not None:
        interrupt(run.process)
    return view.render("run_stopping.html.j2", run=run)


@PAGE.post("/runs/{name}/resume")
def resume(view: CurrentView, name: str) -> Response:
    """Go on with a run that was stopped."""
    run = read_run(view.studio.folder, view.studio.jobs, name)
    if run.is_busy:
        raise BusyRunError(view.t("runs.busy", name=name))
    view.studio.jobs.add(name, resume_arguments(run, view.studio.folder))
    return view.go(f"/runs/{name}")


@PAGE.post("/runs/{name}/delete")
def delete(view: CurrentView, name: str) -> Response:
    """Delete a run's folders."""
    delete_run(view.studio.folder, view.studio.jobs, name)
    return view.go("/")


def recipe_of(run: Run) -> Mapping[str, Any]:
    """The recipe of a run, in full; empty where there is none that can be read."""
    if isinstance(run.facts.get("recipe"), Mapping):
        return run.facts["recipe"]
    try:
        return read_mapping(run.path / "recipe.yaml")
    except (SlimtuneError, OSError):
        return {}


def resume_arguments(run: Run, folder: Path) -> list[str]:
    """What stands behind `slimtune` to go on with a run: its own command, or its recipe where a terminal began it.

    Raises: ConfigError, for a run that can't be gone on with from here.
    """
    if run.job is not None and run.job.arguments[:1] in (("train",), ("distill",)):
        return [*(word for word in run.job.arguments if word != "--resume"), "--resume"]
    recipe = run.facts.get("recipe")
    if not isinstance(recipe, Mapping):
        raise ConfigError(f"{run.name} has no recipe to go on with; resume it with the command that began it")
    if refused := forms.refuse_code(recipe):
        raise ConfigError(next(iter(refused.values())))
    path = folder / OWN_FOLDER / "resumed" / f"{run.name}.yaml"
    write_file(path, dump(dict(recipe)))
    command = "distill" if recipe.get("distillation") else "train"
    return [command, str(path), "--output", str(run.path), "--resume"]


def differences(recipes: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The places at which some recipes differ, each with the value in every one of them."""
    known = [recipe for recipe in recipes.values() if recipe]
    places = dict.fromkeys(place for recipe in known for place in recipe)
    rows = [(place, [forms.as_text(recipe.get(place)) for recipe in recipes.values()]) for place in places]
    return [(place, values) for place, values in rows if place != "output" and len(set(values)) > 1]


@dataclass(frozen=True)
class Place:
    """Where a page stopped reading: bytes of the losses and of the samples."""

    losses: int = 0
    samples: int = 0

    @classmethod
    def read(cls, text: str) -> Place:
        """From `LOSSES-SAMPLES`; the beginning for anything else."""
        losses, _, samples = text.partition("-")
        return cls(int(losses), int(samples)) if losses.isdecimal() and samples.isdecimal() else cls()

    def __str__(self) -> str:
        return f"{self.losses}-{self.samples}"


async def _events(view: View, name: str, place: Place) -> AsyncIterator[str]:
    shown: dict[str, str] = {}
    looks = 0
    while True:
        try:
            texts, place, goes_on = await run_in_threadpool(_look, view, name, place, shown)
        except SlimtuneError:
            # It was deleted meanwhile.
            return
        for text in texts:
            yield text
        if not goes_on:
            return
        looks += 1
        if looks % HEARTBEAT == 0:
            yield ": still there\n\n"
        await asyncio.sleep(LOOK_SECONDS)


def _look(view: View, name: str, place: Place, shown: dict[str, str]) -> tuple[list[str], Place, bool]:
    """What has changed since the last look: events, the new place, and whether there is more to come."""
    run = read_run(view.studio.folder, view.studio.jobs, name)
    if not run.is_busy:
        # All of it at once: what ended a run changes most of its page.
        body = view.text("run_body.html.j2", **_page_of(view, name))
        return [_event(_partial("run", body, "outerHTML"))], place, False
    losses = read_lines(run.live_folder / LOSSES, place.losses)
    samples = read_lines(run.live_folder / SAMPLES, place.samples)
    began_anew = losses.offset < place.losses
    place = Place(losses.offset, samples.offset)
    parts = {"facts": view.text("run_facts.html.j2", **_facts_of(view, run)), "log": _escaped_log(view, run)}
    if samples.entries or "samples" not in shown:
        parts["samples"] = view.text("run_samples.html.j2", samples=_samples(run))
    # Morphed, so that a button that has the focus keeps it.
    texts = [_event(_partial(part, text, "innerMorph")) for part, text in parts.items() if shown.get(part) != text]
    shown |= parts
    if began_anew:
        texts.append(_event(_partial("losses", view.text("run_chart.html.j2", **_chart_of(view, run)))))
    elif losses.entries:
        points = [
            {"series": index, "x": step, "y": value}
            for index, name in enumerate(("loss", "eval_loss"))
            for step, value in curves(losses.entries).get(name, [])
        ]
        texts.append(_event(json.dumps(points), "points", str(place)))
    return texts, place, True


def _event(data: str, name: str = "", number: str = "") -> str:
    head = (f"event: {name}\n" if name else "") + (f"id: {number}\n" if number else "")
    return head + "".join(f"data: {line}\n" for line in data.splitlines()) + "\n"


def _partial(target: str, text: str, swap: str = "innerHTML") -> str:
    return f'<hx-partial hx-target="#{target}" hx-swap="{swap}">{text}</hx-partial>'


def _page_of(view: View, name: str) -> dict[str, Any]:
    """All that the page of a run shows."""
    run = read_run(view.studio.folder, view.studio.jobs, name)
    recipe = recipe_of(run)
    place = Place(read_lines(run.live_folder / LOSSES).offset, read_lines(run.live_folder / SAMPLES).offset)
    return {
        "recipe_text": dump(dict(recipe)) if recipe else "",
        "command_line": run.job.command if run.job else "",
        "at": str(place),
        "samples": _samples(run),
        "log": run.job.log_tail() if run.job else "",
        **_facts_of(view, run),
        **_chart_of(view, run),
    }


def _facts_of(view: View, run: Run) -> dict[str, Any]:
    """The figures of a run, and what can be done with it."""
    progress = Numbers.of(read_json_mapping(run.run_folder / PROGRESS)[0] if run.is_busy else {})
    waiting = [job.number for job in view.studio.jobs.waiting()] if run.state == "queued" else []
    losses = curves(read_lines(run.live_folder / LOSSES).entries)
    memory = progress["memory_bytes"] or (run.process.memory_bytes() if run.process and run.is_busy else None)
    return {
        "run": run,
        "progress": progress,
        "planned": Numbers.of(run.facts.get("planned")),
        "memory_bytes": memory,
        "latest": Numbers({name: points[-1][1] for name, points in losses.items()}),
        "before": waiting.index(run.job.number) if run.job and run.job.number in waiting else 0,
        "scores": Numbers.of(run.results.get("scores")),
    }


def _chart_of(view: View, run: Run) -> dict[str, Any]:
    lines = _lines(view, run)
    points = lines[0]["y"] if lines else []
    sentence = view.t("runs.no_curve")
    if points:
        sentence = view.t("runs.curve", first=f"{points[0]:.3g}", last=f"{points[-1]:.3g}", step=lines[0]["x"][-1])
    return {"lines": lines, "sentence": sentence, "run": run}


def _lines(view: View, run: Run, with_name: bool = False) -> list[dict[str, Any]]:
    """The curves of a run; while it learns also one that is empty, for its points may still come."""
    losses = curves(read_lines(run.live_folder / LOSSES).entries)
    labels = {"loss": view.t("runs.loss"), "eval_loss": view.t("runs.held_out")}
    return [
        series(f"{run.name}, {label}" if with_name else label, losses.get(name, ()), marks=name == "eval_loss")
        for name, label in labels.items()
        if name in losses or (run.is_busy and not with_name)
    ]


def _samples(run: Run) -> list[dict[str, Any]]:
    """The last answers to held-out questions."""
    lines: Lines = read_lines(run.live_folder / SAMPLES)
    wanted = ("step", "prompt", "expected", "answer")
    return [entry for entry in lines.entries if all(name in entry for name in wanted)][: -_LAST_SAMPLES - 1 : -1]


def _escaped_log(view: View, run: Run) -> str:
    return view.text("run_log.html.j2", log=run.job.log_tail() if run.job else "")


def _by_place(sections: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's values by place, lists as a whole."""
    flat: dict[str, Any] = {}
    for key, value in sections.items():
        inner = isinstance(value, Mapping) and value
        flat |= _by_place(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat
