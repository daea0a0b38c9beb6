"""The page as a user starts it: a server process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from checkout import ROOT

from gapo_lite.disk import read_jsonl


@dataclass(slots=True)
class Server:
    """A page that is being served, with folders of its own."""

    folder: Path
    models_dir: Path
    port: int
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def runs_dir(self) -> Path:
        return self.folder / "runs"

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def start(self) -> Server:
        """Starts the process and waits until it answers."""
        command = [
            *(sys.executable, "-m", "app", "--port", str(self.port)),
            *("--runs-dir", str(self.runs_dir), "--data-dir", str(self.data_dir)),
            *("--models-dir", str(self.models_dir), *self.options),
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)
        return self

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}theme.css", timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def kill(self) -> None:
        """As a crash would: kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """As Ctrl-C would; the trainings that it has started end too: no test leaves any behind."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            self.process.kill()
        from app import jobs, processes, sweep_jobs

        if self.runs_dir.is_dir() and (name := processes.active(self.runs_dir)):
            is_sweep = name in sweep_jobs.names(self.runs_dir)
            (sweep_jobs if is_sweep else jobs).kill(self.runs_dir, name)

    def metrics(self, run: str) -> list[dict]:
        """What a run has logged so far."""
        return read_jsonl(self.runs_dir / run / "metrics.jsonl")


@contextlib.contextmanager
def serving(
    folder: Path, models_dir: Path, *options: str, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """A server with empty folders below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(folder, models_dir, _free_port(), options, environment or {})
    try:
        yield server.start()
    finally:
        server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
