"""The application: pages are found in `pages/`, each in a file; what is wrong is said in the reader's language."""

from __future__ import annotations

import hashlib
import pkgutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from slimtune.console.failures import sentence_of
from slimtune.errors import ConfigError, SlimtuneError
from slimtune.studio import figures, texts
from slimtune.studio.history import NoSuchRunError
from slimtune.studio.jobs import Jobs
from slimtune.studio.security import Access, Guard
from slimtune.studio.view import Page, Studio, View

HERE = Path(__file__).parent
_REASONS = {404: "refused.missing", 405: "refused.method", 413: "refused.size"}


def build_app(folder: Path, access: Access | None = None) -> FastAPI:
    """The application over a folder of runs, which is made if it isn't there. Raises: ConfigError."""
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder of runs {folder} can't be made: {error.strerror}; choose another") from error
    pages = find_pages()
    access = replace(access or Access(), upload_paths=frozenset(path for page in pages for path in page.uploads))
    studio = Studio(folder, Jobs(folder), access, pages, _templates(), texts.load())
    app = FastAPI(title="slimtune studio", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.studio = studio
    for page in pages:
        app.include_router(page)
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    app.add_exception_handler(SlimtuneError, _on_mistake)
    app.add_exception_handler(OSError, _on_mistake)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(ClientDisconnect, _on_gone)

    def refuse(request: Request, status: int, reason: str) -> Response:
        return _refused(app, request, status, reason)

    app.add_middleware(Guard, access=access, refuse=refuse)
    return app


def find_pages() -> tuple[Page, ...]:
    """The pages: `PAGE` of each file in `pages/`, those of the navigation first and in its order."""
    names = [module.name for module in pkgutil.iter_modules([str(HERE / "pages")])]
    pages = [import_module(f"slimtune.studio.pages.{name}").PAGE for name in names]
    return tuple(sorted(pages, key=lambda page: (page.order is None, page.order)))


def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("slimtune.studio"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # A template that is replaced under a running server is read at its next start.
        auto_reload=False,
    )
    environment.filters |= figures.FILTERS
    # In the addresses of static files: what a browser has kept of another version is of no use.
    environment.globals["version"] = _digest(HERE / "static")
    return environment


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _refused(app: FastAPI, request: Request, status: int, key: str) -> Response:
    request.scope["app"] = app
    # Whoever is refused here may be anybody, and the token is for our own pages alone.
    view = View(request, is_stranger=True)
    return view.refuse(status, view.t(key))


async def _on_mistake(request: Request, error: Exception) -> Response:
    status = 404 if isinstance(error, NoSuchRunError) else 422
    return View(request).refuse(status, sentence_of(error) or str(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    view = View(request)
    return view.refuse(error.status_code, view.t(_REASONS.get(error.status_code, "refused.form")))


async def _on_invalid(request: Request, error: Exception) -> Response:
    view = View(request)
    return view.refuse(422, view.t("refused.form"))


async def _on_gone(request: Request, error: Exception) -> Response:
    # The browser took its request back, as at each key that follows another; nobody reads this.
    return Response(status_code=499)
