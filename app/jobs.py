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
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from app.children import environment
from app.job_files import (
    ENDING,
    JOBS,
    as_time,
    end_of,
    existing,
    folders,
    is_run,
    is_torn,
    job_folder,
    make_empty,
    outcome,
    read_record,
    status_of,
    whole,
    write_record,
)
from gapo_lite.checkpoints import list_checkpoints, newest_valid_checkpoint
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

_PATIENCE = 15.0  # seconds that one change waits for another, such as the removal of a large run


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
    run = existing(runs_dir, name)
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
    if status_of(run).get("state") == "finished":
        return f"the run {run.name} is finished, so there is nothing to go on with."
    saved = list_checkpoints(run.checkpoints)
    if not saved or not (run.path / "config.yaml").is_file():
        return f"the run {run.name} has saved nothing yet: start it again as a new run."
    if all(is_torn(path) for _, path in saved):
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
        folder = job_folder(runs_dir, name)
        if not training.by_page:  # what lies there is of an earlier process, if anything
            make_empty(folder)
        record = read_record(folder / "job.json")
        write_record(folder, {**record, "pid": training.pid, "stop_asked": now()})


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
    run = existing(runs_dir, name)
    training = _training(runs_dir, name)  # first: a process that ends meanwhile has written status
    status, record = status_of(run), read_record(job_folder(runs_dir, name) / "job.json")
    if training:
        state, message = _state_of_training(training, status), ""
    else:
        state, message = outcome(run, status, record)
    why_not = why_not_resumable(run)
    # What an earlier process said is no sign of life of this one.
    heartbeat = 0.0 if state == "preparing" else as_time(status.get("heartbeat"))
    return JobReport(
        name=name,
        state=state,
        message=message,
        pid=whole(training.pid) or None if training else None,
        step=whole(status.get("step")),
        total=whole(status.get("total")),
        heartbeat_age=max(0.0, now() - heartbeat) if heartbeat else None,
        resumable=not why_not,
        why_not=why_not,
    )


def active(runs_dir: Path) -> str | None:
    """The run that is being trained now, whoever started it."""
    jobs = runs_dir / JOBS
    held = [
        *(job.removesuffix(ENDING) for job in folders(jobs) if _is_held(jobs / job / "lock")),
        *(name for name in folders(runs_dir) if _is_held(runs_dir / name / ".lock")),
    ]
    return next((name for name in held if _is_name(name) and _training(runs_dir, name)), None)


def names(runs_dir: Path) -> list[str]:
    """All runs, and what the page started that has no run folder (yet, or because it failed before
    it had one); oldest first. Folders that have no run's name are left to the command line."""
    began: dict[str, float] = {}
    for folder in folders(runs_dir):
        if _is_name(folder):
            _note_time(began, folder, runs_dir / folder / "config.yaml")
    for folder in folders(runs_dir / JOBS):
        name = folder.removesuffix(ENDING)
        if _is_name(name) and name not in began:
            _note_time(began, name, runs_dir / JOBS / folder / "config.yaml")
    return sorted(began, key=lambda name: (began[name], name))


def tail(runs_dir: Path, name: str, lines: int = 40) -> str:
    """The last lines of a run's log, or of what its process printed where it has no log yet:
    without escapes, without overwritten progress, without anything that looks like a secret.

    Raises:
        RunError: there is no such run.
    """
    run = existing(runs_dir, name)
    log = run.path / "train.log"
    text = end_of(log if log.exists() else job_folder(runs_dir, name) / "output.log")
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
        job, new_job = job_folder(runs_dir, old), job_folder(runs_dir, new)
        if new_job.exists():  # of a run that has no folder yet, or failed before it had one
            raise RunError(f"the name {new} is in use: choose another one, or delete that run.")
        if is_run(run):  # the empty folder, which is then replaced, takes the name
            run.path.rename(create_run(runs_dir, new, "run").path)
        if job.exists():
            job.rename(new_job)


