"""Whether tuning worked: checks and comparisons with their reports, answers side by side, and blind votes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Form
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from slimtune.errors import ConfigError
from slimtune.studio import run_files
from slimtune.studio.chat_server import ChatServer, find_bases
from slimtune.studio.checks import (
    DATA,
    QUESTIONS,
    REPORT,
    Check,
    CheckSettings,
    ComparisonSettings,
    begin_check,
    begin_comparison,
    checkable,
    read_check,
    read_checks,
)
from slimtune.studio.history import NoSuchRunError
from slimtune.studio.view import CurrentView, Page, View
from slimtune.studio.votes import Ballot, Choice, Contest, Votes

PAGE = Page("outcome", "/outcome", order=40, of_run="/outcome?run=")
PER_PAGE = 10


class CheckForm(BaseModel):
    """What the form says; an empty field is one that isn't set."""

    run: str
    kind: Literal["check", "comparison"] = "check"
    held_out: str = ""
    limit: Annotated[int, Field(ge=2)] = 100
    shots: Annotated[int, Field(ge=0)] = 4
    texts: Annotated[int, Field(ge=0)] = 20
    methods: str = "lora"
    few: str = "0,4"
    seeds: Annotated[int, Field(ge=1)] = 3
    max_steps: str = ""


@PAGE.get("/outcome")
def show(view: CurrentView, run: str = "") -> Response:
    """The form, and what was checked."""
    runs = view.studio.folder
    checks = read_checks(runs, view.studio.jobs)
    return view.render("outcome.html.j2", runs=checkable(runs), chosen=run, checks=checks)


@PAGE.post("/outcome/checks")
def begin(view: CurrentView, form: Annotated[CheckForm, Form()]) -> Response:
    """Queue a check or a comparison, and lead to it."""
    runs, jobs = view.studio.shown_folder, view.studio.jobs
    if form.kind == "check":
        name = begin_check(runs, jobs, form.run, CheckSettings(form.held_out, form.limit, form.shots, form.texts))
    else:
        steps = int(form.max_steps) if form.max_steps.isdigit() and int(form.max_steps) else None
        settings = ComparisonSettings(form.methods, form.few, form.seeds, steps, form.limit, form.texts, form.held_out)
        name = begin_comparison(runs, jobs, form.run, settings)
    return view.go(f"/outcome/checks/{name}")


@PAGE.get("/outcome/checks/{name}")
def show_check(view: CurrentView, name: str, page: int = 1, differ: bool = False) -> Response:
    """The scores, the report and the answers side by side."""
    check = _check(view, name)
    numbers = [number for number in range(len(check.questions)) if not differ or _differ(check, number)]
    pages = max(1, -(-len(numbers) // PER_PAGE))
    page = min(max(1, page), pages)
    shown = numbers[(page - 1) * PER_PAGE : page * PER_PAGE]
    return view.render("outcome_check.html.j2", check=check, shown=shown, page=page, pages=pages, differ=differ)


@PAGE.get("/outcome/checks/{name}/jobs")
def show_jobs(view: CurrentView, name: str, ended: int = 0) -> Response:
    """How far the commands are; the page is loaded again where one has ended since."""
    check = _check(view, name)
    response = view.render("outcome_jobs.html.j2", check=check)
    if sum(not job.is_busy for job in check.jobs) != ended:
        response.headers["hx-refresh"] = "true"
    return response


@PAGE.post("/outcome/checks/{name}/stop")
def stop(view: CurrentView, name: str) -> Response:
    """Stop the commands of a check, those that wait first."""
    view.studio.jobs.stop_all(_check(view, name).jobs)
    return view.go(f"/outcome/checks/{name}")


@PAGE.get("/outcome/checks/{name}/report")
def show_report(view: CurrentView, name: str) -> Response:
    """The report that a comparison wrote, for the frame of its page."""
    return run_files.report(run_files.file_path(view.studio.folder, name, REPORT))


@PAGE.get("/outcome/vote")
def show_vote(view: CurrentView) -> Response:
    """Who is up against whom, and what came of votes so far."""
    runs = view.studio.folder
    bases = find_bases(runs)
    sources = [check.name for check in read_checks(runs, view.studio.jobs) if _questions(runs, check.name).is_file()]
    models = [(base, name) for base, adapters in bases.adapters.items() for name in ("", *adapters)]
    newest = next(iter(bases.adapters.items()), ("", []))
    chosen = [(newest[0], name) for name in ("", *newest[1])][:2]
    tallies = Votes(runs).tallies()
    return view.render(
        "outcome_vote.html.j2", models=models, chosen=chosen, sources=sources, tallies=tallies, value=_value
    )


class VoteForm(BaseModel):
    """The contest: two models, and where prompts come from.

    Attributes:
        one, other: base and adapter as a list in JSON.
        source: a check; empty for the prompt that was typed.
    """

    one: str
    other: str
    source: str = ""
    prompt: str = ""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    max_tokens: Annotated[int, Field(ge=1)] = 256


class CastForm(VoteForm):
    """A vote."""

    id: str
    choice: Choice


@PAGE.post("/outcome/vote/next")
async def next_ballot(view: CurrentView, form: Annotated[VoteForm, Form()]) -> Response:
    """Two new answers, without names."""
    contest = _contest(view, form)
    ballot, left = await run_in_threadpool(_dealt, view, contest, form)
    return view.render(
        "outcome_ballot.html.j2", ballot=ballot, left=left, count=Votes(view.studio.folder).tally(contest).count
    )


@PAGE.post("/outcome/vote/cast")
def cast(view: CurrentView, form: Annotated[CastForm, Form()]) -> Response:
    """Keep a vote; what is next is asked by the page."""
    contest, votes = _contest(view, form), Votes(view.studio.folder)
    votes.vote(contest, form.id, form.choice)
    goes_on = bool(form.source)
    return view.render("outcome_voted.html.j2", count=votes.tally(contest).count, goes_on=goes_on)


@PAGE.get("/outcome/vote/result")
def show_result(view: CurrentView) -> Response:
    """All tallies, for whoever wants to know now."""
    return view.render("outcome_tallies.html.j2", tallies=Votes(view.studio.folder).tallies())


def _check(view: View, name: str) -> Check:
    check = read_check(view.studio.folder, view.studio.jobs, name)
    if not check.jobs and not (view.studio.folder / name).is_dir():
        raise NoSuchRunError(f"there is no check {name}; it may have been deleted")
    return check


def _differ(check: Check, number: int) -> bool:
    return len({candidate.scores[number] for candidate in check.candidates if number < len(candidate.scores)}) > 1


def _questions(runs: Path, name: str) -> Path:
    return runs / name / DATA / QUESTIONS


def _value(model: tuple[str, str]) -> str:
    return json.dumps(model, ensure_ascii=False)


def _contest(view: View, form: VoteForm) -> Contest:
    try:
        (base, one), (base_of_other, other) = json.loads(form.one), json.loads(form.other)
    except (ValueError, TypeError):
        raise ConfigError("the form names no two models; load the page again") from None
    if base != base_of_other:
        raise ConfigError("both must be of one base, which answers for both; choose another model on one of the sides")
    for name in filter(None, (one, other)):
        # Before a name becomes a path.
        view.studio.run_folder(name)
    return Contest.between(view.studio.folder, base, one, other)


def _dealt(view: View, contest: Contest, form: VoteForm) -> tuple[Ballot | None, int]:
    """Two answers to the next prompt, and how many prompts are left behind it; None where none is."""
    runs, votes = view.studio.folder, Votes(view.studio.folder)
    if form.source:
        from slimtune.evaluate.tasks import read_task

        view.studio.run_folder(form.source)
        done = votes.prompts(contest)
        questions = read_task(_questions(runs, form.source)).questions
        prompts = [(question.user_text, question.turns) for question in questions if question.user_text not in done]
        if not prompts:
            return None, 0
        prompt, turns = prompts[0]
        messages = [dict(turn) for turn in turns] or [{"role": "user", "content": prompt}]
    else:
        prompt, prompts = form.prompt.strip(), [("", [])]
        if not prompt:
            raise ConfigError("there is no prompt; type one, or take those of a check")
        messages = [{"role": "user", "content": prompt}]
    server = ChatServer(runs)
    request = {"messages": messages, "temperature": form.temperature, "max_tokens": form.max_tokens}
    answers = (
        server.answer(contest.base, contest.first, request),
        server.answer(contest.base, contest.second, request),
    )
    return votes.deal(contest, prompt, answers), len(prompts) - 1
