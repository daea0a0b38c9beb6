"""The training process as the page sees it: start, resume, stop, find again, rename, delete.

    runs/.jobs/<name>.job/
      config.yaml   of a new run
      output.log    what the process printed
      job.json      pid, command, started, resumed, stop_asked
      lock          held by the process for as long as it lives

The server holds nothing: a restarted one, or a second one, reads these folders and the runs' own.
The process is the ordinary command line. It inherits the open `lock` and knows nothing of it; the
system releases it when the process ends, however that happens, so no pid or flag can be stale.

Grandchildren: one that is forked and not executed, such as a dataloader's worker, inherits the
lock too and could outlive the process. So a held lock counts only while the process itself is
there as well (no other can get its pid while they last: it is the number of their group); whoever
started it ends what it leaves behind; and each launch makes a new lock file, whoever still holds
the old one.

Folders end in .job because `*/config.yaml` and `*/adapter` are how runs are found, and both are
allowed as names of runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from app.children import cleaned, environment
from gapo_lite.checkpoints import MANIFEST, list_checkpoints, newest_valid_checkpoint
from gapo_lite.config import RunConfig
from gapo_lite.errors import RunError
from gapo_lite.runs import (
    ACTIVE_STATES,
    Run,
    check_name,
    create_run,
    file_lock,
    free_name,
    now,
    remove_run,
    replace_text,
    telling_disk_errors,
)

_JOBS, _ENDING = ".jobs", ".job"
_PATIENCE = 15.0  # seconds that one change waits for another, such as the removal of a large run
_TRACES = (".lock", "config.yaml", "status.json", "metrics.jsonl", "adapter")
_TAIL_BYTES = 64 * 1024
_MESSAGE_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class JobReport:
    """How a run stands.

    Attributes:
        name: of the run.
        state: preparing (data, before the run itself begins), starting, running, stopping,
            stopped, finished, failed, or interrupted (its process is gone and saved nothing more).
        message: what went wrong, "" where nothing did.
        pid: of the process that trains it now.
        step: optimizer steps done.
        total: optimizer steps to do; 0 while unknown.
        heartbeat_age: seconds since the process last said where it is.
        resumable: whether `resume` would go on with it.
        why_not: a sentence where it would not, else "".
    """

    name: str
    state: str
    message: str
    pid: int | None
    step: int
    total: int
    heartbeat_age: float | None
    resumable: bool
    why_not: str


@dataclass(frozen=True, slots=True)
class _Training:
    """A process that trains now: who it is (as it says), the lock it holds, who started it."""

    pid: Any
    lock: Path
    by_page: bool
    stop_asked: bool


# -- one training at a time --


def start(
    config: RunConfig, runs_dir: Path, name: str | None = None, default_name: str = "run"
) -> str:
    """Starts a training process and returns the run's name.

    Args:
        config: the settings.
        runs_dir: folder of all runs; made where it is missing.
        name: what a person asked for, or None for `default_name`, `default_name-2`, …
        default_name: see `name`.

    Raises:
        RunError: another run is being trained, the name is bad or in use, or nothing can be
            started or written here.
    """
    with _changing(runs_dir):
        _refuse_while_another_trains(runs_dir)
        name = free_name(runs_dir, name, default_name)
        _launch(runs_dir, name, config)
    return name


def resume(runs_dir: Path, name: str) -> None:
    """Goes on with a run, in a new process.

    Raises:
        ConfigError: the run's own settings cannot be read any more.
        RunError: it cannot go on (see `why_not_resumable`), or another run is being trained.
    """
    run = _existing(runs_dir, name)
    _refuse(why_not_resumable(run))
    run.config()
    newest_valid_checkpoint(run.checkpoints, lambda text: None)  # hashes: too slow for a report
    with _changing(runs_dir):
        _refuse(why_not_resumable(run))
        _refuse_while_another_trains(runs_dir)
        _launch(runs_dir, name, None)


def why_not_resumable(run: Run) -> str:
    """A sentence on why a run cannot go on; "" where it can.

    Checkpoints are judged by the sizes of their files: `resume` looks closer.
    """
    if _training(run.path.parent, run.name):
        return f"the run {run.name} is being trained now."
    if _status(run).get("state") == "finished":
        return f"the run {run.name} is finished, so there is nothing to go on with."
    saved = list_checkpoints(run.checkpoints)
    if not saved or not (run.path / "config.yaml").is_file():
        return f"the run {run.name} has saved nothing yet: start it again as a new run."
    if all(_is_torn(path) for _, path in saved):
        return f"all checkpoints of the run {run.name} are damaged: start it again as a new run."
    return ""


def stop(runs_dir: Path, name: str) -> None:
    """Asks a training to save at the end of its step and to end; before there is anything to
    save, it ends at once. Asking twice does no harm.

    Raises:
        RunError: it is not being trained, or by a process that is not ours to stop.
    """
    with _changing(runs_dir):
        training = _training_to_end(runs_dir, name)
        if training.stop_asked:  # a second SIGTERM means: at once, without saving
            return
        _signal(training, name, signal.SIGTERM)
        folder = _folder(runs_dir, name)
        if not training.by_page:  # what lies there is of an earlier process, if anything
            _make_empty(folder)
        record = _read(folder / "job.json")
        _write_record(folder, {**record, "pid": training.pid, "stop_asked": now()})


def kill(runs_dir: Path, name: str) -> None:
    """Ends a training at once; what came after its last checkpoint is lost.

    Raises:
        RunError: it is not being trained, or by a process that is not ours to end.
    """
    with _changing(runs_dir):
        _signal(_training_to_end(runs_dir, name), name, signal.SIGKILL)


# -- looking --


def report(runs_dir: Path, name: str) -> JobReport:
    """How a run stands now.

    Raises:
        RunError: there is no such run.
    """
    run = _existing(runs_dir, name)
    training = _training(runs_dir, name)  # first: a process that ends meanwhile has written status
    status, record = _status(run), _read(_folder(runs_dir, name) / "job.json")
    if training:
        state, message = _state_of_training(training, status), ""
    else:
        state, message = _outcome(run, status, record)
    why_not = why_not_resumable(run)
    # What an earlier process said is no sign of life of this one.
    heartbeat = 0.0 if state == "preparing" else _as_time(status.get("heartbeat"))
    return JobReport(
        name=name,
        state=state,
        message=message,
        pid=_whole(training.pid) or None if training else None,
        step=_whole(status.get("step")),
        total=_whole(status.get("total")),
        heartbeat_age=max(0.0, now() - heartbeat) if heartbeat else None,
        resumable=not why_not,
        why_not=why_not,
    )


def active(runs_dir: Path) -> str | None:
    """The run that is being trained now, whoever started it."""
    jobs = runs_dir / _JOBS
    held = [
        *(job.removesuffix(_ENDING) for job in _folders(jobs) if _is_held(jobs / job / "lock")),
        *(name for name in _folders(runs_dir) if _is_held(runs_dir / name / ".lock")),
    ]
    return next((name for name in held if _is_name(name) and _training(runs_dir, name)), None)


def names(runs_dir: Path) -> list[str]:
    """All runs, and what the page started that has no run folder (yet, or because it failed before
    it had one); oldest first. Folders that have no run's name are left to the command line."""
    began: dict[str, float] = {}
    for folder in _folders(runs_dir):
        if _is_name(folder):
            _note_time(began, folder, runs_dir / folder / "config.yaml")
    for folder in _folders(runs_dir / _JOBS):
        name = folder.removesuffix(_ENDING)
        if _is_name(name) and name not in began:
            _note_time(began, name, runs_dir / _JOBS / folder / "config.yaml")
    return sorted(began, key=lambda name: (began[name], name))


