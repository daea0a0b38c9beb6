"""Sharing: what may go out, what the Hub is asked for, and what a person is told; all of it against
a Hub on this machine or one that is made up."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from forging import forge_run
from huggingface_hub import CommitInfo, HfApi, ModelInfo
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from typer.testing import CliRunner

from gapo_lite import cli, sharing
from gapo_lite.errors import ConfigError, RunError
from gapo_lite.export import export_run
from gapo_lite.sharing import check_repository, is_exported, look_over, upload

TOKEN = "hf_" + "s3cretS3cret"


@pytest.fixture(scope="module")
def run(tiny_settings, tmp_path_factory):
    return forge_run(tmp_path_factory.mktemp("runs") / "kind", tiny_settings)


@pytest.fixture
def folder(run, tmp_path):
    return export_run(run, merged=False, out=tmp_path / "kind-adapter")


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


# -- a Hub on this machine --


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as `create_repo` and `upload_folder` speak to, over HTTP."""

    repositories: dict[str, dict[str, bytes]]
    requests: list[tuple[str, str, Any]]
    tokens: set[str]

    def do_GET(self) -> None:
        self.note(None)
        name = "/".join(self.path.split("/")[3:5]).partition("?")[0]
        files = self.repositories.get(name)
        if files is None:
            self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in self.path:
            rows = [
                {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
                for path, data in files.items()
            ]
            self.reply(200, rows)
        else:
            siblings = [{"rfilename": path} for path in files]
            self.reply(200, {"id": name, "sha": "0" * 40, "siblings": siblings, "private": True})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path.endswith("/api/repos/create"):
            asked = json.loads(body)
            self.note(asked)
            name = f"{asked.get('organization') or 'ada'}/{asked['name']}"
            self.repositories[name] = {}
            self.reply(200, {"url": f"{self.base}/{name}", "id": name})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.note(files)
            answer = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in files
            ]
            self.reply(200, {"files": answer})
        elif "/commit/" in self.path:
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.note(body)
            self.reply(200, {"errors": [], "warnings": []})

    def commit(self, lines: list[dict]) -> None:
        self.note([line["key"] for line in lines])
        name = "/".join(self.path.split("/")[3:5])
        for line in lines:
            if line["key"] == "file":
                value = line["value"]
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
        url = f"{self.base}/{name}/commit/{'1' * 40}"
        self.reply(200, {"commitUrl": url, "commitOid": "1" * 40, "success": True})

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def note(self, body: Any) -> None:
        self.requests.append((self.command, self.path, body))
        self.tokens.add(self.headers.get("Authorization", ""))

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub():
    kind = type("OneHub", (Hub,), {"repositories": {}, "requests": [], "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    kind.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield kind
    server.shutdown()
    server.server_close()
    thread.join()


def share(hub, *arguments: Any, home: Path) -> subprocess.CompletedProcess[str]:
    """`gapo-lite share …` in a process of its own, with huggingface_hub as it is."""
    environment = {
        **os.environ,
        **{"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(home / "hf")},
        **{"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
    }
    return subprocess.run(
        [sys.executable, "-m", "gapo_lite", "share", *map(str, arguments)],
        **{"env": environment, "capture_output": True, "text": True, "check": False},
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


def test_a_folder_arrives_on_the_hub_byte_for_byte(hub, folder, tmp_path):
    done = share(hub, folder, "--to", "ada/demo", "--yes", home=tmp_path)
    assert done.returncode == 0, done.stderr
    there = hub.repositories["ada/demo"]
    own = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: there.get(name) for name in own} == own
    created = next(body for _, path, body in hub.requests if path.endswith("/repos/create"))
    assert created.get("private") is True or created.get("visibility") == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert done.stdout.rstrip().endswith(f"uploaded to {hub.address}/ada/demo")
    assert f"{(folder / 'adapter_model.safetensors').stat().st_size:,}" in done.stdout
    for said in (done.stdout, done.stderr):
        assert TOKEN not in said

    again = share(hub, folder, "--to", "ada/demo", "--yes", home=tmp_path)
    assert again.returncode == 2
    assert "is on the Hub already and holds" in again.stderr
    assert "--update" in again.stderr
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMore.\n")
    third = share(hub, folder, "--to", "ada/demo", "--yes", "--update", home=tmp_path)
    assert third.returncode == 0, third.stderr
    assert hub.repositories["ada/demo"]["README.md"].endswith(b"\nMore.\n")


def test_nothing_is_uploaded_without_a_yes(hub, folder, tmp_path):
    done = share(hub, folder, "--to", "ada/demo", home=tmp_path)  # nobody is there to ask
    assert done.returncode == 2
    assert f"nothing was uploaded; the export stays in {folder}" in done.stderr
    assert hub.requests == []


# -- a Hub that is made up --


class FakeApi:
    """HfApi's place: notes what it is asked for, and fails as it is told."""

    def __init__(self) -> None:
        self.files: list[str] | None = None
        self.is_private = True
        self.asked: list[str] = []
        self.failures: dict[str, Exception] = {}

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if what in self.failures:
            raise self.failures[what]

    def list_repo_files(self, name: str) -> list[str]:
        self._ask("list_repo_files")
        if self.files is None:
            raise _hub_error(404, "no such repository", kind="RepositoryNotFoundError")
        return self.files

    def repo_info(self, name: str) -> ModelInfo:
        self._ask("repo_info")
        return ModelInfo(id=name, private=self.is_private)

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        self._ask("create_repo")
        self.private = private

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> CommitInfo:
        self._ask("upload_folder")
        return CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/1",
            commit_message=commit_message,
            commit_description="",
            oid="1",
        )


def _hub_error(status: int, words: str, kind: str = "HfHubHTTPError") -> Exception:
    import huggingface_hub.errors as errors

    library = sys.modules[HTTPError.__module__.partition(".")[0]]  # httpx, under whatever name
    request = library.Request("GET", "https://hub.example/api")
    return getattr(errors, kind)(words, response=library.Response(status, request=request))


@pytest.fixture
def api(monkeypatch, logged_in):
    fake = FakeApi()
    monkeypatch.setattr(sharing, "HfApi", lambda: fake)
    return fake


def test_the_fake_asks_what_the_real_one_takes():
    import inspect

    for name in ("list_repo_files", "repo_info", "create_repo", "upload_folder"):
        real = inspect.signature(getattr(HfApi, name)).parameters
        taken = set(inspect.signature(getattr(FakeApi, name)).parameters) - {"self", "name"}
        assert taken <= set(real)


def test_a_new_repository_is_made_private_unless_asked_otherwise(api, folder):
    for private in (True, False):
        api.asked.clear()
        shipment = look_over(folder, "ada/demo", private=private)
        upload(shipment, "ada/demo", private=private)
        assert api.asked == ["list_repo_files", "create_repo", "upload_folder"]
        assert api.private is private


def test_a_repository_that_is_there_but_empty_is_filled(api, folder):
    api.files = [".gitattributes"]
    upload(look_over(folder, "ada/demo", private=True), "ada/demo", private=True)
    assert api.asked == ["list_repo_files", "repo_info", "upload_folder"]


def test_what_is_to_be_private_does_not_go_into_a_public_repository(api, folder):
    api.files, api.is_private = [".gitattributes"], False
    shipment = look_over(folder, "ada/demo", private=True)
    with pytest.raises(RunError, match=r"everybody may see it; nothing was uploaded.*--public"):
        upload(shipment, "ada/demo", private=True)
    assert "upload_folder" not in api.asked
    upload(shipment, "ada/demo", private=False)
    assert api.asked[-1] == "upload_folder"


@pytest.mark.parametrize("step", ["list_repo_files", "create_repo", "upload_folder"])
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (lambda: _hub_error(401, f"bad token {TOKEN}"), "does not know who you are.*hf auth login"),
        (lambda: _hub_error(403, "Forbidden"), "your token may not write there"),
        (
            lambda: _hub_error(500, f"odd {TOKEN} hf_otherOther"),
            r"the Hub answered 500: odd \*\*\* ",
        ),
        (lambda: _hub_error(500, "x" * 290 + TOKEN), r"the Hub answered 500: x+\*\*\*"),
        (lambda: OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (lambda: HTTPError("Connection\nrefused"), r"cannot be reached \(Connection refused\)"),
        (lambda: TimeoutError("timed out"), r"the upload broke off \(timed out\)"),
    ],
    ids=["401", "403", "500", "token over the edge", "offline", "network", "timeout"],
)
def test_a_failure_is_one_message_and_the_export_stays(api, folder, step, failure, message):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    api.failures[step] = failure()
    shipment = look_over(folder, "ada/demo", private=True)
    with pytest.raises(RunError, match=message) as raised:
        upload(shipment, "ada/demo", private=True)
    said = str(raised.value)
    assert f"try again with gapo-lite share {folder} --to ada/demo" in said
    assert "hf_" not in said
    assert "\n" not in said
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


# -- what may go out --


@pytest.mark.parametrize("name", ["ada/demo", "Ada-L/Llama-3_demo.v1"])
def test_names_of_repositories(name):
    assert check_repository(name) == name


@pytest.mark.parametrize(
    "name",
    ["demo", "", "ada/", "/demo", "a/b/c", "ada/../x", "ada/--x", "ada/x y", "ada/x\n", "ada/é"],
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ConfigError, match="--to .*owner/name"):
        check_repository(name)


@pytest.mark.parametrize("odd", ["training_args.bin", "train.log", "notes", "sub/optimizer.pt"])
def test_a_file_that_is_no_part_of_an_export_stops_it(folder, odd):
    (folder / odd).parent.mkdir(exist_ok=True)
    (folder / odd).write_text("mine")
    with pytest.raises(RunError, match=r"not part of an export.*Remove it"):
        look_over(folder, "ada/demo", private=True)


def test_a_link_to_elsewhere_stops_it(folder, tmp_path):
    (folder / "extra.json").symlink_to(tmp_path)
    with pytest.raises(RunError, match="not part of an export"):
        look_over(folder, "ada/demo", private=True)


def test_a_run_is_not_an_exported_folder(run, folder, tmp_path):
    assert is_exported(folder)
    assert not is_exported(run.path)
    assert not is_exported(tmp_path)
    with pytest.raises(RunError, match="not an exported folder"):
        look_over(run.path, "ada/demo", private=True)


def test_llama_3_goes_out_under_its_name_or_in_private(folder):
    card = folder / "README.md"
    card.write_text(card.read_text().replace('"tiny"', '"meta-llama/Meta-Llama-3-8B-Instruct"'))
    with pytest.raises(ConfigError, match=r"begins with 'Llama 3'.*such as ada/Llama-3-demo"):
        look_over(folder, "ada/demo", private=False)
    assert look_over(folder, "ada/Llama-3-demo", private=False).base.startswith("meta-llama/")
    assert "`Llama 3`" in look_over(folder, "ada/demo", private=True).duties


# -- the command --


def call(*arguments: Any, stdin: str = "") -> Any:
    return CliRunner().invoke(cli.app, ["share", *map(str, arguments)], input=stdin)


def test_a_run_is_exported_shown_and_uploaded_after_a_yes(api, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(run.path, "--to", "ada/demo", stdin="y\n")
    assert done.exit_code == 0, done.output
    assert "adapter_model.safetensors" in done.stdout
    assert "only you (--private)" in done.stderr
    assert "uploaded to https://huggingface.co/ada/demo" in done.stdout
    card = (tmp_path / "exports" / "kind-adapter" / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "ada/demo")' in card
    again = call(run.path, "--to", "ada/demo", "--yes")
    assert again.exit_code == 2
    assert "share it as it is (gapo-lite share exports/kind-adapter --to ada/demo)" in again.stderr
    assert call("exports/kind-adapter", "--to", "ada/demo", "--yes").exit_code == 0


@pytest.mark.parametrize("answer", ["n\n", "", "what\n"])
def test_anything_but_yes_uploads_nothing(api, folder, answer):
    done = call(folder, "--to", "ada/demo", stdin=answer)
    assert done.exit_code == 2
    assert "nothing was uploaded" in done.stderr
    assert api.asked == []


def test_without_a_token_nothing_is_begun(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(sharing, "get_token", lambda: None)
    done = call(run.path, "--to", "ada/demo", "--yes")
    assert done.exit_code == 2
    assert "there is no token for the Hub. Log in with `hf auth login`" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_export_are_refused_for_a_folder_that_is_exported(api, folder):
    done = call(folder, "--to", "ada/demo", "--merged", "--yes")
    assert done.exit_code == 2
    assert "is exported already, and goes out as it is" in done.stderr
