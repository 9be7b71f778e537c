"""The page that asks for the password, where the studio has one."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Form
from fastapi.responses import Response

from slimtune.studio.security import SESSION_COOKIE
from slimtune.studio.view import CurrentView, Page

PAGE = Page("login", "/login")
SECONDS_BEHIND_A_WRONG_ONE = 1.0
_turn = asyncio.Lock()


@PAGE.get("/login")
def show(view: CurrentView) -> Response:
    """The form."""
    return view.render("login.html.j2")


@PAGE.post("/login")
async def log_in(view: CurrentView, password: Annotated[str, Form()] = "") -> Response:
    """A session for whoever knows the password."""
    # One at a time, and slowly where it is wrong: whoever tries many gets nowhere.
    async with _turn:
        if not view.studio.access.knows(password):
            await asyncio.sleep(SECONDS_BEHIND_A_WRONG_ONE)
            return view.refuse(403, view.t("login.wrong"))
    response = view.go("/")
    response.set_cookie(SESSION_COOKIE, view.studio.access.session, httponly=True, samesite="strict")
    return response
