"""What lies in the folders of jobs, runs and sweeps, and what it says of one that nobody works on.

Whatever these files hold, even nothing or rubbish, reading them raises nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from app.children import cleaned
from gapo_lite.checkpoints import MANIFEST, list_checkpoints
from gapo_lite.disk import replace_text, telling_disk_errors
from gapo_lite.errors import RunError
from gapo_lite.runs import Run, check_name

JOBS, ENDING = ".jobs", ".job"
_TRACES = (".lock", "config.yaml", "status.json", "metrics.jsonl", "adapter")
_TAIL_BYTES = 64 * 1024
_MESSAGE_CHARACTERS = 2000


def job_folder(runs_dir: Path, name: str) -> Path:
    """Where a run's job keeps its files."""
    return runs_dir / JOBS / f"{name}{ENDING}"


def make_empty(folder: Path) -> None:
    """A new folder, in the place of what was there.

    Raises:
        RunError: the disk is full, read-only or not this user's.
    """
    with telling_disk_errors(folder):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        folder.mkdir()


def existing(runs_dir: Path, name: str) -> Run:
    """A run, or what was to become one; its path is a folder of `runs_dir` and nothing else.

    Raises:
        RunError: there is no such run, or it is a link.
    """
    if not name:
        raise RunError("no run is chosen: choose one first.")
    check_name(name)
    run = Run(runs_dir / name)
    if is_sweep(run.path):
        raise RunError(f"{name} is a sweep, not a run: it is in the Sweeps tab.")
    if run.path.is_symlink():
        raise RunError(
            f"the run {name} is a link to another place, which the page leaves alone: use the "
            "command line, or move the folder here."
        )
    if not is_run(run) and not (job_folder(runs_dir, name) / "output.log").exists():
        raise RunError(f"there is no run {name}: it may have been renamed or deleted.")
    return run


def is_name(name: str) -> bool:
    """Whether a run or a sweep can be called so."""
    try:
        check_name(name)
    except RunError:
        return False
    return True


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / "sweep.yaml").is_file()


def is_run(run: Run) -> bool:
    """Whether training has made this folder; --runs-dir may hold others."""
    return any((run.path / trace).exists() for trace in _TRACES)


def folders(place: Path) -> list[str]:
    """Names of the folders in a folder; links are none."""
    try:
        with os.scandir(place) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none to be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def status_of(folder: Path) -> dict[str, Any]:
    """What the process that works in the folder of a run or a sweep has last said."""
    return read_record(folder / ("sweep-status.json" if is_sweep(folder) else "status.json"))


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Replaces a job's job.json."""
    replace_text(folder / "job.json", json.dumps(record, indent=1) + "\n")


def whole(value: Any) -> int:
    """A count from a file; 0 for anything else."""
    return value if type(value) is int and value > 0 else 0


def is_torn(checkpoint: Path) -> bool:
    """Whether files of a checkpoint are missing or too short."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        return any((checkpoint / name).stat().st_size != size for name, (size, _) in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True


def outcome(run: Run, status: dict[str, Any], record: dict[str, Any]) -> tuple[str, str]:
    """State and message of a run that nobody trains."""
    state, message = str(status.get("state")), str(status.get("message", ""))
    if state == "finished":
        return state, ""
    is_last = _is_of_the_last(status, record)
    words = _last_words(job_folder(run.path.parent, run.name) / "output.log") if is_last else ""
    if state in ("failed", "stopped"):
        return state, cleaned(message)[:_MESSAGE_CHARACTERS] or words
    if is_last and record.get("stop_asked") and not list_checkpoints(run.checkpoints):
        return "stopped", "It was stopped before anything was saved."
    if is_run(run):
        return "interrupted", words or (
            "Its process ended without saving: it was killed, memory ran out, or the machine went "
            "down."
        )
    return "failed", words or (
        "Its process ended without a word before the training began: it was killed, memory ran "
        "out, or the machine went down."
    )


def sweep_outcome(folder: Path, status: dict[str, Any], record: dict[str, Any]) -> tuple[str, str]:
    """State and message of a sweep that nobody works on."""
    state, message = str(status.get("state")), cleaned(str(status.get("message") or ""))
    if state == "finished":
        return state, ""
    is_last = _is_of_the_last(status, record)
    words = _last_words(job_folder(folder.parent, folder.name) / "output.log") if is_last else ""
    if state in ("failed", "stopped"):
        return state, message[:_MESSAGE_CHARACTERS] or words
    if is_last and record.get("stop_asked"):
        return "stopped", ""
    if not words and not record and not status:
        return "stopped", "Nobody has started it yet."
    return "interrupted", words or (
        "Its process ended without a word: it was killed, memory ran out, or the machine went down."
    )


def _is_of_the_last(status: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether a job's record is of the last process there was. One that failed before its training
    began has written no status."""
    return record.get("pid") == status.get("pid") or (
        as_time(record.get("started")) > as_time(status.get("heartbeat"))
    )


def as_time(value: Any) -> float:
    """Seconds since 1970 from a file; 0 for anything else."""
    return float(value) if isinstance(value, int | float) else 0.0


def _last_words(output: Path) -> str:
    """The error that a process ended with; "" where it printed none."""
    text = f"\n{end_of(output)}".rstrip()
    if "\nerror: " in text:
        return text.rpartition("\nerror: ")[2][:_MESSAGE_CHARACTERS]
    if "\nTraceback (most recent call last)" in text:
        return text.rpartition("\n")[2][:_MESSAGE_CHARACTERS]
    return ""


def end_of(path: Path) -> str:
    """The last 64 KiB of a text, cleaned; "" where it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
    if size > _TAIL_BYTES:  # half a line may be half a secret, which nobody recognises
        text = "".join(re.split(r"[\r\n]", text, maxsplit=1)[1:])
    return cleaned(text)
