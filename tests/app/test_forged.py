"""Every endpoint of the page against a forger: whatever is sent, the answer is a sentence or
harmless, nothing outside the page's folders is opened or made, and the server lives on.

Endpoints are taken from the page itself, the private ones too, so that a new one is attacked as
soon as it exists.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest
from checkout import ROOT
from forging import forge_run
from serving import Server, serving

from app import forms

TOKEN = "hf_abcdefghijklmnop1234"
SETTINGS = {"data": {"source": "embedded:everyday"}}
META = {"_type": "gradio.FileData"}
DECOY = "DECOY-TEXT"
PAIR = '{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}\n'


@dataclass(frozen=True)
class Page:
    """A served page and what it says of itself.

    Attributes:
        server: its process.
        outside: a folder beside the page's own that nobody may touch.
        called: what it has asked of other addresses, as its proxy saw it.
    """

    server: Server
    outside: Path
    called: list[str]

    @cached_property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.server.url, trust_env=False, timeout=60)

    @cached_property
    def config(self) -> dict:
        return self.http.get("config").json()

    @cached_property
    def components(self) -> dict[int, dict]:
        return {part["id"]: part for part in self.config["components"]}

    @property
    def endpoints(self) -> list[dict]:
        """All that a client can call, by number if not by name."""
        return [dep for dep in self.config["dependencies"] if dep["backend_fn"]]

    def endpoint(self, name: str) -> dict:
        return next(dep for dep in self.endpoints if dep["api_name"] == name)

    def kinds(self, endpoint: dict) -> list[str]:
        return [self.components[number]["type"] for number in endpoint["inputs"]]

    def honest(self, endpoint: dict) -> list[Any]:
        """Inputs that are taken, with the run `one` wherever there is one to choose."""
        parts = [self.components[number]["props"] for number in endpoint["inputs"]]
        is_of_run = [["one", "one"] in (part.get("choices") or []) for part in parts]
        return [
            (["one"] if part.get("multiselect") else "one") if of_run else part.get("value")
            for part, of_run in zip(parts, is_of_run, strict=True)
        ]

    def call(self, endpoint: dict, data: list[Any], **more: Any) -> tuple[int, str]:
        """A direct call by number. A session of its own for each would cost Gradio more than all
        the rest."""
        more.setdefault("session_hash", "forger")
        body = json.dumps({"fn_index": endpoint["id"], "data": data, **more})
        answer = self.http.post("gradio_api/run/predict", content=body, headers=JSON)
        return answer.status_code, answer.text

    def queue(self, endpoint: dict, data: list[Any], **more: Any) -> list[dict]:
        """The messages of a call through the queue, as browsers make them."""
        session = more.setdefault("session_hash", secrets.token_hex(8))
        body = json.dumps({"fn_index": endpoint["id"], "data": data, **more})
        joined = self.http.post("gradio_api/queue/join", content=body, headers=JSON)
        assert joined.status_code == 200, joined.text
        messages = []
        query = {"session_hash": session}
        with self.http.stream("GET", "gradio_api/queue/data", params=query) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    messages.append(json.loads(line[5:]))
                    if messages[-1]["msg"] in ("process_completed", "unexpected_error"):
                        return messages
        raise AssertionError("the queue ended without an answer")

    def upload(self, name: str, content: bytes) -> Any:
        """What Gradio says of a file that was uploaded."""
        answer = self.http.post("gradio_api/upload", files={"files": (name, content)})
        assert answer.status_code == 200, answer.text
        return {"path": answer.json()[0], "orig_name": name, "meta": META}


JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("forged")
    served, outside = folder / "served", folder / "outside"
    for place in (served / "data", served / "models", outside / "model"):
        place.mkdir(parents=True)
    (served / "data" / "mine.jsonl").write_text(PAIR * 4)
    (outside / "pairs.jsonl").write_text(PAIR.replace("Why?", DECOY) * 4)
    (outside / "recipe.yaml").write_text(f"model:\n  name: {DECOY}\n")
    (outside / "model" / "config.json").write_text(json.dumps({"model_type": DECOY}))
    for name in ("one", "two"):
        forge_run(served / "runs" / name, SETTINGS, adapter=False)
    with proxy() as (address, called):
        environment = {
            **{"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"},
            **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY"), address),
        }
        options = ("--max-upload-mb", "1")
        with serving(served, served / "models", *options, environment=environment) as server:
            page = Page(server, outside, called)
            yield page
            page.http.close()


@contextlib.contextmanager
def proxy() -> Iterator[tuple[str, list[str]]]:
    """The address of a proxy that leads nowhere, and what it was asked for."""
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            with contextlib.suppress(OSError):  # it was closed
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(1)
                        asked.append(connection.recv(1000).decode(errors="replace"))

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture
def untouched(page: Page) -> Iterator[None]:
    """Afterwards nothing outside was opened, nothing inside is more or less, no other machine was
    called, and the server answers as before."""
    inside, root = tree(page.server.folder), sorted(ROOT.iterdir())
    with opened_in(page.outside, page.outside / "model") as opened:
        yield
    assert opened == []
    assert tree(page.server.folder) == inside
    assert sorted(ROOT.iterdir()) == root
    assert page.http.get("theme.css").status_code == 200
    assert page.called == []


@pytest.fixture
def unharmed(page: Page, untouched: None) -> Iterator[None]:
    """And the log tells of no bug, and nothing that is nobody's business."""
    log = page.server.log.read_text()
    yield
    said = page.server.log.read_text().removeprefix(log)
    for word in ("Traceback", TOKEN, DECOY):
        assert word not in said, said[-3000:]


def tree(folder: Path) -> dict[str, int]:
    """Files and sizes, but for the server's log and what it keeps of its own."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("server.log", ".lock") and ".jobs" not in path.parts
    }


@contextlib.contextmanager
def opened_in(*folders: Path) -> Iterator[list[str]]:
    """Names in these folders that any process opens or makes meanwhile, by the system's word."""
    libc, opened = ctypes.CDLL(None, use_errno=True), []
    queue = libc.inotify_init1(os.O_NONBLOCK)
    assert queue >= 0
    try:
        for folder in folders:  # IN_OPEN | IN_CREATE
            assert libc.inotify_add_watch(queue, os.fsencode(folder), 0x20 | 0x100) >= 0
        yield opened
        with contextlib.suppress(BlockingIOError):
            events = os.read(queue, 1 << 20)
            while events:
                *_, length = struct.unpack("iIII", events[:16])
                opened.append(events[16 : 16 + length].rstrip(b"\0").decode())
                events = events[16 + length :]
    finally:
        os.close(queue)


def test_the_watch_over_the_outside_sees_who_opens(page):
    with opened_in(page.outside) as opened:
        (page.outside / "pairs.jsonl").read_text()
    assert opened == ["pairs.jsonl"]


def forgeries(outside: Path) -> dict[str, Any]:
    """Values that no input of the page sends."""
    file, model = outside / "pairs.jsonl", outside / "model"
    paths = {
        "passwd": "/etc/passwd",
        "decoy": str(file),
        "decoy recipe": str(outside / "recipe.yaml"),
        "decoy model": str(model),
        "up": f"../../outside/{file.name}",
        "up from runs": "../../outside",
        "home": "~/.ssh/id_rsa",
        "file address": f"file://{file}",
        "address": "http://127.0.0.1:9/x.jsonl",
        "share": "\\\\host\\share\\x.jsonl",
        "nul": f"{file}\0.jsonl",
    }
    names = {
        "no choice": "no such choice",
        "empty": "",
        "hidden": ".jobs",
        "parent": "..",
        "slash": "one/two",
        "emoji": "🦊 one",
        "long": "x" * 100_000,
        "half a character": "one\ud800",
        "markup": "<img src=x onerror=alert(1)>",
    }
    kinds = {
        "null": None,
        "true": True,
        "huge": 10**400,
        "not a number": float("nan"),
        "infinite": float("inf"),
        "minus": -1.5,
        "list": [1, "one", None],
        "nested": json.loads("[" * 500 + "]" * 500),
        "dict": {"one": {"two": [1]}},
    }
    files = {
        "file": {"path": str(file), "meta": META},
        "files": [{"path": str(file), "meta": META}],
        "file without meta": {"path": str(file)},
        "file of an address": {"path": "http://127.0.0.1:9/x", "meta": META},
        "address of a file": {"path": "x", "url": "http://127.0.0.1:9/x", "meta": META},
        "file of the checkout": {"path": str(ROOT / "README.md"), "meta": META},
        "strange meta": {"path": str(file), "meta": "x"},
        "update": {"__type__": "update", "value": str(file), "choices": [str(file)]},
    }
    return paths | names | kinds | files


def check(page: Page, status: int, text: str, what: str, sent: str) -> None:
    """A harmless answer, or one calm sentence."""
    for leak in ("Traceback", 'File "/', "site-packages", "root:x:", DECOY, TOKEN):
        assert leak not in text, (what, text[:500])
    for place in (page.server.folder, page.outside, ROOT):
        if str(place) not in sent and "--runs-dir" not in text:  # the shown command has it
            assert str(place) not in text, (what, text[:500])
    assert status in (200, 500), (what, status, text[:300])
    answer = json.loads(text)
    if status == 500:
        check_sentence(answer["error"], what)


def check_sentence(error: Any, what: str) -> None:
    assert isinstance(error, str), what
    assert 10 < len(error) < 15_000, (what, error[:300])
    assert "Something went wrong" not in error, what
    assert "<img" not in error, what


FORM = [
    *("save_yaml", "summarise", "start", "will_it_fit"),
    *("margins", "measure_bertscore", "count_tokens"),
    *("plan_sweep", "start_sweep", "against_simpo"),
]


def test_every_input_of_every_endpoint_refuses_what_it_cannot_hold(page, unharmed):
    attacked = 0
    for endpoint in page.endpoints:
        honest, kinds = page.honest(endpoint), page.kinds(endpoint)
        if len(honest) > 20:
            continue  # the form: below
        for slot, kind in enumerate(kinds):
            for name, value in forgeries(page.outside).items():
                if endpoint["api_name"] == "rename" and isinstance(value, bool | float):
                    continue  # a text box makes a fine name of it
                data = unanswerable(endpoint, honest, slot)
                data[slot] = value
                status, text = page.call(endpoint, data)
                what = f"{endpoint['api_name']}[{slot}: {kind}] {name}"
                check(page, status, text, what, repr(value))
                if kind == "uploadbutton":
                    assert status == 500, what
                attacked += 1
    assert attacked > 1000


def unanswerable(endpoint: dict, honest: list[Any], slot: int) -> list[Any]:
    """Inputs that never reach a model, nor change the runs, if those in `slot` are forged."""
    data = list(honest)
    if endpoint["api_name"] == "ask":
        data[0] = ""
        if slot == 0:
            data[2] = None
    if endpoint["api_name"] == "ask_again":
        data[1] = None
    return data


def form_endpoints(page: Page) -> list[dict]:
    return [endpoint for endpoint in page.endpoints if len(endpoint["inputs"]) > 20]


def test_a_form_full_of_the_same_forgery_is_refused_by_every_endpoint(page, unharmed):
    endpoints = form_endpoints(page)
    assert {*FORM, "browse"} <= {endpoint["api_name"] for endpoint in endpoints}
    for endpoint in endpoints:
        for name, value in forgeries(page.outside).items():
            if name == "long":  # 50 of them are more than a request may have
                value = value[:10_000]
            data = [value] * len(endpoint["inputs"])
            status, text = page.call(endpoint, data)
            check(page, status, text, f"{endpoint['api_name']} {name}", repr(value))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("start", ("decoy", "dict", "null")),
        ("start_sweep", ("decoy", "dict", "null")),
        ("will_it_fit", ("decoy", "dict", "null")),
        ("summarise", ("up", "file", "huge")),
        ("margins", ("decoy model", "list")),
    ],
)
def test_every_setting_by_itself_is_refused_or_harmless(page, unharmed, name, kinds):
    endpoint = page.endpoint(name)
    honest, chosen = page.honest(endpoint), forgeries(page.outside)
    labels = [page.components[number]["props"].get("label") for number in endpoint["inputs"]]
    refusing = ("start", "start_sweep", "will_it_fit")
    for slot, label in enumerate(labels):
        for kind in kinds:
            data = list(honest)
            data[slot] = chosen[kind]
            if name in refusing and label != "model":
                data[labels.index("model")] = "/no/such/model"  # else some would be a training
            status, text = page.call(endpoint, data)
            check(page, status, text, f"{name} {label} {kind}", repr(chosen[kind]))
            if name in refusing:
                assert status == 500, (label, kind)


@pytest.mark.parametrize("card", ["voodoo2", "RTX 4090\0", "", None, 5, [["RTX 4090"]], {"a": 1}])
def test_a_card_that_is_none_is_refused(page, unharmed, card):
    endpoint = page.endpoint("will_it_fit")
    status, text = page.call(endpoint, [card, *page.honest(endpoint)[1:]])
    check(page, status, text, "will_it_fit", repr(card))
    assert status == 500


def test_settings_that_nobody_was_advised_are_not_filled_in(page, unharmed):
    status, text = page.call(page.endpoint("use_settings"), [])
    assert status == 500
    assert "ask first whether it fits" in json.loads(text)["error"]


def test_the_margin_of_data_outside_is_not_told_by_the_summary(page, unharmed):
    endpoint = page.endpoint("summarise")
    own = page.honest(endpoint)
    source = own.index("embedded:everyday")
    for path in ("decoy", "up"):
        data = list(own)
        data[source] = forgeries(page.outside)[path]
        _, margin, *_, problem, _ = json.loads(page.call(endpoint, data)[1])["data"]
        assert "reward units" not in str(margin)
        assert "be opened as data here" in problem


@pytest.mark.parametrize("route", ["report", "sweep"])
def test_the_routes_of_sweeps_answer_names_of_sweeps_alone(page, unharmed, route):
    for name, value in forgeries(page.outside).items():
        if not isinstance(value, str) or name in ("half a character", "long"):
            continue
        answer = page.http.get(route, params={"sweep": value})
        assert answer.status_code == 404, name
        assert DECOY not in answer.text
        assert answer.headers["content-type"].startswith("text/plain")
    assert page.http.get(route, params={"sweep": "one"}).status_code == 404  # a run
    assert page.http.get(route).status_code == 404
    assert page.http.post(route, params={"sweep": "one"}).status_code == 405
    elsewhere = {"origin": "http://elsewhere.example"}
    assert page.http.get(route, params={"sweep": "one"}, headers=elsewhere).status_code == 403


def by_label(page: Page, endpoint: dict, **values: Any) -> list[Any]:
    """The honest form with some inputs changed, by their keys with `__` for the dot."""
    labels = [page.components[number]["props"].get("label") for number in endpoint["inputs"]]
    data = page.honest(endpoint)
    for key, value in values.items():
        data[labels.index(forms.fields()[key.replace("__", ".")].label)] = value
    return data


def test_what_hidden_inputs_hold_does_not_matter(page, unharmed):
    endpoint = page.endpoint("summarise")
    for key in ("objective__desirable_weight", "objective__delta"):
        told = json.loads(page.call(endpoint, by_label(page, endpoint, **{key: -5.0}))[1])["data"]
        assert told[-2] == ""  # nothing is wrong
    told = json.loads(page.call(endpoint, by_label(page, endpoint, objective__beta=-5.0))[1])
    assert "objective.beta" in told["data"][-2]


@pytest.mark.parametrize(
    ("endpoint", "sent", "words"),
    [
        ("choose_name", ["ppo", "ef", "rougeL"], "not what this input holds"),
        ("choose_name", [None, "ef", "rougeL"], "objective.name"),
        ("choose_source", ["gapo", "nowhere", "rougeL"], "not what this input holds"),
        ("choose_source", ["gapo", "constant", "rougeL"], "with a constant margin it is simpo"),
        ("choose_source", ["kto", "ef", "rougeL"], "kto has no margin.source"),
        ("choose_metric", ["gapo", "ef", "bleu"], "not what this input holds"),
    ],
)
def test_a_choice_that_is_none_is_refused_in_a_sentence(page, unharmed, endpoint, sent, words):
    status, text = page.call(page.endpoint(endpoint), sent)
    check(page, status, text, endpoint, repr(sent))
    assert status == 500
    assert words in json.loads(text)["error"]


# -- through the queue, and by gradio_client --


@pytest.mark.parametrize("name", ["decoy", "half a character", "huge", "dict", "file", "nested"])
def test_the_queue_answers_a_forgery_with_a_sentence_too(page, unharmed, name):
    value = forgeries(page.outside)[name]
    for api_name in ("watch", "open_data", "browse", "overlay", "rename", "load_yaml", "refresh"):
        endpoint = page.endpoint(api_name)
        messages = page.queue(endpoint, [value] * len(endpoint["inputs"]))
        last = messages[-1]
        assert last["msg"] == "process_completed", (api_name, last)
        assert DECOY not in json.dumps(messages)
        if not last["success"]:
            check_sentence(last["output"]["error"], f"{api_name} {name}")


@pytest.mark.parametrize("place", [10**30, 2**63, 1e300, 0.5, -1])
def test_a_pair_of_any_number_is_answered(page, unharmed, place):
    endpoint = page.endpoint("browse")
    data = page.honest(endpoint)
    data[2] = place
    last = page.queue(endpoint, data)[-1]
    assert last["msg"] == "process_completed"
    if last["success"]:
        assert last["output"]["data"][0] <= 1000
    else:
        check_sentence(last["output"]["error"], str(place))


CLIENT = """
import json, sys
from gradio_client import Client
client = Client(sys.argv[1], verbose=False, httpx_kwargs={"trust_env": False})
said = {}
for name, about in client.view_api(return_format="dict")["named_endpoints"].items():
    forged = [sys.argv[2]] * len(about["parameters"])
    try:
        said[name] = [True, str(client.predict(*forged, api_name=name))]
    except Exception as error:
        said[name] = [False, str(error)]
print("\\n" + json.dumps(said))
"""


def test_a_client_hears_the_same_sentences(page, unharmed):
    command = [sys.executable, "-c", CLIENT, page.server.url, str(page.outside / "pairs.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert {"/start", "/watch", "/ask", "/upload"} <= said.keys()
    for name, (is_done, text) in said.items():
        assert DECOY not in text, name
        assert is_done or "Traceback" not in text, name
    assert not any(said[f"/{name}"][0] for name in ("start", "stop", "delete", "csv", "adapter"))


def test_a_row_that_nobody_clicked_chooses_nothing(page, untouched):
    choose = page.endpoint("choose")
    for name, value in forgeries(page.outside).items():
        for row in (value, [value]):
            event = {"index": [0, 0], "value": "x", "row_value": row}
            status, text = page.call(choose, [], event_data=event)
            check(page, status, text, f"choose {name}", repr(value))
            assert status == 500, name


def test_a_click_that_is_none_is_refused(page, untouched):
    choose = page.endpoint("choose")
    for event in (None, "x", [], {"row_value": ["one"]}, {"index": None}):
        status, text = page.call(choose, [], event_data=event, trigger_id=10**9)
        assert status == 500, event
        assert "Traceback" not in text


def test_a_row_that_is_there_is_chosen(page, unharmed):
    choose = page.endpoint("choose")
    event = {"index": [0, 0], "value": "one", "row_value": ["one", "finished"]}
    status, text = page.call(choose, [], event_data=event)
    assert (status, json.loads(text)["data"][0]["value"]) == (200, "one")


# -- what only the server knows --


FORGED_TALK = {
    "voice": "one",
    "is_run": True,
    "mode": "Blind",
    "columns": [{"side": "base", "turns": [["user", "q"], ["assistant", "a"]]}] * 2,
    "duel": "x" * 22,
    "revealed": False,
}


@pytest.mark.parametrize("state", [FORGED_TALK, [FORGED_TALK], "one", None, 5])
def test_what_is_said_in_a_chat_cannot_be_sent(page, unharmed, state):
    for choice in ("left", "right", "tie", "both_bad"):
        endpoint = page.endpoint(f"vote_{choice}")
        for data in ([], [state]):
            status, text = page.call(endpoint, data, session_hash="forger")
            assert status == 500
            assert "nothing to vote on" in json.loads(text)["error"].lower()
    again = page.endpoint("ask_again")
    for data in (page.honest(again), [*page.honest(again), state]):
        assert "othing has been asked yet" in page.call(again, data)[1]


def test_no_state_is_kept_in_the_browser_or_by_a_connection(page):
    config = page.http.get("config").json()
    assert not any(part["type"] == "state" for part in config["components"])
    assert config["connect_heartbeat"] is False


@pytest.mark.parametrize("known", [None, "", "x", "x y", [["one"]], 5, {"a": 1}])
def test_the_known_rows_of_the_table_are_only_compared(page, unharmed, known):
    refresh = page.endpoint("refresh")
    answer = json.loads(page.call(refresh, [known, []])[1])["data"]
    assert [row[0] for row in answer[0]["data"]] == ["two", "one"]
    unchanged = json.loads(page.call(refresh, [answer[1], []])[1])["data"]
    assert unchanged == [{"__type__": "update"}] * len(unchanged)


# -- uploads --


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.jsonl", b"\0\1\2 no text"),
        ("pairs.jsonl", b""),
        ("pairs.parquet", b"MZ\x90 a program"),
        ("pairs.jsonl.gz", b"not zipped"),
        ("pairs.exe", b"MZ\x90 a program"),
        ("pairs", b"no ending"),
        ("pairs.html", b"<script>alert(1)</script>"),
        (".jsonl", b""),
    ],
)
def test_a_file_that_is_no_data_is_refused_and_not_kept(page, unharmed, name, content):
    file = page.upload(name, content)
    status, text = page.call(page.endpoint("upload"), [file])
    check(page, status, text, name, json.dumps(file))
    assert status == 500


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../../../tmp/climbed.jsonl", "climbed.jsonl"),
        ("C:\\windows\\climbed-2.jsonl", None),
        (".hidden.jsonl", None),
        ("🦊.jsonl", None),
        ("naïve 文.jsonl", None),
        (f"{'long' * 300}.jsonl", None),
        ("quo'te\".jsonl", None),
        ("semi;colon&$(id).jsonl", None),
    ],
)
def test_uploads_land_below_the_data_folder_under_a_plain_name(page, name, kept):
    before = set(page.server.folder.rglob("*"))
    status, text = page.call(page.endpoint("upload"), [page.upload(name, PAIR.encode())])
    assert status == 200, text
    fresh = {path for path in page.server.folder.rglob("*") if path.suffix == ".jsonl"} - before
    assert len(fresh) == 1
    path = fresh.pop()
    assert path.parent == page.server.data_dir / "uploads"
    assert not path.name.startswith(".")
    assert len(path.name) <= 100
    assert re.search(r"[/\\;&$'\"<>]", path.name) is None
    assert kept in (None, path.name)
    path.unlink()


