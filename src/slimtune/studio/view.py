"""What pages are made of: a page with its routes, the studio that they belong to, and the view of one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment

from slimtune.studio.answers import Answers
from slimtune.studio.history import run_path
from slimtune.studio.jobs import Jobs
from slimtune.studio.security import Access
from slimtune.studio.texts import Texts, choose

LANGUAGE_COOKIE = "slimtune-language"
_YEAR = 365 * 24 * 3600


class Page(APIRouter):
    """A page: its routes, and where it stands in the navigation.

    Args:
        name: the section of its texts, and the file of its template.
        path: where the navigation leads.
        order: its place in the navigation, from the left; None leaves it out.
        uploads: paths that take files.
        of_run: where the page of a run that is done leads with its name, as `/chat?adapter=`; empty for nowhere.
    """

    def __init__(
        self, name: str, path: str, order: int | None = None, uploads: tuple[str, ...] = (), of_run: str = ""
    ) -> None:
        super().__init__()
        self.name, self.path, self.order, self.uploads, self.of_run = name, path, order, uploads, of_run


@dataclass(frozen=True)
class Studio:
    """What all requests share.

    Attributes:
        folder: of the runs, absolute.
        pages: in the order of the navigation.
        languages: the texts by the language's code.
        answers: of commands that pages wait for.
    """

    folder: Path
    jobs: Jobs
    access: Access
    pages: tuple[Page, ...]
    templates: Environment
    languages: dict[str, Texts] = field(repr=False)
    answers: Answers = field(default_factory=Answers, repr=False)

    @property
    def shown_folder(self) -> Path:
        """The folder as a command names it: from where the studio was started, if it lies below."""
        here = Path.cwd()
        return self.folder.relative_to(here) if self.folder.is_relative_to(here) else self.folder

    def run_folder(self, name: str) -> Path:
        """The folder of a run. Raises: NoSuchRunError, for a name that is none or leads elsewhere."""
        return run_path(self.folder, name)


class View:
    """One request: the reader's language, and answers to it. A dependency of every route, as `CurrentView`.

    Args:
        is_stranger: whether whoever asks was refused at the door, and gets no token and no navigation.
    """

    def __init__(self, request: Request, is_stranger: bool = False) -> None:
        self.request, self.is_stranger = request, is_stranger
        self.studio: Studio = request.app.state.studio

    @cached_property
    def t(self) -> Texts:
        """The texts in the reader's language: chosen in the page, or else the browser's."""
        known, request = self.studio.languages, self.request
        chosen = request.query_params.get("language") or request.cookies.get(LANGUAGE_COOKIE)
        return known[chosen if chosen in known else choose(request.headers.get("accept-language", ""), known)]

    @property
    def is_fragment(self) -> bool:
        """Whether htmx asks, which puts the answer into a page that is there."""
        return "hx-request" in self.request.headers

    def text(self, template: str, **values: Any) -> str:
        """A template with these values, and those that all have."""
        return self.studio.templates.get_template(template).render(
            t=self.t, view=self, studio=self.studio, here=self.request.url.path, **values
        )

    def render(self, template: str, status: int = 200, **values: Any) -> Response:
        """The answer that a template makes."""
        response = HTMLResponse(self.text(template, **values), status)
        if self.request.query_params.get("language") == self.t.language:
            response.set_cookie(LANGUAGE_COOKIE, self.t.language, max_age=_YEAR, httponly=True, samesite="strict")
        return response

    def refuse(self, status: int, sentence: str) -> Response:
        """The answer to what can't be done: a page, or a notice in the page that is there."""
        if not self.is_fragment:
            return self.render("refused.html.j2", status, sentence=sentence)
        response = self.render("notice.html.j2", status, sentence=sentence)
        # Not into the target of the request: what is there stays.
        response.headers.update({"hx-retarget": "#notice", "hx-reswap": "innerHTML"})
        return response

    def go(self, path: str) -> Response:
        """Have the browser load another page."""
        return Response(status_code=204, headers={"hx-redirect": path})


def _view(request: Request) -> View:
    return View(request)


CurrentView = Annotated[View, Depends(_view)]