def tail(runs_dir: Path, name: str, lines: int = 40) -> str:
    """The last lines of a run's log, or of what its process printed where it has no log yet:
    without escapes, without overwritten progress, without anything that looks like a secret.

    Raises:
        RunError: there is no such run.
    """
    run = _existing(runs_dir, name)
    log = run.path / "train.log"
    text = _end_of(log if log.exists() else _folder(runs_dir, name) / "output.log")
    return "\n".join(text.splitlines()[-max(1, lines) :])


# -- renaming and deleting --


def rename(runs_dir: Path, old: str, new: str) -> None:
    """Gives a run another name.

    Raises:
        RunError: there is no such run, it is being trained, or the new name is bad or in use.
    """
    with _changing(runs_dir), _at_rest(runs_dir, old) as run:
        check_name(new)
        free_name(runs_dir, new, "run")
        if _is_run(run):  # the empty folder, which is then replaced, takes the name
            run.path.rename(create_run(runs_dir, new, "run").path)
        job, new_job = _folder(runs_dir, old), _folder(runs_dir, new)
        if new_job.exists():  # of a run that failed before it had a folder
            shutil.rmtree(new_job)
        if job.exists():
            job.rename(new_job)


def delete(runs_dir: Path, name: str) -> None:
    """Removes a run and all in it.

    Raises:
        RunError: there is no such run, it is being trained, or not all of it can be removed.
    """
    with _changing(runs_dir), _at_rest(runs_dir, name) as run:
        for folder in ([run.path] if _is_run(run) else []) + [_folder(runs_dir, name)]:
            remove_run(Run(folder))
            if folder.exists():
                raise RunError(
                    f"not all of {folder} could be removed: a file in it may not be this user's."
                )


