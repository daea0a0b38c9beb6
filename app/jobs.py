"""Trainings as the page sees them: start, resume, stop, find again, rename, delete.

The processes that do the work are in processes.py; all of this is of runs, and sweep_jobs.py the
same of sweeps.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app import processes
from app.job_files import (
    ENDING,
    JOBS,
    as_time,
    end_of,
    existing,
    folders,
    is_name,
    is_run,
    is_sweep,
    is_torn,
    job_folder,
    outcome,
    read_record,
    status_of,
    whole,
)
from app.processes import Worker, changing, worker_of
from gapo_lite.checkpoints import list_checkpoints, newest_valid_checkpoint
from gapo_lite.config import RunConfig
from gapo_lite.errors import RunError
from gapo_lite.runs import Run, check_name, create_run, free_name, now, remove_run


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
    with changing(runs_dir):
        processes.refuse_while_another_trains(runs_dir)
        name = free_name(runs_dir, name, default_name)
        file = str(job_folder(runs_dir, name) / "config.yaml")
        processes.launch(runs_dir, name, ["train", file, "--name", name], config.to_yaml())
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
    with changing(runs_dir):
        _refuse(why_not_resumable(run))
        processes.refuse_while_another_trains(runs_dir)
        processes.launch(runs_dir, name, ["train", "--resume", name])


def why_not_resumable(run: Run) -> str:
    """A sentence on why a run cannot go on; "" where it can.

    Checkpoints are judged by the sizes of their files: `resume` looks closer.
    """
    if worker_of(run.path.parent, run.name):
        return f"the run {run.name} is being trained now."
    if status_of(run.path).get("state") == "finished":
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
    with changing(runs_dir):
        processes.ask_to_stop(runs_dir, name, _worker_to_end(runs_dir, name))


def kill(runs_dir: Path, name: str) -> None:
    """Ends a training at once; what came after its last checkpoint is lost.

    Raises:
        RunError: it is not being trained, or by a process that is not ours to end.
    """
    with changing(runs_dir):
        processes.send(_worker_to_end(runs_dir, name), name, signal.SIGKILL)


# -- looking --


def report(runs_dir: Path, name: str) -> JobReport:
    """How a run stands now.

    Raises:
        RunError: there is no such run.
    """
    run = existing(runs_dir, name)
    worker = worker_of(runs_dir, name)  # first: a process that ends meanwhile has written status
    status, record = status_of(run.path), read_record(job_folder(runs_dir, name) / "job.json")
    if worker:
        state, message = worker.state(status), ""
    else:
        state, message = outcome(run, status, record)
    why_not = why_not_resumable(run)
    # What an earlier process said is no sign of life of this one.
    heartbeat = 0.0 if state == "preparing" else as_time(status.get("heartbeat"))
    return JobReport(
        name=name,
        state=state,
        message=message,
        pid=whole(worker.pid) or None if worker else None,
        step=whole(status.get("step")),
        total=whole(status.get("total")),
        heartbeat_age=max(0.0, now() - heartbeat) if heartbeat else None,
        resumable=not why_not,
        why_not=why_not,
    )


def active(runs_dir: Path) -> str | None:
    """The run that is being trained now, whoever started it; also where a sweep trains it."""
    busy = processes.active(runs_dir)
    if busy is None or not is_sweep(runs_dir / busy):
        return busy
    cell = status_of(runs_dir / busy).get("cell")
    if not isinstance(cell, str) or not is_name(cell):
        return None
    return cell if worker_of(runs_dir, cell) else None


def names(runs_dir: Path) -> list[str]:
    """All runs, and what the page started that has no run folder (yet, or because it failed before
    it had one); oldest first. Folders that have no run's name are left to the command line."""
    began: dict[str, float] = {}
    for folder in folders(runs_dir):
        if is_name(folder):
            _note_time(began, folder, runs_dir / folder / "config.yaml")
    for folder in folders(runs_dir / JOBS):
        name = folder.removesuffix(ENDING)
        if is_name(name) and name not in began:
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
    with changing(runs_dir), _at_rest(runs_dir, old) as run:
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
    with changing(runs_dir), _at_rest(runs_dir, name) as run:
        for folder in ([run.path] if is_run(run) else []) + [job_folder(runs_dir, name)]:
            remove_run(Run(folder))
            if folder.exists():
                raise RunError(
                    f"not all of {folder} could be removed: a file in it may not be this user's."
                )


# -- private --


def _note_time(times: dict[str, float], name: str, path: Path) -> None:
    with contextlib.suppress(OSError):  # it is not there, or was deleted meanwhile
        times[name] = path.stat().st_mtime


@contextlib.contextmanager
def _at_rest(runs_dir: Path, name: str) -> Iterator[Run]:
    """A run that nobody trains, and that nobody can begin to train meanwhile."""
    run = existing(runs_dir, name)
    if worker_of(runs_dir, name):
        raise RunError(f"the run {name} is being trained: stop it first.")
    with run.lock() if is_run(run) else contextlib.nullcontext():
        yield run


def _refuse(why: str) -> None:
    if why:
        raise RunError(why)


def _worker_to_end(runs_dir: Path, name: str) -> Worker:
    existing(runs_dir, name)
    worker = worker_of(runs_dir, name)
    if worker is None:
        raise RunError(f"the run {name} is not being trained, so there is nothing to stop.")
    return worker
