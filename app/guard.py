"""Who may talk to the page: its own address, its own origin, and nothing fetched for strangers.

Gradio answers any Host, does not check the Origin of writes, and fetches addresses that a visitor
names. On a machine where a browser is open, any web site could then train, read and delete through
that browser. One ASGI middleware in front of everything closes this:

    Host      must be a name of this machine (else a web site could rebind its own to 127.0.0.1)
    Origin    where the browser sends one, it must be the page's own
    /file=…   never an address
    answers   carry a Content-Security-Policy, so that nothing is loaded from anywhere else
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ANY_ADDRESS = ("0.0.0.0", "::")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_HEADERS = {
    # Gradio's own front end makes functions of its templates, and styles elements in place.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "connect-src 'self' data: blob:; worker-src 'self' blob:; media-src 'self' data: blob:; "
        "frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    """The middleware.

    Args:
        app: what it stands before.
        host: the address that the server binds.
        names: further names under which the page may be asked for, such as a proxy's.
    """

    def __init__(self, app: ASGIApp, host: str, names: Sequence[str] = ()):
        self._app = app
        self._any_address = host in ANY_ADDRESS
        own = (socket.gethostname(), socket.getfqdn()) if self._any_address else (host,)
        self._names = {name.lower().rstrip(".") for name in (*LOOPBACK, *own, *names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or refuses it with one sentence."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal:
            status, sentence = refusal
            await PlainTextResponse(f"{sentence}\n", status)(scope, receive, send)
            return
        await self._app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_own(host):
            return 421, "This page does not go by that name: open it under its own address."
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "Another web site may not use this page."
        foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if foreign and not _is_navigation(scope, headers):
            return 403, "Another web site may not use this page."
        if names_an_address(scope["path"]):
            return 403, "This page fetches nothing from other addresses."
        return None

    def _is_own(self, host: str) -> bool:
        name = _name_of(host)
        if name in self._names:
            return True
        return self._any_address and _is_ip(name)  # a number cannot be rebound


def names_an_address(path: str) -> bool:
    """Whether a request's path asks the server to fetch something from elsewhere."""
    path = unquote(unquote(path)).lower()
    return "proxy=" in path or re.search(r"file[=/]+\s*[a-z][a-z0-9+.-]*:", path) is not None


def _is_navigation(scope: Scope, headers: Headers) -> bool:
    """A person who follows a link to here."""
    return scope.get("method") in _SAFE_METHODS and headers.get("sec-fetch-mode") == "navigate"


def _name_of(host: str) -> str:
    """The name or number in a Host header, without its port; "" where it is no such header."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


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