# -- private: places --


def _folder(runs_dir: Path, name: str) -> Path:
    return runs_dir / _JOBS / f"{name}{_ENDING}"


def _make_empty(folder: Path) -> None:
    with telling_disk_errors(folder):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        folder.mkdir()


def _existing(runs_dir: Path, name: str) -> Run:
    """A run, or what was to become one; its path is a folder of `runs_dir` and nothing else."""
    check_name(name)
    run = Run(runs_dir / name)
    if run.path.is_symlink():
        raise RunError(
            f"the run {name} is a link to another place, which the page leaves alone: use the "
            "command line, or move the folder here."
        )
    if not _is_run(run) and not (_folder(runs_dir, name) / "output.log").exists():
        raise RunError(f"there is no run {name}: it may have been renamed or deleted.")
    return run


def _is_run(run: Run) -> bool:
    """Whether training has made this folder; --runs-dir may hold others."""
    return any((run.path / trace).exists() for trace in _TRACES)


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except RunError:
        return False
    return True


def _folders(place: Path) -> list[str]:
    """Names of the folders in a folder; links are none."""
    try:
        with os.scandir(place) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _note_time(times: dict[str, float], name: str, path: Path) -> None:
    with contextlib.suppress(OSError):  # it is not there, or was deleted meanwhile
        times[name] = path.stat().st_mtime


# -- private: the process --


@contextlib.contextmanager
def _changing(runs_dir: Path) -> Iterator[None]:
    """One change at a time, of all servers on this folder."""
    jobs = runs_dir / _JOBS
    with telling_disk_errors(jobs):
        jobs.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(jobs / "start.lock", patience=_PATIENCE))
        except BlockingIOError:
            raise RunError(
                f"another change to the runs in {runs_dir} takes long: try again in a moment."
            ) from None
        yield


@contextlib.contextmanager
def _at_rest(runs_dir: Path, name: str) -> Iterator[Run]:
    """A run that nobody trains, and that nobody can begin to train meanwhile."""
    run = _existing(runs_dir, name)
    if _training(runs_dir, name):
        raise RunError(f"the run {name} is being trained: stop it first.")
    with run.lock() if _is_run(run) else contextlib.nullcontext():
        yield run


def _refuse(why: str) -> None:
    if why:
        raise RunError(why)


def _refuse_while_another_trains(runs_dir: Path) -> None:
    busy = active(runs_dir)
    if busy is None:
        return
    status = _status(Run(runs_dir / busy))
    step, total = _whole(status.get("step")), _whole(status.get("total"))
    where = f"step {step} of {total}" if total else "it prepares its data"
    raise RunError(
        f"the run {busy} is being trained ({where}): wait for it or stop it; one training at a "
        "time."
    )


def _launch(runs_dir: Path, name: str, config: RunConfig | None) -> None:
    """A new process, for a new run or (without `config`) to go on with one."""
    folder = _folder(runs_dir, name)
    what = ["--resume", name] if config is None else [str(folder / "config.yaml"), "--name", name]
    command = [sys.executable, "-m", "gapo_lite", "train", *what, "--runs-dir", str(runs_dir)]
    record = {
        **{"pid": None, "command": command, "started": now()},
        **{"resumed": config is None, "stop_asked": None},
    }
    _make_empty(folder)
    with (
        telling_disk_errors(folder),
        file_lock(folder / "lock") as lock,
        (folder / "output.log").open("wb") as output,
    ):
        if config is not None:
            replace_text(folder / "config.yaml", config.to_yaml())
        # Before the process: a server that is killed in between leaves one that can be found.
        _write_record(folder, record)
        try:
            process = _process(command, output, lock)
        except OSError as error:
            remove_run(Run(folder))
            raise RunError(f"no training process can be started: {error}.") from None
        threading.Thread(target=_reap, args=(process,), daemon=True).start()
        _write_record(folder, {**record, "pid": process.pid})


def _process(command: list[str], output: IO[bytes], lock: int) -> subprocess.Popen[bytes]:
    """Of a session of its own, so that neither Ctrl-C nor a closed terminal reaches it."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(lock,),
        env=environment(),
    )


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Waits for the end of a process, and ends what it leaves behind; its pid is not reused before
    the last line."""
    with contextlib.suppress(OSError):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _training(runs_dir: Path, name: str) -> _Training | None:
    """The process that trains a run now."""
    run, job = Run(runs_dir / name), _folder(runs_dir, name)
    if _is_held(job / "lock"):
        record = _read(job / "job.json")
        if not _is_over(record.get("pid")):
            pid = record.get("pid") or _status(run).get("pid")
            return _Training(pid, job / "lock", True, bool(record.get("stop_asked")))
    if _is_held(run.path / ".lock"):
        pid, record = _status(run).get("pid"), _read(job / "job.json")
        stop_asked = bool(record.get("stop_asked")) and record.get("pid") == pid
        return _Training(pid, run.path / ".lock", False, stop_asked)
    return None


