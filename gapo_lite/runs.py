"""The run folder: everything that is known of a training run, for its process to write and for
others to read.

    runs/<name>/
      config.yaml        the resolved configuration
      environment.json   versions, hardware, data fingerprint
      margins.json       mean gap, floor count, histograms
      status.json        state, pid, step, total, heartbeat
      metrics.jsonl      one object a logged step; evaluation keys begin with eval/
      heldout.json       scores of each held-out pair: of the base model, and the newest
      samples.jsonl      answers to the fixed prompts
      train.log          what was said
      checkpoints/       see checkpoints.py
      adapter/           what peft loads

Whether a run is alive is a lock on `.lock`, held by its process and released by the system when
that ends: no pid or flag can be stale.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapo_lite.checkpoints import list_checkpoints, newest_valid_checkpoint
from gapo_lite.config import RunConfig, load_config
from gapo_lite.disk import file_lock, read_jsonl, replace_text, telling_disk_errors
from gapo_lite.errors import RunError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ACTIVE_STATES = ("starting", "running")


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Folder of the finished adapter."""
        return self.path / "adapter"

    def config(self) -> RunConfig:
        """The run's resolved configuration."""
        return load_config(self.path / "config.yaml")

    # -- read side --

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty where it is not there (yet)."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise RunError(f"{self.path / name} is damaged: it is not JSON.") from None

    def state(self) -> str:
        """starting, running, stopped, finished, failed, or interrupted (its process is gone
        without a word)."""
        state = str(self.read("status.json").get("state", "starting"))
        return "interrupted" if state in ACTIVE_STATES and not self.is_locked() else state

    def is_locked(self) -> bool:
        """Whether a process is training in this folder now."""
        try:
            with file_lock(self.path / ".lock", probe=True):
                return False
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False

    def metrics(self) -> list[dict[str, Any]]:
        """All rows logged so far; an unterminated last line is one being written, and is left
        out."""
        return read_jsonl(self.path / "metrics.jsonl")

    def trained_adapter(self) -> Path:
        """The adapter to use: the finished one, else the newest valid checkpoint's.

        Raises:
            RunError: nothing has been saved yet, or all of it is damaged.
        """
        if (self.adapter / "adapter_config.json").is_file():
            return self.adapter
        if not list_checkpoints(self.checkpoints):
            raise RunError(f"the run {self.name} has saved no adapter yet (state: {self.state()}).")
        return newest_valid_checkpoint(self.checkpoints, logger.warning)

    # -- write side --

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Replaces a JSON file of the folder in one step."""
        self.write_text(name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Replaces a file of the folder in one step."""
        replace_text(self.path / name, text)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Adds a line to a .jsonl file, of which one process is the writer, in one system call, so
        that a reader sees all of it or none.

        Raises:
            RunError: the disk is full; the file is as it was.
        """
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        descriptor = os.open(self.path / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            with telling_disk_errors(self.path / name):
                before = os.fstat(descriptor).st_size
                if os.write(descriptor, line) != len(line):
                    os.ftruncate(descriptor, before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)

    def write_heldout(self, step: int, columns: dict[str, list[float]]) -> None:
        """Keeps the held-out pairs' scores, each column (N,): those of step 0, the base model, and
        the newest."""
        known = self.read("heldout.json") if step else {}
        newest = {"step": step, **columns}
        self.write("heldout.json", {"base": known.get("base", newest), "newest": newest})

    def forget_after(self, step: int) -> None:
        """Drops what was logged and sampled after `step`: the run goes on from there."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            if path.is_file():
                rows = [row for row in read_jsonl(path) if row["step"] <= step]
                replace_text(
                    path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                )

    def flush_logs(self) -> None:
        """Brings what was appended to the disk: a checkpoint must never be ahead of it."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            with contextlib.suppress(FileNotFoundError), (self.path / name).open("rb") as file:
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def lock(self, what: str = "the run", status: str = "status.json") -> Iterator[None]:
        """Holds the folder for this process.

        Args:
            what: the folder is of.
            status: its file that names the process which works on it.

        Raises:
            RunError: another process does.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self.path / ".lock", patience=1.0))
            except BlockingIOError:
                pid = self.read(status).get("pid")
                raise RunError(
                    f"another process (pid {pid}) works on {what} {self.name}. Wait for it or stop "
                    "it."
                ) from None
            yield


