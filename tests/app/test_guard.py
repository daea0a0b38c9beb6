"""The guard: by itself over a plain application, then before the real page."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from serving import Server, serving

from app.guard import MAX_BODY, UPLOAD, Guard, names_an_address

OWN = "127.0.0.1:7860"
CROSS = {"sec-fetch-site": "cross-site"}
SAME_SITE = {"sec-fetch-site": "same-site"}
NAVIGATES = {"sec-fetch-mode": "navigate"}
PROTECTIONS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


# -- the guard by itself --


async def served(scope: Any, receive: Any, send: Any) -> None:
    """The application behind the guard: reads what it is sent, then answers."""
    assert scope["type"] == "http"
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
    await send({"type": "http.response.body", "body": b"secret"})


def ask(
    headers: dict[str, str] | list[tuple[str, str]],
    path: str = "/config",
    method: str = "GET",
    *,
    guard: Guard | None = None,
    login: Any = None,
    kind: str = "http",
    body: list[bytes] | None = None,
) -> tuple[int, dict[str, str], str]:
    """Status (0 for a closed web socket), headers and text of the answer."""
    pairs = list(headers.items()) if isinstance(headers, dict) else headers
    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in pairs],
        "app": login or SimpleNamespace(auth=None),
    }
    pieces = body or [b""]
    inbox = [
        {"type": "http.request", "body": piece, "more_body": place < len(pieces) - 1}
        for place, piece in enumerate(pieces)
    ]
    sent: list[dict] = []

    async def receive() -> dict:
        return inbox.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run((guard or Guard(served, "127.0.0.1"))(scope, receive, send))
    if kind == "websocket":
        return 0, {}, str(sent)
    start = sent[0]
    text = b"".join(message["body"] for message in sent[1:]).decode()
    return start["status"], {k.decode(): v.decode() for k, v in start["headers"]}, text


@pytest.mark.parametrize(
    "host", [OWN, "127.0.0.1", "localhost:7860", "LOCALHOST", "localhost.:80", "[::1]:7860"]
)
def test_the_page_answers_under_names_of_this_machine(host):
    assert ask({"host": host})[2] == "secret"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:7860",
        "127.0.0.1.evil.example",
        "evil.example#127.0.0.1",
        "127.0.0.1@evil.example",
        "evil.example@127.0.0.1:7860",
        "localhost.evil.example",
        "192.168.1.5:7860",
        "0.0.0.0:7860",
        "2130706433",  # 127.0.0.1 as one number
        "[::1",
        "[::2]:7860",
        "127.0.0.1:7860:80",
        "127.0.0.1:999999",
        "127.0.0.1:x",
        "127.0.0.1, evil.example",
        "\xe9vil",
        " ",
        "",
    ],
)
def test_another_host_is_refused_as_a_rebound_name_would_be(host):
    status, _, text = ask({"host": host})
    assert (status, text.count("\n")) == (421, 1)
    assert "secret" not in text


def test_no_host_or_two_are_refused():
    assert ask({})[0] == 421
    assert ask([("host", OWN), ("host", "evil.example")])[0] == 421
    assert ask([("host", OWN), ("host", OWN)])[0] == 421


def test_on_every_address_numbers_and_given_names_are_own_but_no_others():
    guard = Guard(served, "0.0.0.0", ["Page.Example", "proxy.example:8443", "m\xfcnchen.example"])
    for host in ("192.168.1.5:7860", "[fe80::1]:80", "page.example", "proxy.example:1", OWN):
        assert ask({"host": host}, guard=guard)[0] == 200, host
    for host in ("evil.example", "", "[", "m\xfcnchen.example", "192.168.1.5.evil.example"):
        assert ask({"host": host}, guard=guard)[0] == 421, host


@pytest.mark.parametrize("host", ["::1", "[::1]", "0:0:0:0:0:0:0:1"])
def test_an_ipv6_address_may_be_written_as_one_likes(host):
    assert ask({"host": "[::1]:7860"}, guard=Guard(served, host))[0] == 200


@pytest.mark.parametrize(
    "origin", [f"http://{OWN}", f"HTTP://{OWN}", f"https://{OWN}"], ids=lambda o: o[:6]
)
def test_the_pages_own_origin_may_write(origin):
    assert ask({"host": OWN, "origin": origin}, method="POST")[0] == 200


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS", "HEAD", "DELETE"])
@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "http://evil.example",
        "http://127.0.0.1:8888",  # another program of this machine
        "http://127.0.0.1",
        "http://localhost:7860",
        "http://127.0.0.1:7860.evil.example",
        "http://127.0.0.1:7860@evil.example",
        "http://evil.example/127.0.0.1:7860",
        "http://[evil",
        "chrome-extension://127.0.0.1:7860.x",
        "127.0.0.1:7860",
    ],
)
def test_another_origin_may_not_even_ask(origin, method):
    status, _, text = ask({"host": OWN, "origin": origin}, method=method)
    assert (status, text) == (403, "Another web site may not use this page.\n")


def test_of_two_origins_the_foreign_one_counts():
    assert ask([("host", OWN), ("origin", f"http://{OWN}"), ("origin", "null")])[0] == 403


@pytest.mark.parametrize(
    ("headers", "path", "method", "status"),
    [
        ({"sec-fetch-site": "none", **NAVIGATES}, "/config", "GET", 200),
        ({"sec-fetch-site": "same-origin"}, "/config", "POST", 200),
        ({**CROSS, **NAVIGATES}, "/", "GET", 200),  # a link to the page
        ({**SAME_SITE, **NAVIGATES}, "/", "HEAD", 200),
        ({**CROSS, **NAVIGATES}, "/", "POST", 403),  # a form that sends itself
        ({**CROSS, **NAVIGATES}, "/logout", "GET", 403),
        ({**CROSS, **NAVIGATES}, "/gradio_api/file=/tmp/x", "GET", 403),
        ({**CROSS, **NAVIGATES}, "//", "GET", 403),
        ({**CROSS, "sec-fetch-mode": "no-cors"}, "/", "GET", 403),
        ({**CROSS, "sec-fetch-mode": "cors"}, "/config", "GET", 403),
        ({**CROSS}, "/live", "GET", 403),
        ({**SAME_SITE}, "/live", "GET", 403),
        ({**SAME_SITE, "sec-fetch-mode": "websocket"}, "/live", "GET", 403),
    ],
)
def test_other_sites_may_lead_to_the_page_and_nothing_else(headers, path, method, status):
    assert ask({"host": OWN, **headers}, path, method)[0] == status


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://evil.example/x",
        "/gradio_api/file=HTTPS://evil.example/x",
        "/gradio_api/file= http://evil.example/x",
        "/gradio_api/file=\thttp://evil.example/x",
        "/gradio_api/file/http://evil.example/x",
        "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/file=%68ttp://evil.example",
        "/gradio_api/file=%2568ttp://evil.example",
        "/gradio_api/FILE=gopher://x",
        "/gradio_api/proxy=http://evil.example",
        "/gradio_api/PROXY=x",
        "/gradio_api/%70roxy=x",
    ],
)
def test_paths_that_name_an_address_are_refused(path):
    assert names_an_address(path)
    assert ask({"host": OWN}, path)[0] == 403


@pytest.mark.parametrize(
    "path", ["/", "/config", "/gradio_api/file=/tmp/a/profile.jsonl", "/gradio_api/file=/tmp/1:2"]
)
def test_paths_of_files_are_left_to_gradio(path):
    assert not names_an_address(path)


@pytest.mark.parametrize(
    ("headers", "path"),
    [
        ({"host": OWN}, "/"),
        ({"host": "evil.example"}, "/"),
        ({"host": OWN, "origin": "null"}, "/"),
        ({"host": OWN}, "/gradio_api/proxy=x"),
        ({"host": OWN, "content-length": "9" * 12}, "/"),
    ],
)
def test_every_answer_protects_itself(headers, path):
    _, given, _ = ask(headers, path, body=[b""])
    assert PROTECTIONS.items() <= given.items()
    policy = dict(
        part.strip().split(" ", 1) for part in given["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["object-src"] == policy["frame-src"] == "'none'"
    assert "http" not in given["content-security-policy"]


def test_what_the_application_says_of_itself_stays():
    async def own(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"x-frame-options", b"SAMEORIGIN")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    _, headers, _ = ask({"host": OWN}, guard=Guard(own, "127.0.0.1"))
    assert headers["x-frame-options"] == "SAMEORIGIN"


def test_a_web_socket_of_strangers_is_closed_unanswered():
    _, _, sent = ask({"host": OWN, "origin": "http://evil.example"}, kind="websocket")
    assert sent == "[{'type': 'websocket.close', 'code': 1008}]"


def test_what_is_no_request_passes():
    seen = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(Guard(inner, "127.0.0.1")({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


def test_a_failure_behind_the_guard_ends_with_its_request(caplog):
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"Internal Server Error"})
        raise KeyError("a bug")

    with caplog.at_level(logging.ERROR):
        status, headers, _ = ask({"host": OWN}, guard=Guard(failing, "127.0.0.1"))
    assert status == 500
    assert headers["x-frame-options"] == "DENY"
    assert "a bug" in caplog.text


@pytest.mark.parametrize(
    ("path", "length", "status"),
    [
        ("/gradio_api/queue/join", str(MAX_BODY), 200),
        ("/gradio_api/queue/join", str(MAX_BODY + 1), 413),
        ("/gradio_api/queue/join", "9" * 5000, 413),
        ("/gradio_api/queue/join", "-1", 413),
        ("/gradio_api/queue/join", "x", 413),
        (UPLOAD, str(MAX_BODY + 1), 200),
        (UPLOAD, "20000000", 200),
        (UPLOAD, "20200000", 413),
        (UPLOAD + "/", "20000000", 413),
        ("/gradio_api/process_recording", "20000000", 413),
    ],
)
def test_requests_have_a_longest_length(path, length, status):
    guard = Guard(served, "127.0.0.1", max_upload=20_000_000)
    headers = {"host": OWN, "content-length": length}
    answered, _, text = ask(headers, path, "POST", guard=guard, body=[b"x" * 100] * 50)
    assert answered == status
    assert text.count("\n") == (status == 413)
    assert (text == "secret") == (status == 200)


def test_a_request_that_does_not_say_its_length_is_refused():
    headers = {"host": OWN, "transfer-encoding": "chunked"}
    assert ask(headers, "/gradio_api/queue/join", "POST")[0] == 411


LOGIN = SimpleNamespace(auth={"u": "p"}, cookie_id="abc", tokens={"t0ken": "u"})


@pytest.mark.parametrize(
    "cookie",
    [
        "access-token-abc=t0ken",
        "access-token-unsecure-abc=t0ken",
        "x=1; access-token-unsecure-abc=t0ken",
    ],
)
def test_who_has_logged_in_gets_everything(cookie):
    assert ask({"host": OWN, "cookie": cookie}, login=LOGIN)[0] == 200


@pytest.mark.parametrize(
    "cookie",
    [
        None,
        "",
        "access-token-abc=",
        "access-token-abc=other",
        "access-token-other=t0ken",
        "access-token-abc=None",
        "=t0ken",
        "\xff\xfe=;;;",
    ],
)
@pytest.mark.parametrize(
    "path",
    [
        "/config",
        "/live",
        "/openapi.json",
        "/theme.css",
        "/assets/index.js",
        "/gradio_api/heartbeat/x",
        "/gradio_api/cancel",
        "/gradio_api/user",
        "/gradio_api/custom_component/a/client/b/c",
        "//",
        "/login/x",
        "/loginx",
        "/login\n",
        "/static/../login",
        "/gradio_api/startup-events/",
    ],
)
def test_others_get_the_login_and_nothing_behind_it(path, cookie):
    headers = {"host": OWN} | ({"cookie": cookie} if cookie is not None else {})
    status, _, text = ask(headers, path, login=LOGIN)
    assert (status, text) == (401, "Log in first.\n")


@pytest.mark.parametrize("path", ["/login", "/login/", "/logout", "/favicon.ico"])
def test_the_login_itself_needs_none(path):
    assert ask({"host": OWN}, path, login=LOGIN)[2] == "secret"


class Clock:
    """A login that answers with `status`, behind a guard whose time is `now`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.status, self.reached = 1000.0, 400, 0
        self.guard = Guard(self.answer, "127.0.0.1")
        monkeypatch.setattr("app.guard.monotonic", lambda: self.now)

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached += 1
        await asyncio.sleep(0)  # others come meanwhile
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def guess(self, path: str = "/login", method: str = "POST", **headers: str) -> int:
        return ask({"host": OWN, **headers}, path, method, guard=self.guard, login=LOGIN)[0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr("app.guard.MAX_GUESSES", 5)
    return Clock(monkeypatch)


@pytest.mark.parametrize("wrong", [400, 401, 422, 500])
def test_after_five_wrong_passwords_nobody_guesses_until_the_minute_is_over(clock, wrong):
    clock.status = wrong
    for path in ("/login", "/login/", "/login", "/login/", "/login"):
        assert clock.guess(path) == wrong
        clock.now += 2
    clock.status = 200
    assert clock.guess() == clock.guess("/login/") == 429
    clock.now = 1059.9
    assert clock.guess() == 429
    assert clock.reached == 5
    clock.now = 1060.0
    assert clock.guess() == 200


def test_a_refused_guess_gets_one_sentence_and_protects_itself(clock):
    for _ in range(5):
        clock.guess()
    status, headers, text = ask({"host": OWN}, "/login", "POST", guard=clock.guard, login=LOGIN)
    expected = "Too many logins have failed: wait a minute, then try again.\n"
    assert (status, text) == (429, expected)
    assert PROTECTIONS.items() <= headers.items()


def test_refused_guesses_do_not_make_the_wait_longer(clock):
    for _ in range(5):
        clock.guess()
    for _ in range(59):
        clock.now += 1
        assert clock.guess() == 429
    clock.now += 1
    assert clock.guess() == 400


def test_slow_guesses_and_those_before_a_success_do_not_count(clock):
    for _ in range(20):
        assert clock.guess() == 400
        clock.now += 12
    clock.now += 60
    for status in (400, 400, 400, 400, 200, 400, 400, 400, 400, 302, 400, 400, 400, 400, 400):
        clock.status = status
        assert clock.guess() == status
    assert clock.guess() == 429


def test_guesses_that_are_sent_at_once_count_before_they_are_answered(clock):
    async def one() -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/login", "app": LOGIN}
        await clock.guard(scope | {"headers": [(b"host", OWN.encode())]}, None, send)
        return sent[0]["status"]

    async def all_at_once() -> list[int]:
        return await asyncio.gather(*(one() for _ in range(200)))

    assert asyncio.run(all_at_once()) == [400] * 5 + [429] * 195
    assert clock.reached == 5


def test_only_logins_that_reach_the_page_count_and_only_they_are_refused(clock):
    for _ in range(9):
        assert clock.guess("/login", "GET") == 400
        assert clock.guess("/logout") == 400
        assert clock.guess(origin="http://evil.example") == 403  # it can't lock a person out
        assert clock.guess(host="evil.example") == 421
    for _ in range(5):
        assert clock.guess() == 400
    assert clock.guess("/login", "GET") == 400
    assert clock.guess("/config", cookie="access-token-abc=t0ken") == 400
    assert clock.guess(origin="http://evil.example") == 403
    assert clock.guess() == 429


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_who_has_not_logged_in_is_asked_to_by_our_own_page(method):
    status, headers, text = ask({"host": OWN}, "/", method, login=LOGIN)
    assert (status, headers["cache-control"]) == (200, "no-store")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "secret" not in text
    assert 'type="password"' in text
    assert "http" not in text  # it needs nothing of other addresses


# -- before the real page --


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server, with a file in each folder that nobody may fetch."""
    folder = tmp_path_factory.mktemp("guarded")
    for place in ("runs/one", "data", "models"):
        (folder / place).mkdir(parents=True)
        (folder / place / "kept.json").write_text("TOP SECRET")
    with serving(folder, folder / "models", "--max-upload-mb", "1") as server:
        yield server


def request(
    page: Server, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """A raw request: the path goes out as it is written."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named.setdefault("host", f"127.0.0.1:{page.port}")
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in named.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("content-length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        is_stream = "event-stream" in (answer.getheader("content-type") or "")
        text = b"" if is_stream else answer.read()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, text
    finally:
        connection.close()


FORM = (
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.csv"\r\n\r\nhi\r\n--x--\r\n'
)
MULTIPART = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/", None),
        ("GET", "/config", None),
        ("GET", "/gradio_api/info", None),
        ("GET", "/live?run=one", None),
        ("GET", "/theme.css", None),
        ("GET", "/gradio_api/queue/data?session_hash=x", None),
        ("GET", "/gradio_api/heartbeat/x", None),
        ("POST", UPLOAD, FORM),
        ("POST", "/gradio_api/queue/join", b'{"data": [], "fn_index": 0, "session_hash": "x"}'),
        ("POST", "/gradio_api/run/stop", b'{"data": ["one"]}'),
        ("POST", "/gradio_api/call/stop", b'{"data": ["one"]}'),
        ("POST", "/login", b"username=a&password=b"),
        ("POST", "/gradio_api/cancel", b"{}"),
        ("OPTIONS", "/gradio_api/queue/join", None),
    ],
)
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "evil.example:7860", "origin": "http://evil.example:7860"}, 421),
        ({"origin": "null"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "cors"}, 403),
    ],
    ids=["host", "rebound", "null", "origin", "port", "fetch"],
)
def test_no_route_serves_another_site(page, method, path, body, headers, status):
    kind = MULTIPART if path == UPLOAD else "application/json"
    asks_first = {"access_control_request_method": "POST"} if method == "OPTIONS" else {}
    got, given, text = request(page, path, method, body, content_type=kind, **asks_first, **headers)
    assert got == status
    assert text.count(b"\n") == 1
    assert "access-control-allow-origin" not in given
    assert "frame-ancestors 'none'" in given["content-security-policy"]


def test_an_upload_of_another_site_leaves_nothing(page):
    before = sorted(page.folder.rglob("*"))
    request(page, UPLOAD, "POST", FORM, content_type=MULTIPART, origin="http://evil.example")
    assert sorted(page.folder.rglob("*")) == before


SECRETS = [
    "/etc/passwd",
    "{folder}/runs/one/kept.json",
    "{folder}/data/kept.json",
    "{folder}/models/kept.json",
    "{folder}/server.log",
    "runs/one/kept.json",
    "README.md",
    "app/guard.py",
    ".git/config",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_no_file_of_the_server_can_be_fetched(page, secret):
    path = secret.format(folder=page.folder)
    ways = [
        f"/gradio_api/file={path}",
        f"/gradio_api/file={quote(path, safe='')}",
        f"/gradio_api/file={quote(quote(path, safe=''), safe='')}",
        f"/gradio_api/file=/{path}",
        f"/gradio_api/file=.{path}",
        f"/gradio_api/file=file://{path}",
        f"/gradio_api/file={path};.css",
        f"/gradio_api/file={path}%00.css",
        f"/gradio_api/file={path.replace('/', chr(92))}",
        f"/gradio_api/file={'../' * 20}{path}",
        f"/gradio_api/file=/tmp/..{path}",
        f"/gradio_api/file/{path}",
        f"/GRADIO_API/FILE={path}",
        f"//gradio_api/file={path}",
        f"/gradio_api//file={path}",
        f"/gradio_api;/file={path}",
        f"/file={path}",
        f"/file/{path}",
        f"/static/{'../' * 20}{path}",
        f"/static/%2e%2e/{'%2e%2e/' * 20}{path}",
        f"/assets/{'..%2f' * 20}{path}",
        f"/svelte/{path}",
        f"/gradio_api/proxy=file://{path}",
        f"/gradio_api/stream/x/y/0/{path}",
        f"/gradio_api/custom_component/textbox/client/..%2f..%2f/{quote(path, safe='')}",
        f"/?deep_link={'../' * 20}{path}",
    ]
    for way in ways:
        status, given, text = request(page, way)
        assert b"TOP SECRET" not in text, way
        assert b"root:" not in text, way
        assert status >= 400 or b"<!doctype html" in text[:300].lower(), (way, status)
        assert "frame-ancestors 'none'" in given["content-security-policy"], way


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:1/x", "https://example.com/", "HTTP://x/", "//evil.example/x", "ftp://x/y"],
)
@pytest.mark.parametrize("route", ["file=", "file/", "proxy="])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_no_address_is_fetched_for_anybody(page, route, address, method):
    for written in (address, quote(address, safe=""), quote(quote(address, safe=""), safe="")):
        status, _, text = request(page, f"/gradio_api/{route}{written}", method)
        assert status in (403, 404, 405), written
        assert b"<html" not in text.lower()
    assert "failed validation" not in page.log.read_text()  # Gradio has not even tried


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/", None, 200),
        ("HEAD", "/", None, 200),
        ("GET", "/config", None, 200),
        ("GET", "/live?run=absent", None, 404),
        ("GET", "/live?run=one&smoothing=nan", None, 404),
        ("GET", "/live?run=one&axis=time", None, 404),
        ("GET", "/absent", None, 404),
        ("DELETE", "/config", None, 405),
        ("OPTIONS", "/", None, 405),
        ("POST", "/gradio_api/queue/join", b"{", 422),
        ("POST", "/gradio_api/run/predict", b'{"data": [], "fn_index": 999999}', 500),
        ("POST", "/gradio_api/run/predict", b'{"data": []}', 500),
        ("GET", "/gradio_api/custom_component/x/client/y/z", None, 404),
        ("GET", "/gradio_api/runs", None, 404),
        ("GET", "/monitoring", None, 403),
        ("GET", "/docs", None, 404),
        ("GET", "/gradio_api/mcp/", None, 404),
        ("POST", "/gradio_api/vibe-code", b'{"code": "1"}', 403),
        ("POST", "/gradio_api/process_recording", b"x", 400),
        ("POST", UPLOAD, b"x", 400),
        ("POST", UPLOAD, b"x" * 1_200_000, 413),
        ("POST", "/gradio_api/queue/join", b"x" * (MAX_BODY + 1), 413),
    ],
)
def test_every_real_answer_protects_itself_and_tells_nothing(page, method, path, body, status):
    got, given, text = request(page, path, method, body, content_type="application/json")
    assert got == status
    assert PROTECTIONS.items() <= given.items()
    assert "frame-ancestors 'none'" in given["content-security-policy"]
    assert b"Traceback" not in text
    assert b"site-packages" not in text


def test_the_pages_own_preflight_and_writes_pass(page):
    own = f"http://127.0.0.1:{page.port}"
    asks_first = {"access_control_request_method": "POST", "origin": own}
    assert request(page, "/gradio_api/queue/join", "OPTIONS", **asks_first)[0] == 200
    status, _, text = request(
        page, UPLOAD, "POST", FORM, content_type=MULTIPART, origin=own, sec_fetch_site="same-origin"
    )
    assert status == 200
    assert json.loads(text)[0].endswith("a.csv")


def test_a_file_above_the_cap_is_refused_inside_a_form_that_is_not(page):
    form = FORM.replace(b"hi", b"x" * 1_050_000)
    status, _, text = request(page, UPLOAD, "POST", form, content_type=MULTIPART)
    assert status == 413
    assert b"maximum allowed size of 1000000 bytes" in text


def test_the_page_is_still_there(page):
    assert request(page, "/")[0] == 200
    assert Path(page.runs_dir / "one" / "kept.json").read_text() == "TOP SECRET"