def _training_to_end(runs_dir: Path, name: str) -> _Training:
    _existing(runs_dir, name)
    training = _training(runs_dir, name)
    if training is None:
        raise RunError(f"the run {name} is not being trained, so there is nothing to stop.")
    return training


def _signal(training: _Training, name: str, number: signal.Signals) -> None:
    """A signal to a process that is this run's training beyond doubt; SIGKILL goes to the whole
    group of one that the page started."""
    pid = _whole(training.pid)
    if pid < 2 or not _holds(pid, training.lock) or not _is_our_program(pid):
        raise RunError(
            f"the run {name} is being trained by a process that the page cannot end (pid "
            f"{pid or 'unknown'}): it is another user's or another program's, or has only just "
            "begun. Try again, or stop it where it was started."
        )
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        if number == signal.SIGKILL and training.by_page:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)


def _holds(pid: int, lock: Path) -> bool:
    """Whether a process has a lock's file open: neither a reused pid nor a forged file can do
    that."""
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
        mark = lock.stat()
    except OSError:
        return False
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.path.samestat(descriptor.stat(), mark):
                return True
    return False


def _is_our_program(pid: int) -> bool:
    """Whether a process is the command line and trains, and not a notebook that does."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    programs = {"gapo_lite", "gapo-lite"}
    return any(Path(a).name in programs for a in arguments) and (
        "train" in arguments or "demo" in arguments
    )


def _is_over(pid: Any) -> bool:
    """Whether a process has ended, though others may hold what it held; never for an unknown one,
    as it is for a moment at the start."""
    if not _whole(pid):
        return False
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")  # dead, and not waited for yet


def _is_held(lock: Path) -> bool:
    try:
        with file_lock(lock, probe=True):
            return False
    except BlockingIOError:
        return True
    except OSError:  # it is not there, or not a lock
        return False


# -- private: what the files say --


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none to be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _status(run: Run) -> dict[str, Any]:
    return _read(run.path / "status.json")


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    replace_text(folder / "job.json", json.dumps(record, indent=1) + "\n")


def _whole(value: Any) -> int:
    """A count from a file; 0 for anything else."""
    return value if type(value) is int and value > 0 else 0


def _is_torn(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        return any((checkpoint / name).stat().st_size != size for name, (size, _) in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True


def _state_of_training(training: _Training, status: dict[str, Any]) -> str:
    if training.stop_asked:
        return "stopping"
    if training.pid is None or status.get("pid") != training.pid:
        return "preparing"  # what the status says, if anything, is of an earlier process
    state = str(status.get("state"))
    return state if state in ACTIVE_STATES else "running"  # it has only to tidy up


def _outcome(run: Run, status: dict[str, Any], record: dict[str, Any]) -> tuple[str, str]:
    """State and message of a run that nobody trains."""
    state, message = str(status.get("state")), str(status.get("message", ""))
    if state == "finished":
        return state, ""
    # A process that failed before its training began has written no status.
    is_last = record.get("pid") == status.get("pid") or (
        _as_time(record.get("started")) > _as_time(status.get("heartbeat"))
    )
    output = _folder(run.path.parent, run.name) / "output.log"
    words = _last_words(output) if is_last else ""
    if state == "failed":
        return state, cleaned(message)[:_MESSAGE_CHARACTERS] or words
    if state == "stopped":
        return state, words
    if is_last and record.get("stop_asked") and not list_checkpoints(run.checkpoints):
        return "stopped", "It was stopped before anything was saved."
    if _is_run(run):
        return "interrupted", words or (
            "Its process ended without saving: it was killed, memory ran out, or the machine went "
            "down."
        )
    return "failed", words or (
        "Its process ended without a word before the training began: it was killed, memory ran "
        "out, or the machine went down."
    )


def _as_time(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _last_words(output: Path) -> str:
    """The error that a process ended with; "" where it printed none."""
    text = f"\n{_end_of(output)}".rstrip()
    if "\nerror: " in text:
        return text.rpartition("\nerror: ")[2][:_MESSAGE_CHARACTERS]
    if "\nTraceback (most recent call last)" in text:
        return text.rpartition("\n")[2][:_MESSAGE_CHARACTERS]
    return ""


def _end_of(path: Path) -> str:
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
