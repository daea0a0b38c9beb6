"""The processes that train, a run or a sweep of them: one at a time, and what can be done to it.

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
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from app.children import environment
from app.job_files import (
    ENDING,
    JOBS,
    folders,
    is_name,
    is_sweep,
    job_folder,
    make_empty,
    read_record,
    status_of,
    whole,
    write_record,
)
from gapo_lite.disk import file_lock, replace_text, telling_disk_errors
from gapo_lite.errors import RunError
from gapo_lite.runs import ACTIVE_STATES, Run, now, remove_run

_PATIENCE = 15.0  # seconds that one change waits for another, such as the removal of a large run


@dataclass(frozen=True, slots=True)
class Worker:
    """A process that trains now.

    Attributes:
        pid: as it says itself.
        lock: that it holds.
        by_page: whether a page has started it.
        stop_asked: whether it was asked to end.
    """

    pid: Any
    lock: Path
    by_page: bool
    stop_asked: bool

    def state(self, status: dict[str, Any]) -> str:
        """preparing, starting, running or stopping."""
        if self.stop_asked:
            return "stopping"
        if self.pid is None or status.get("pid") != self.pid:
            return "preparing"  # what the status says, if anything, is of an earlier process
        state = str(status.get("state"))
        return state if state in ACTIVE_STATES else "running"  # it has only to tidy up


# -- one at a time --


@contextlib.contextmanager
def changing(runs_dir: Path) -> Iterator[None]:
    """One change at a time, of all servers on this folder.

    Raises:
        RunError: another one takes too long, or nothing can be written here.
    """
    jobs = runs_dir / JOBS
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


def active(runs_dir: Path) -> str | None:
    """Name of the run that is being trained now, whoever started it; where that is a sweep's doing,
    of the sweep."""
    jobs = runs_dir / JOBS
    held = [
        *(job.removesuffix(ENDING) for job in folders(jobs) if _is_held(jobs / job / "lock")),
        *(name for name in folders(runs_dir) if _is_held(runs_dir / name / ".lock")),
    ]
    held.sort(key=lambda name: not is_sweep(runs_dir / name))  # before the run that it trains now
    return next((name for name in held if is_name(name) and worker_of(runs_dir, name)), None)


def doing(runs_dir: Path, name: str, where: str = "") -> str:
    """What an active process does, in words to go on from; `where` begins with a space."""
    status = status_of(runs_dir / name)
    step, total = whole(status.get("step")), whole(status.get("total"))
    if is_sweep(runs_dir / name):
        how_far = f"{step} of {total} runs done" if total else "it prepares its runs"
        return f"the sweep {name} is at work{where} ({how_far})"
    how_far = f"step {step} of {total}" if total else "it prepares its data"
    return f"the run {name} is being trained{where} ({how_far})"


def refuse_while_another_trains(runs_dir: Path) -> None:
    """One training at a time; to be asked within `changing`.

    Raises:
        RunError: there is one.
    """
    if busy := active(runs_dir):
        raise RunError(f"{doing(runs_dir, busy)}: wait for it or stop it; one training at a time.")


def launch(runs_dir: Path, name: str, arguments: Sequence[str], config: str | None = None) -> None:
    """A new process of the command line, for a new run or to go on with one; within `changing`.

    Args:
        runs_dir: folder of all runs.
        name: of the run or sweep.
        arguments: of the command line; in front of them `config` stands for its file.
        config: a new run's configuration.

    Raises:
        RunError: no process can be started, or nothing can be written here.
    """
    folder = job_folder(runs_dir, name)
    command = [sys.executable, "-m", "gapo_lite", *arguments, "--runs-dir", str(runs_dir)]
    record = {
        **{"pid": None, "command": command, "started": now()},
        **{"resumed": config is None, "stop_asked": None},
    }
    make_empty(folder)
    with (
        telling_disk_errors(folder),
        file_lock(folder / "lock", patience=_PATIENCE) as lock,  # who looks has it for a moment
        (folder / "output.log").open("wb") as output,
    ):
        if config is not None:
            replace_text(folder / "config.yaml", config)
        # Before the process: a server that is killed in between leaves one that can be found.
        write_record(folder, record)
        try:
            process = _process(command, output, lock)
        except OSError as error:
            remove_run(Run(folder))
            raise RunError(f"no training process can be started: {error}.") from None
        threading.Thread(target=_reap, args=(process,), daemon=True).start()
        write_record(folder, {**record, "pid": process.pid})


# -- one that is at work --


def worker_of(runs_dir: Path, name: str) -> Worker | None:
    """The process that trains a run, or works on a sweep, now."""
    path, job = runs_dir / name, job_folder(runs_dir, name)
    if _is_held(job / "lock"):
        record = read_record(job / "job.json")
        if not _is_over(record.get("pid")):
            pid = record.get("pid") or status_of(path).get("pid")
            return Worker(pid, job / "lock", True, bool(record.get("stop_asked")))
    if _is_held(path / ".lock"):
        pid, record = status_of(path).get("pid"), read_record(job / "job.json")
        stop_asked = bool(record.get("stop_asked")) and record.get("pid") == pid
        return Worker(pid, path / ".lock", False, stop_asked)
    return None


def ask_to_stop(runs_dir: Path, name: str, worker: Worker) -> None:
    """Asks it to save at the end of its step and to end; asking twice does no harm. Within
    `changing`.

    Raises:
        RunError: it is not ours to stop.
    """
    if worker.stop_asked:  # a second SIGTERM means: at once, without saving
        return
    send(worker, name, signal.SIGTERM)
    folder = job_folder(runs_dir, name)
    if not worker.by_page:  # what lies there is of an earlier process, if anything
        make_empty(folder)
    record = read_record(folder / "job.json")
    write_record(folder, {**record, "pid": worker.pid, "stop_asked": now()})


def send(worker: Worker, name: str, number: signal.Signals) -> None:
    """A signal to a process that is this run's training beyond doubt; SIGKILL goes to the whole
    group of one that the page started.

    Raises:
        RunError: it may be another program.
    """
    pid = whole(worker.pid)
    if pid < 2 or not _holds(pid, worker.lock) or not _is_our_program(pid):
        raise RunError(
            f"the run {name} is being trained by a process that the page cannot end (pid "
            f"{pid or 'unknown'}): it is another user's or another program's, or has only just "
            "begun. Try again, or stop it where it was started."
        )
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        if number == signal.SIGKILL and worker.by_page:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)


# -- private --


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
        not {"train", "demo", "sweep"}.isdisjoint(arguments)
    )


def _is_over(pid: Any) -> bool:
    """Whether a process has ended, though others may hold what it held; never for an unknown one,
    as it is for a moment at the start."""
    if not whole(pid):
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
