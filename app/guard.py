"""Who may talk to the page: its own address, its own origin, whoever has logged in, in moderation.

Gradio answers any Host, does not check the Origin of writes, fetches addresses that a visitor
names, reads requests of any length, lets a password be guessed as fast as it can answer, asks for
the login on most of its routes but not on all, and tells all inputs with their choices (names of
runs and files) in its login page. On a machine where a browser is open, any web site could then
train, read and delete through that browser. One ASGI middleware in front of everything closes this:

    Host      must be a name of this machine (a web site could rebind its own name to 127.0.0.1)
    Origin    where the browser sends one, it must be the page's own
    /file=…   never an address
    login     where there is one, nothing is told before it, and the page that asks is our own
    guesses   at its password: no more than MAX_GUESSES wrong ones in GUESSING_TIME, from all people
    length    no more than an upload may have, and far less where nothing is uploaded
    answers   carry a Content-Security-Policy, so that nothing is loaded from anywhere else
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ANY_ADDRESS = ("0.0.0.0", "::")
MAX_BODY = 4_000_000
"""Bytes of a request that uploads nothing; the longest conversation has a tenth of that."""
UPLOAD = "/gradio_api/upload"
MAX_GUESSES = 30
"""Logins that may fail within GUESSING_TIME, whoever tries."""
GUESSING_TIME = 60.0
"""Seconds."""

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_AROUND_A_FILE = 100_000  # bytes of a form's boundaries and names
_HOST = re.compile(r"(?:\[([\da-f:.]+)\]|([\w.-]+))(?::\d{1,5})?", re.ASCII | re.IGNORECASE)
_OPEN = ("/login", "/login/", "/logout", "/favicon.ico", "/gradio_api/startup-events")
"""What needs no login; the last one is what Gradio asks of itself when it starts."""
_LOGIN_PAGE = Path(__file__).parent / "static" / "login.html"
_HEADERS = {
    # Gradio's own front end makes functions of its templates, and styles elements in place.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "connect-src 'self' data: blob:; worker-src 'self' blob:; media-src 'self' data: blob:; "
        "frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}

logger = logging.getLogger(__name__)


class Guard:
    """The middleware.

    Args:
        app: what it stands before.
        host: the address that the server binds.
        names: further names under which the page may be asked for, such as a proxy's.
        max_upload: bytes of the largest file.
    """

    def __init__(
        self, app: ASGIApp, host: str, names: Sequence[str] = (), max_upload: int = MAX_BODY
    ):
        self._app = app
        self._any_address = _canonical(host.strip("[]")) in ANY_ADDRESS
        self._longest_upload = max_upload + _AROUND_A_FILE
        own = socket.gethostname() if self._any_address else host.strip("[]")
        self._names = {_canonical(name) for name in (*LOOPBACK, own)} | {*map(_name_of, names)}
        self._guesses: deque[float] = deque(maxlen=MAX_GUESSES)  # when; none after a success

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or refuses it with one sentence."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        instead = self._instead(scope)
        if instead and scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        send = _with_headers(send)
        if instead:
            if instead.status_code == 413:  # else its sender would hear of a broken connection
                while (await receive()).get("more_body"):
                    pass
            await instead(scope, receive, send)
            return
        if _is_guess(scope):
            # Counted before it is answered: else hundreds, sent at once, would all come through.
            self._guesses.append(monotonic())
            send = self._forgetting(send)
        try:
            await self._app(scope, receive, send)
        except Exception:  # it has been answered with 500; the connection need not end for it
            logger.exception("a request failed")

    def _instead(self, scope: Scope) -> Response | None:
        """What is answered instead of the page; None where nothing is wrong."""
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if len(headers.getlist("host")) > 1 or not self._is_own(host):
            return _sentence(
                421,
                "This page does not go by that name: open it under its own address, or start it "
                "with --name.",
            )
        if _is_foreign(scope, headers, host):
            return _sentence(403, "Another web site may not use this page.")
        if names_an_address(path):
            return _sentence(403, "This page fetches nothing from other addresses.")
        if path not in _OPEN and not is_logged_in(HTTPConnection(scope)):
            return _login_page() if path == "/" else _sentence(401, "Log in first.")
        if "transfer-encoding" in headers:
            return _sentence(411, "Say how long the request is: send a Content-Length.")
        longest = self._longest_upload if path == UPLOAD else MAX_BODY
        if not _is_within(headers.get("content-length", "0"), longest):
            return _sentence(413, f"This page takes no more than {longest:,} bytes at once.")
        if _is_guess(scope) and self._are_too_many():
            return _sentence(429, "Too many logins have failed: wait a minute, then try again.")
        return None

    def _are_too_many(self) -> bool:
        guesses = self._guesses
        return len(guesses) == MAX_GUESSES and monotonic() - guesses[0] < GUESSING_TIME

    def _forgetting(self, send: Send) -> Send:
        """Sends on, and forgets the failed guesses where the answer is a success."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self._guesses.clear()
            await send(message)

        return sending

    def _is_own(self, host: str) -> bool:
        name = _name_of(host)
        if self._any_address and _is_ip(name):  # a number cannot be rebound
            return True
        return name != "" and name in self._names


def is_logged_in(request: HTTPConnection) -> bool:
    """Whether the page asks for no login, or this browser has one."""
    app: Any = request.app  # gradio.routes.App
    if app.auth is None:
        return True
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return any(request.cookies.get(name) in app.tokens for name in names)


def names_an_address(path: str) -> bool:
    """Whether a request's path asks the server to fetch something from elsewhere."""
    path = unquote(unquote(path)).lower()
    return "proxy=" in path or re.search(r"file[=/]+\s*[a-z][a-z0-9+.-]*:", path) is not None


def _sentence(status: int, text: str) -> Response:
    return PlainTextResponse(f"{text}\n", status)


def _login_page() -> Response:
    text = _LOGIN_PAGE.read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"cache-control": "no-store"})


def _is_foreign(scope: Scope, headers: Headers, host: str) -> bool:
    """Whether another web site sends this; browsers tell, other programs need not."""
    if any(_origin_host(origin) != host.lower() for origin in headers.getlist("origin")):
        return True
    from_elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
    return from_elsewhere and not _is_visit(scope, headers)


def _is_visit(scope: Scope, headers: Headers) -> bool:
    """A person who follows a link to the page; it leads to no other route."""
    return (
        scope.get("method") in _SAFE_METHODS
        and scope["path"] == "/"
        and headers.get("sec-fetch-mode") == "navigate"
    )


def _origin_host(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _is_guess(scope: Scope) -> bool:
    return scope.get("method") == "POST" and scope["path"].rstrip("/") == "/login"


def _is_within(length: str, most: int) -> bool:
    return length.isdecimal() and len(length) < 20 and int(length) <= most


def _name_of(host: str) -> str:
    """The name or number in a Host header, without its port; "" where it is no such header."""
    found = _HOST.fullmatch(host)
    return _canonical(found[1] or found[2]) if found else ""


def _canonical(name: str) -> str:
    return str(ipaddress.ip_address(name)) if _is_ip(name) else name.lower().rstrip(".")


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending
