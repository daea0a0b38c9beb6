"""`python -m app`: its options, its login, its environment, and its end."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from checkout import ROOT
from serving import Server, serving

from app import forms, jobs
from app.__main__ import check_login
from gapo_lite.errors import ConfigError
from gapo_lite.runs import Run

TOKEN = "hf_abcdefghijklmnop1234"
USER, PASSWORD = "Zoë", "korrekt:horse 9Zq"
MAX_START_S = 15.0  # both on a machine that has nothing else to do
MAX_END_S = 6.0
HOSTILE = {
    "GRADIO_SERVER_NAME": "0.0.0.0",
    "GRADIO_SERVER_PORT": "1",
    "GRADIO_NUM_PORTS": "0",
    "GRADIO_SHARE": "True",
    "GRADIO_ALLOWED_PATHS": "/",
    "GRADIO_ROOT_PATH": "/elsewhere",
    "GRADIO_ANALYTICS_ENABLED": "True",
    "GRADIO_MCP_SERVER": "True",
    "GRADIO_DEBUG": "1",
    "GRADIO_VIBE_MODE": "1",
    "GRADIO_SSR_MODE": "True",
    "GRADIO_NUM_WORKERS": "2",
    "GRADIO_RUN_HISTORY": "True",
    "GRADIO_PROFILING": "1",
    "GRADIO_LOCAL_DEV_MODE": "1",
    "GRADIO_WATCH_DIRS": "/tmp",
    "GRADIO_HOT_RELOAD": "true",
    "http_proxy": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
}


# -- the login's form --


@pytest.mark.parametrize(
    ("auth", "login"),
    [
        ("u:p", ("u", "p")),
        ("u:p:q:", ("u", "p:q:")),
        (" u : p ", ("u", " p ")),
        ("Zoë:pässwörd", ("Zoë", "pässwörd")),
    ],
)
def test_a_login_is_everything_around_the_first_colon(auth, login):
    assert check_login("0.0.0.0", auth) == check_login("127.0.0.1", auth) == login


@pytest.mark.parametrize("auth", ["", "u", "u:", ":p", ":", " :p", "::"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_half_a_login_is_refused_everywhere(host, auth):
    with pytest.raises(ConfigError, match="USER:PASSWORD") as refused:
        check_login(host, auth)
    assert "p" not in str(refused.value).replace("Password", "").split()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_no_login(host):
    assert check_login(host, None) is None


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "page.example", "127.0.0.1.evil.example", "127.1", ""]
)
def test_every_other_address_needs_one(host):
    with pytest.raises(ConfigError, match="give it a password"):
        check_login(host, None)


# -- options that cannot be --


def refuse(*options: str, **environment: str) -> str:
    """What a page that does not start says."""
    done = subprocess.run(
        [sys.executable, "-m", "app", *options],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


def test_another_host_without_a_login_is_refused_in_one_sentence(tmp_path):
    said = refuse("--host", "0.0.0.0", "--runs-dir", str(tmp_path / "runs"))
    assert said.startswith("error: --host 0.0.0.0 lets other machines reach the page")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_login_without_a_name_is_refused_and_not_repeated():
    said = refuse(GAPO_LITE_AUTH=f":{PASSWORD}")
    assert said == "error: --auth has to be USER:PASSWORD, neither of them empty.\n"


def test_an_empty_variable_is_no_login():
    assert "give it a password" in refuse("--host", "0.0.0.0", GAPO_LITE_AUTH="")


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    said = refuse("--runs-dir", str(tmp_path / "file" / "runs"))
    assert said.startswith("error: cannot make the folder")
    assert said.count("\n") == 1


def test_a_port_in_use_is_told_in_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        folders = ("--runs-dir", str(tmp_path / "runs"), "--data-dir", str(tmp_path / "data"))
        said = refuse("--port", str(port), *folders, **HOSTILE)
    assert said.startswith(f"error: cannot listen on port {port} of 127.0.0.1")
    assert said.count("\n") == 1
    assert "GRADIO" not in said


# -- the environment --


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, float, Path]]:
    """A server in an environment that wants it otherwise, the seconds until it answered, and the
    folder that its temporary files should not go to."""
    folder = tmp_path_factory.mktemp("plain")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    environment = {**HOSTILE, "GRADIO_TEMP_DIR": str(elsewhere), "HF_TOKEN": TOKEN}
    started = time.monotonic()
    with serving(folder / "page", folder / "models", environment=environment) as server:
        yield server, time.monotonic() - started, elsewhere


def test_the_page_answers_soon_after_it_was_started(plain):
    _, seconds, _ = plain
    print(f"\nthe page answered {seconds:.1f} s after it was started")
    assert seconds < MAX_START_S * crowd()


def crowd() -> float:
    """How many programs share a core of this machine now; at least one."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_variables_of_gradio_have_no_effect(plain):
    server, _, elsewhere = plain
    with client(server) as http:
        config = http.get("/config").json()
        assert config["root"] == server.url.rstrip("/")
        assert config["analytics_enabled"] is False
        assert config["dev_mode"] is False
        assert config["vibe_mode"] is False
        assert http.get("/gradio_api/file=/etc/hostname").status_code == 403
        for path in ("mcp/", "mcp/schema", "runs", "profiling/summary", "run-history/buckets"):
            assert http.get(f"/gradio_api/{path}").status_code == 404, path
        assert http.get("/monitoring/summary").status_code == 403
        uploaded = http.post("/gradio_api/upload", files={"files": ("a.csv", b"x")}).json()[0]
    assert list(elsewhere.iterdir()) == []
    folder = Path(uploaded).parents[1]
    assert folder.stat().st_mode & 0o777 == 0o700  # this user's alone


def test_it_listens_on_this_machine_alone(plain):
    server, _, _ = plain
    listening = [
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{server.port:04X}")
    ]
    assert listening == [f"0100007F:{server.port:04X}"]
    assert "gradio.live" not in server.log.read_text()


def test_an_ipv6_address_works_too(tmp_path):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = tmp_path / "log"
    command = [
        *(sys.executable, "-m", "app", "--host", "::1", "--port", str(port)),
        *("--runs-dir", str(tmp_path / "runs"), "--data-dir", str(tmp_path / "data")),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        wait_until(lambda: f"http://[::1]:{port}/" in log.read_text(), process=process)
        with httpx.Client(trust_env=False) as http:
            assert http.get(f"http://[::1]:{port}/").status_code == 200
    finally:
        process.terminate()
        assert process.wait(20) == 0


# -- the login --


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """A server that others can reach, with a login; it knows a token of the Hub."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "tmp").mkdir()
    environment = {
        "GAPO_LITE_AUTH": f"{USER}:{PASSWORD}",
        "HF_TOKEN": TOKEN,
        "TMPDIR": str(folder / "tmp"),
    }
    with serving(folder, tiny_model.parent, "--host", "0.0.0.0", environment=environment) as server:
        yield server


def client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, trust_env=False, timeout=60)


@contextlib.contextmanager
def logged_in(server: Server) -> Iterator[httpx.Client]:
    with client(server) as http:
        answer = http.post("/login", data={"username": USER, "password": PASSWORD})
        assert answer.status_code == 200
        yield http


ROUTES = [
    ("GET", "/config"),
    ("GET", "/config/"),
    ("GET", "/openapi.json"),
    ("GET", "/theme.css"),
    ("GET", "/manifest.json"),
    ("GET", "/assets/"),
    ("GET", "/live?run=one"),
    ("GET", "/gradio_api/info"),
    ("GET", "/gradio_api/openapi.json"),
    ("GET", "/gradio_api/queue/data?session_hash=x"),
    ("GET", "/gradio_api/queue/status"),
    ("GET", "/gradio_api/heartbeat/x"),
    ("GET", "/gradio_api/file=/etc/hostname"),
    ("HEAD", "/gradio_api/file=/etc/hostname"),
    ("GET", "/gradio_api/file/etc/hostname"),
    ("GET", "/gradio_api/stream/x/1/2/playlist.m3u8"),
    ("GET", "/gradio_api/call/stop/x"),
    ("GET", "/gradio_api/upload_progress?upload_id=x"),
    ("GET", "/gradio_api/deep_link?session_hash=x"),
    ("GET", "/gradio_api/app_id"),
    ("GET", "/gradio_api/token"),
    ("GET", "/gradio_api/user"),
    ("GET", "/monitoring"),
    ("POST", "/gradio_api/upload"),
    ("POST", "/gradio_api/queue/join"),
    ("POST", "/gradio_api/run/predict"),
    ("POST", "/gradio_api/run/stop"),
    ("POST", "/gradio_api/api/stop"),
    ("POST", "/gradio_api/call/stop"),
    ("POST", "/gradio_api/call/v2/stop"),
    ("POST", "/gradio_api/cancel"),
    ("POST", "/gradio_api/reset"),
    ("POST", "/gradio_api/component_server"),
    ("POST", "/gradio_api/process_recording"),
    ("POST", "/gradio_api/stream/x"),
    ("POST", "/gradio_api/vibe-code"),
]


@pytest.mark.parametrize("cookies", [{}, {"access-token-x": "y"}], ids=["none", "forged"])
def test_every_route_refuses_who_has_not_logged_in(locked, cookies):
    with client(locked) as http:
        for name, value in cookies.items():
            http.cookies.set(name, value)
        for method, path in ROUTES:
            answer = http.request(method, path, json={} if method == "POST" else None)
            assert answer.status_code == 401, (method, path)
            assert answer.text in ("Log in first.\n", ""), path


def test_the_login_page_tells_nothing_of_the_page_behind_it(locked):
    with client(locked) as http:
        text = http.get("/").text
        assert http.head("/").status_code == 200
    assert 'type="password"' in text
    for word in ("rougeL", "embedded:", "Start training", "gradio", str(locked.folder), USER):
        assert word not in text


def test_only_the_right_password_logs_in_and_logging_out_ends_it(locked):
    with client(locked) as http:
        wrong = [(USER, "x"), ("x", PASSWORD), ("", ""), (PASSWORD, USER), (USER, PASSWORD + " ")]
        for user, password in wrong:
            answer = http.post("/login", data={"username": user, "password": password})
            assert answer.status_code >= 400
            assert "set-cookie" not in answer.headers
    with logged_in(locked) as http:
        cookies = http.post("/login", data={"username": USER, "password": PASSWORD}).headers
        assert cookies["set-cookie"].count("HttpOnly") == 2
        assert http.get("/config").status_code == 200
        assert http.get("/live?run=absent").status_code == 404
        assert http.get("/gradio_api/file=/etc/hostname").status_code == 403
        kept = dict(http.cookies)
        http.get("/logout")
    with client(locked) as http:
        http.cookies.update(kept)
        assert http.get("/config").status_code == 401


def test_a_login_does_not_open_the_page_to_other_sites(locked):
    with logged_in(locked) as http:
        assert http.get("/config", headers={"host": "evil.example"}).status_code == 421
        foreign = {"origin": "http://evil.example"}
        assert http.get("/config", headers=foreign).status_code == 403
        login = {"username": USER, "password": PASSWORD}
        assert http.post("/login", data=login, headers=foreign).status_code == 403
        assert http.get("/config", headers={"host": f"10.1.2.3:{locked.port}"}).status_code == 200


CLIENT = """
import os, sys
from gradio_client import Client
for password in (os.environ["PASSWORD"], "wrong"):
    try:
        client = Client(sys.argv[1], auth=(os.environ["NAME"], password), verbose=False)
        print(client.predict(sys.argv[2], api_name="/preset")[0]["value"])
    except Exception as error:
        print(type(error).__name__)
"""


def test_gradios_own_client_can_log_in(locked):
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, locked.url, "Demo: embedded model, CPU or GPU"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "NAME": USER, "PASSWORD": PASSWORD},
    )
    assert done.stdout.split() == ["gapo", "ValueError"], done.stderr


# -- a training, the page's end, and what is written down --


def call(http: httpx.Client, name: str, *data: Any) -> Any:
    """The outputs of an endpoint."""
    answer = http.post(f"/gradio_api/run/{name}", json={"data": data, "session_hash": "tester"})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def start_training(server: Server, settings: dict, name: str) -> None:
    """A long training of the tiny model, as a person starts it: from a recipe."""
    settings = copy.deepcopy(settings)
    for key in ("source", "heldout_source"):
        given = Path(settings["data"][key])
        (server.data_dir / given.name).write_bytes(given.read_bytes())
        settings["data"][key] = str(server.data_dir / given.name)
    settings["training"] |= {"epochs": 500, "eval_steps": 10_000, "logging_steps": 1}
    recipe = yaml.safe_dump(settings).encode()
    with logged_in(server) as http:
        path = http.post("/gradio_api/upload", files={"files": ("my.yaml", recipe)}).json()[0]
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        filled = [
            value.get("value") if isinstance(value, dict) else value
            for value in call(http, "load_yaml", file)[: len(forms.fields())]  # then sections
        ]
        call(http, "start", name, 0.6, "step", *filled)


def wait_until(is_so: Any, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 90
    while not is_so():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.1)


def written(folder: Path) -> dict[str, bytes]:
    """All files below a folder, and those within their archives."""
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, content in list(files.items()):
        if name.endswith(".zip"):
            files |= unzipped(content)
    return files


def unzipped(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_page_ends_at_once_and_leaves_the_training_alone(locked, tiny_settings):
    start_training(locked, tiny_settings, "long")
    wait_until(lambda: len(locked.metrics("long")) > 5)
    pid = jobs.report(locked.runs_dir, "long").pid
    assert pid is not None
    told = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
    assert PASSWORD.encode() not in told
    assert b"GAPO_LITE_AUTH" not in told
    assert b"GRADIO" not in told
    assert TOKEN.encode() in told  # training may need it for the Hub

    with logged_in(locked) as http, contextlib.ExitStack() as streams:
        for path in ("/live?run=long", "/gradio_api/heartbeat/x"):
            answer = streams.enter_context(http.stream("GET", path))
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert next(answer.iter_lines())
        assert locked.process is not None
        assert len(temporary_folders(locked)) == 1
        asked = time.monotonic()
        locked.process.send_signal(signal.SIGTERM)
        assert locked.process.wait(30) == 0
    seconds = time.monotonic() - asked
    print(f"\nthe page ended {seconds:.1f} s after SIGTERM, with two viewers")
    assert seconds < MAX_END_S * crowd()
    assert temporary_folders(locked) == []

    count = len(locked.metrics("long"))
    wait_until(lambda: len(locked.metrics("long")) > count + 5)
    assert jobs.active(locked.runs_dir) == "long"


def temporary_folders(server: Server) -> list[Path]:
    """Where a page keeps uploads and downloads while it runs."""
    return sorted((server.folder / "tmp").glob("gapo-lite-page-*"))


def test_the_next_page_finds_it_stops_it_and_hands_out_its_adapter(locked):
    if locked.process is not None and locked.process.poll() is not None:
        locked.start()
    with logged_in(locked) as http:
        call(http, "watch", None, 0, "step")
        call(http, "stop", "long")
        wait_until(lambda: jobs.report(locked.runs_dir, "long").state == "stopped")
        file = call(http, "adapter", "long")[0]
        archive = http.get(f"/gradio_api/file={file['path']}")
    files = unzipped(archive.content)
    assert any(name.endswith("adapter_model.safetensors") for name in files)
    assert not any(secret in content for content in files.values() for secret in secrets())


def test_no_secret_is_written_down_anywhere(locked):
    files = written(locked.folder)
    assert any(name.endswith("environment.json") for name in files)
    assert any(name.endswith("job.json") for name in files)
    for name, content in files.items():
        assert not any(secret in content for secret in secrets()), name
    with logged_in(locked) as http:
        said = http.get("/config").text + http.get("/").text
    assert TOKEN not in said
    assert PASSWORD not in said
    assert Run(locked.runs_dir / "long").read("environment.json")


def secrets() -> list[bytes]:
    return [TOKEN.encode(), PASSWORD.encode(), json.dumps(PASSWORD).strip('"').encode()]