def test_a_file_above_the_cap_leaves_nothing_behind(page, unharmed):
    for size in (1_000_001, 2_000_000, 6_000_000):
        files = {"files": ("big.jsonl", b"x" * size)}
        answer = page.http.post("gradio_api/upload", files=files)
        assert answer.status_code == 413
        assert len(answer.text) < 200


def lists_of_lists(levels: int) -> str:
    """A few lines that stand for 9 ** levels texts."""
    lines = [
        f"n{level}: &n{level} [{','.join([f'*n{level - 1}'] * 9)}]" for level in range(1, levels)
    ]
    last = f"model: {{name: *n{levels - 1}}}"
    return "\n".join(["n0: &n0 [x,x,x,x,x,x,x,x,x]", *lines, last])


@pytest.mark.parametrize(
    "text",
    [
        lists_of_lists(12),
        "&a [*a]",
        "[" * 50_000,
        "training: {seed: " + "9" * 5000 + "}",
        "training: {seed: 2001-13-45}",
        "model: !!python/object/apply:os.system ['touch hacked']",
        "model: !!python/name:os.system",
        "data:\n  source: {decoy}",
        "data:\n  source: ../../outside/pairs.jsonl",
        "model:\n  name: {outside}/model",
        "ef:\n  bertscore_model: {outside}/model",
        "model:\n  revision: ../../x",
        "? [1]\n: 2",
        "\0\1\2",
        "- 1",
        "",
        "<img src=x onerror=alert(1)>: 1",
        "x" * 1_000_001,
    ],
    ids=range(18),
)
def test_a_recipe_that_is_none_is_refused_with_a_sentence(page, unharmed, text):
    text = text.replace("{decoy}", str(page.outside / "pairs.jsonl"))
    text = text.replace("{outside}", str(page.outside))
    if len(text) > 1_000_000:
        text = text[:999_990]
    file = page.upload("mine.yaml", text.encode())
    status, answer = page.call(page.endpoint("load_yaml"), [file])
    check(page, status, answer, text[:40], text)
    assert status == 500
    assert file["path"] not in answer