def create_run(runs_dir: Path, name: str | None, default: str) -> Run:
    """A new, empty run folder.

    Args:
        runs_dir: folder of all runs; made where it is missing.
        name: what a person asked for, or None for `default`, `default-2`, …
        default: used where no name is given; characters that a name cannot have become "-".

    Raises:
        RunError: the name has a path or odd characters in it, or is in use, or the folder cannot
            be made.
    """
    with telling_disk_errors(runs_dir):
        runs_dir.mkdir(parents=True, exist_ok=True)
        while True:
            run = Run(runs_dir / free_name(runs_dir, name, default))
            with contextlib.suppress(FileExistsError):  # another process was quicker
                run.path.mkdir()
                return run


def free_name(runs_dir: Path, name: str | None, default: str) -> str:
    """A name that no run of a folder has yet; see `create_run`.

    Raises:
        RunError: the name has a path or odd characters in it, or is in use.
    """
    if name is None:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", default).strip("-._")[:80] or "run"
        for number in range(1, 100_000):
            candidate = stem if number == 1 else f"{stem}-{number}"
            if not os.path.lexists(runs_dir / candidate):
                return candidate
        raise RunError(f"{runs_dir} holds too many runs named {stem}-<number>: give a name.")
    check_name(name)
    if os.path.lexists(runs_dir / name):
        raise RunError(
            f"the run name {name!r} is in use ({runs_dir / name}). Choose another, or go on with "
            f"it: --resume {name}."
        )
    return name


def check_name(name: str) -> None:
    """Refuses what cannot be a run's name.

    Raises:
        RunError: it has a path or odd characters in it, or is no text at all.
    """
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise RunError(
            f"{name!r} cannot be a run's name: use letters, digits, '.', '_' and '-' (at most "
            "100, no path). "
            "--runs-dir says where runs lie."
        )


def open_run(name: str | Path, runs_dir: Path) -> Run:
    """An existing run, by its name in `runs_dir` or by its folder's path.

    Raises:
        RunError: there is no such run.
    """
    for path in (runs_dir / name, Path(name)):
        if (path / "config.yaml").is_file():
            return Run(path)
    known = [run.name for run in list_runs(runs_dir)]
    hint = (
        f"Runs in {runs_dir}: {', '.join(known[-8:])}."
        if known
        else f"{runs_dir} holds no runs yet."
    )
    raise RunError(f"there is no run {str(name)!r}. {hint}")


def list_runs(runs_dir: Path) -> list[Run]:
    """All runs of a folder, oldest first."""
    return [Run(path) for path in folders_with("config.yaml", runs_dir)]


def folders_with(name: str, runs_dir: Path) -> list[Path]:
    """The folders below `runs_dir` that hold such a file, by its age, oldest first."""
    found = [path.parent for path in runs_dir.glob(f"*/{name}")]
    return sorted(found, key=lambda path: ((path / name).stat().st_mtime, path.name))


def remove_run(run: Run) -> None:
    """Removes a run's folder and all in it, its settings last: what a kill leaves is known for a
    run, and can be removed again."""
    for path in sorted(run.path.glob("*")) if not run.path.is_symlink() else []:
        if path.name != "config.yaml":
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.unlink()
    shutil.rmtree(run.path, ignore_errors=True)


@contextlib.contextmanager
def device_lease(device_id: str) -> Iterator[None]:
    """Holds a GPU for one training on this machine; `device_id` is the GPU's own (UUID).

    Raises:
        RunError: another training holds it.
    """
    path = (
        Path(tempfile.gettempdir()) / f"gapo-lite-{re.sub(r'[^A-Za-z0-9-]', '-', device_id)}.lock"
    )
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(path, patience=1.0))
        except BlockingIOError:
            raise RunError(
                f"another training already uses this GPU ({device_id}; lock {path}). Two would "
                "slow or break each "
                "other: wait for it, stop it, or choose another GPU with CUDA_VISIBLE_DEVICES."
            ) from None
        yield


def now() -> float:
    """Seconds since 1970, for heartbeats."""
    return round(time.time(), 3)