def delete(runs_dir: Path, name: str) -> None:
    """Removes a run and all in it.

    Raises:
        RunError: there is no such run, it is being trained, or not all of it can be removed.
    """
    with _changing(runs_dir), _at_rest(runs_dir, name) as run:
        for folder in ([run.path] if is_run(run) else []) + [job_folder(runs_dir, name)]:
            remove_run(Run(folder))
            if folder.exists():
                raise RunError(
                    f"not all of {folder} could be removed: a file in it may not be this user's."
                )


# -- private: places --


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except RunError:
        return False
    return True


def _note_time(times: dict[str, float], name: str, path: Path) -> None:
    with contextlib.suppress(OSError):  # it is not there, or was deleted meanwhile
        times[name] = path.stat().st_mtime


# -- private: the process --


@contextlib.contextmanager
def _changing(runs_dir: Path) -> Iterator[None]:
    """One change at a time, of all servers on this folder."""
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


@contextlib.contextmanager
def _at_rest(runs_dir: Path, name: str) -> Iterator[Run]:
    """A run that nobody trains, and that nobody can begin to train meanwhile."""
    run = existing(runs_dir, name)
    if _training(runs_dir, name):
        raise RunError(f"the run {name} is being trained: stop it first.")
    with run.lock() if is_run(run) else contextlib.nullcontext():
        yield run


def _refuse(why: str) -> None:
    if why:
        raise RunError(why)


def _refuse_while_another_trains(runs_dir: Path) -> None:
    busy = active(runs_dir)
    if busy is None:
        return
    status = status_of(Run(runs_dir / busy))
    step, total = whole(status.get("step")), whole(status.get("total"))
    where = f"step {step} of {total}" if total else "it prepares its data"
    raise RunError(
        f"the run {busy} is being trained ({where}): wait for it or stop it; one training at a "
        "time."
    )


def _launch(runs_dir: Path, name: str, config: RunConfig | None) -> None:
    """A new process, for a new run or (without `config`) to go on with one."""
    folder = job_folder(runs_dir, name)
    what = ["--resume", name] if config is None else [str(folder / "config.yaml"), "--name", name]
    command = [sys.executable, "-m", "gapo_lite", "train", *what, "--runs-dir", str(runs_dir)]
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
            replace_text(folder / "config.yaml", config.to_yaml())
        # Before the process: a server that is killed in between leaves one that can be found.
        write_record(folder, record)
        try:
            process = _process(command, output, lock)
        except OSError as error:
            remove_run(Run(folder))
            raise RunError(f"no training process can be started: {error}.") from None
        threading.Thread(target=_reap, args=(process,), daemon=True).start()
        write_record(folder, {**record, "pid": process.pid})


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
    run, job = Run(runs_dir / name), job_folder(runs_dir, name)
    if _is_held(job / "lock"):
        record = read_record(job / "job.json")
        if not _is_over(record.get("pid")):
            pid = record.get("pid") or status_of(run).get("pid")
            return _Training(pid, job / "lock", True, bool(record.get("stop_asked")))
    if _is_held(run.path / ".lock"):
        pid, record = status_of(run).get("pid"), read_record(job / "job.json")
        stop_asked = bool(record.get("stop_asked")) and record.get("pid") == pid
        return _Training(pid, run.path / ".lock", False, stop_asked)
    return None


def _training_to_end(runs_dir: Path, name: str) -> _Training:
    existing(runs_dir, name)
    training = _training(runs_dir, name)
    if training is None:
        raise RunError(f"the run {name} is not being trained, so there is nothing to stop.")
    return training


def _signal(training: _Training, name: str, number: signal.Signals) -> None:
    """A signal to a process that is this run's training beyond doubt; SIGKILL goes to the whole
    group of one that the page started."""
    pid = whole(training.pid)
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


def _state_of_training(training: _Training, status: dict[str, Any]) -> str:
    if training.stop_asked:
        return "stopping"
    if training.pid is None or status.get("pid") != training.pid:
        return "preparing"  # what the status says, if anything, is of an earlier process
    state = str(status.get("state"))
    return state if state in ACTIVE_STATES else "running"  # it has only to tidy up
