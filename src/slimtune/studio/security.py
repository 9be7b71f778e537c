"""What every request passes before a page sees it: its host, its origin, its token, its password, the size of its body.

A browser with the studio open also shows other sites. None of them may read a page of the studio (the Host header is
checked, so that a name that is made to point here is of no use), or have it do something (what changes anything needs
the same origin and a token that only our pages have). All that a page loads comes from here, and it holds no script.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request, cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slimtune.errors import ConfigError
from slimtune.serve.address import is_loopback

TOKEN_HEADER = "x-csrf-token"
SESSION_COOKIE = "slimtune-studio"
MAX_FORM = 1_000_000
"""Bytes of a body that is no upload."""
MAX_UPLOAD = 2**31
SHORTEST_PASSWORD = 8
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_OPEN_PATHS = ("/login", "/static/")
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    # Not "no-referrer": with it, browsers send no origin along with our own requests.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every response that doesn't set them itself."""


@dataclass(frozen=True)
class Access:
    """Who may use the studio.

    Attributes:
        password: None for whoever reaches it.
        is_local: whether it listens to this machine alone.
        token: what a request must have that changes something; new with each start.
        upload_paths: paths that take files.
    """

    password: str | None = None
    is_local: bool = True
    max_upload: int = MAX_UPLOAD
    upload_paths: frozenset[str] = frozenset()
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    @property
    def session(self) -> str:
        """The cookie of whoever knew the password."""
        return hmac.new(self.secret, b"session", hashlib.sha256).hexdigest()

    def knows(self, password: str) -> bool:
        """Whether this is the password."""
        return self.password is not None and hmac.compare_digest(password.encode(), self.password.encode())

    def has_session(self, cookie: str | None) -> bool:
        """Whether a request comes from somebody who gave the password, or none is needed."""
        return self.password is None or hmac.compare_digest((cookie or "").encode(), self.session.encode())

    def max_body(self, path: str) -> int:
        """Bytes that the body of a request may have."""
        return self.max_upload if path in self.upload_paths else MAX_FORM


def check_host(host: str, password: str | None) -> None:
    """Raises: ConfigError, where everybody on a network could use the studio."""
    if password is None and not is_loopback(host):
        raise ConfigError(
            f"without a password, a studio on {host} would let everybody who reaches it train and delete; pass "
            "--password-file FILE, or --host 127.0.0.1"
        )


def read_password(path: Path) -> str:
    """The first line of a file. Raises: ConfigError, for one that can't be read or is too short."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the password file {path} can't be read: {getattr(error, 'strerror', None) or error}; write a password "
            "into its first line"
        ) from error
    password = lines[0].strip() if lines else ""
    if len(password) < SHORTEST_PASSWORD:
        raise ConfigError(
            f"the password in {path} has {len(password)} characters; write one of at least {SHORTEST_PASSWORD} into "
            "its first line"
        )
    return password


class Refusal(Protocol):
    """Shows why a request is refused: the status, and the key of the text."""

    def __call__(self, request: Request, status: int, reason: str) -> Response: ...


class Guard:
    """Lets a request in, or answers it with the reason; sets the headers of every response."""

    def __init__(self, app: ASGIApp, access: Access, refuse: Refusal) -> None:
        self.app, self.access, self.refuse = app, access, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        is_answered = False

        async def send_on(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                is_answered = True
                headers = MutableHeaders(scope=message)
                if scope["path"].startswith("/static/"):
                    # Kept by the browser, which asks each time whether it is still the same.
                    headers.setdefault("cache-control", "no-cache")
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = self._refused(Request(scope))
        if refused is not None:
            await refused(scope, receive, send_on)
            return
        try:
            await self.app(scope, _bounded(receive, self.access.max_body(scope["path"])), send_on)
        except Exception:
            # Here, so that a failure has the headers of every other answer; its traceback goes to the log.
            if not is_answered:
                await self.refuse(Request(scope), 500, "refused.failed")(scope, receive, send_on)
            raise

    def _refused(self, request: Request) -> Response | None:
        headers, path = request.headers, request.url.path
        # A page of another site must not reach the studio through a name that it lets point here.
        if self.access.is_local and _host_name(headers) not in _LOCAL_NAMES:
            return self.refuse(request, 403, "refused.host")
        declared = headers.get("content-length", "0")
        if not declared.isdigit() or int(declared) > self.access.max_body(path):
            return self.refuse(request, 413, "refused.size")
        if request.method not in _SAFE_METHODS:
            if not _is_same_origin(headers):
                return self.refuse(request, 403, "refused.origin")
            if not hmac.compare_digest(headers.get(TOKEN_HEADER, "").encode(), self.access.token.encode()):
                return self.refuse(request, 403, "refused.token")
        cookie = cookie_parser(headers.get("cookie", "")).get(SESSION_COOKIE)
        if not path.startswith(_OPEN_PATHS) and not self.access.has_session(cookie):
            if request.method == "GET" and "hx-request" not in headers:
                return RedirectResponse("/login", 303)
            return self.refuse(request, 401, "refused.session")
        return None


def _host_name(headers: Headers) -> str:
    host = headers.get("host", "").lower()
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _is_same_origin(headers: Headers) -> bool:
    """Whether a browser says that the request comes from a page of ours; other programs may say nothing."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    # Behind a proxy that speaks TLS the scheme differs, and the host doesn't.
    return origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()


def _bounded(receive: Receive, most: int) -> Receive:
    """A `receive` that counts: a body that comes in chunks declares no length."""
    size = 0

    async def bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            raise HTTPException(413)
        return message

    return bounded