def test_stars_in_a_prompt_are_no_aliases(page, unharmed):
    text = 'training:\n  sample_prompts: ["Say **why** and *how*."]\n  seed: 7\n'
    status, answer = page.call(
        page.endpoint("load_yaml"), [page.upload("mine.yaml", text.encode())]
    )
    assert status == 200
    filled = [update.get("value") for update in json.loads(answer)["data"]]
    assert "Say **why** and *how*." in filled


# -- bodies that are none --


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"data": 5, "fn_index": 0}',
        '{"data": [], "session_hash": [1]}',
    ],
    ids=range(7),
)
@pytest.mark.parametrize("route", ["run/predict", "queue/join", "call/stop", "run/stop"])
def test_a_body_that_is_none_is_refused(page, unharmed, route, body):
    answer = page.http.post(f"gradio_api/{route}", content=body, headers=JSON)
    assert answer.status_code in (400, 422)
    assert "Traceback" not in answer.text
    assert "site-packages" not in answer.text


@pytest.mark.parametrize(
    "more", [{"fn_index": "x"}, {"fn_index": 1.5}, {"trigger_id": "x"}, {"event_id": {}}], ids=str
)
@pytest.mark.parametrize("route", ["run/predict", "queue/join"])
def test_a_body_of_other_kinds_is_refused(page, unharmed, route, more):
    body = {"data": [], "fn_index": 0, "session_hash": "x"} | more
    assert page.http.post(f"gradio_api/{route}", json=body).status_code == 422


def test_ten_megabytes_are_refused_before_they_are_read(page, unharmed):
    body = json.dumps({"fn_index": 0, "data": ["x" * 10_000_000]})
    for route in ("run/predict", "queue/join", "call/stop"):
        answer = page.http.post(f"gradio_api/{route}", content=body, headers=JSON)
        assert answer.status_code == 413
        assert answer.text.count("\n") == 1


def test_too_few_and_too_many_inputs_are_refused(page, unharmed):
    for name in ("stop", "rename", "watch", "start", "browse"):
        endpoint = page.endpoint(name)
        for count in (0, len(endpoint["inputs"]) - 1, 1000):
            status, text = page.call(endpoint, [None] * count)
            check(page, status, text, f"{name} with {count}", "")


def test_what_runs_in_the_browser_only_cannot_be_called(page, untouched):
    there = [dep for dep in page.config["dependencies"] if not dep["backend_fn"]]
    assert len(there) > 10
    for dependency in there:
        status, text = page.call(dependency, [None] * len(dependency["inputs"]))
        assert status == 500
        assert "Traceback" not in text


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("component_server", {"session_hash": "a", "component_id": 5, "fn_name": "preprocess"}),
        ("component_server", {"session_hash": "a", "component_id": 10**9, "fn_name": "__init__"}),
        ("component_server", {"session_hash": "a", "component_id": 5, "fn_name": "__class__"}),
        ("call/v2/stop", {"run": "../x"}),
        ("call/v2/absent", {"run": "../x"}),
        ("run/absent", {"data": []}),
        ("run/predict", {"data": [], "fn_index": -1}),
        ("run/predict", {"data": [], "fn_index": 10**9}),
        ("run/predict", {"data": ["one"], "fn_index": 3, "session_hash": "\ud800"}),
        ("queue/join", {"data": [], "fn_index": 10**9, "session_hash": "x"}),
        ("cancel", {"session_hash": "../x", "fn_index": 1, "event_id": "x"}),
        ("stream/x", {"data": []}),
        ("vibe-edit", {"prompt": "x"}),
    ],
)
def test_gradios_other_routes_tell_nothing(page, untouched, route, body):
    body.setdefault("data", None)
    answer = page.http.post(f"gradio_api/{route}", content=json.dumps(body), headers=JSON)
    for leak in ("Traceback", "site-packages", str(page.server.folder)):
        assert leak not in answer.text


# -- afterwards --


def test_the_runs_are_still_as_they_were(page):
    assert sorted(path.name for path in page.server.runs_dir.iterdir() if path.name[0] != ".") == [
        "one",
        "two",
    ]
    config = page.http.get("config").json()
    assert config["dependencies"] == page.config["dependencies"]
    assert config["layout"] == page.config["layout"]
    files = [path for path in page.server.folder.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in files)
