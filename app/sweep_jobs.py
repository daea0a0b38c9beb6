"""Sweeps as the page sees them: start, resume, stop, find again, delete.

A sweep's folder is made here, so that a bad name is told at once; its process is
`gapo-lite sweep --resume NAME`, of the same kind as a training's (see processes.py).
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from app import processes
from app.job_files import (
    end_of,
    folders,
    is_name,
    is_sweep,
    job_folder,
    read_record,
    status_of,
    sweep_outcome,
    whole,
)
from app.processes import Worker, changing, worker_of
from gapo_lite.errors import ConfigError, RunError
from gapo_lite.runs import Run, check_name, remove_run
from gapo_lite.sweep_config import SweepConfig
from gapo_lite.sweep_folder import SweepFolder, create_sweep


@dataclass(frozen=True, slots=True)
class SweepReport:
    """How a sweep stands.

    Attributes:
        name: of the sweep.
        state: preparing (before it has said anything), starting, running, stopping, stopped,
            finished, failed, or interrupted (its process is gone without a word).
        message: what went wrong or why it stopped, "" where there is nothing to say.
        done: runs that have ended.
        total: all its runs; 0 while unknown.
        cell: the run that is being trained now, "" for none.
        is_active: whether a process works on it.
    """

    name: str
    state: str
    message: str
    done: int
    total: int
    cell: str
    is_active: bool


def start(sweep: SweepConfig, runs_dir: Path, name: str | None, default_name: str) -> str:
    """Starts a sweep and returns its name.

    Args:
        sweep: what it tries.
        runs_dir: folder of all runs.
        name: what a person asked for, or None for `default_name`, `default_name-2`, …
        default_name: see `name`.

    Raises:
        RunError: a run or sweep is being trained, a name is bad or in use, or nothing can be
            started or written here.
    """
    with changing(runs_dir):
        processes.refuse_while_another_trains(runs_dir)
        folder = create_sweep(sweep, runs_dir, name, default_name)
        try:
            _launch(folder)
        except BaseException:
            remove_run(Run(folder.path))
            raise
    return folder.name


def resume(runs_dir: Path, name: str) -> None:
    """Goes on with a sweep: runs that have not ended, and those that failed.

    Raises:
        ConfigError: what it tries cannot be read any more.
        RunError: there is no such sweep, nothing is left of it to do, or another one is at work.
    """
    folder = existing(runs_dir, name)
    if not folder.to_come():
        raise RunError(f"the sweep {name} is finished, so there is nothing to go on with.")
    with changing(runs_dir):
        processes.refuse_while_another_trains(runs_dir)
        _launch(folder)


def stop(runs_dir: Path, name: str) -> None:
    """Asks a sweep to save the run that is being trained, and to end.

    Raises:
        RunError: nobody works on it, or a process that is not ours to stop.
    """
    with changing(runs_dir):
        processes.ask_to_stop(runs_dir, name, _worker_to_end(runs_dir, name))


def kill(runs_dir: Path, name: str) -> None:
    """Ends a sweep at once; what its run has not saved is lost.

    Raises:
        RunError: as `stop`.
    """
    with changing(runs_dir):
        processes.send(_worker_to_end(runs_dir, name), name, signal.SIGKILL)


def existing(runs_dir: Path, name: str) -> SweepFolder:
    """A sweep's folder, one of `runs_dir` and nothing else.

    Raises:
        RunError: there is no such sweep.
    """
    if not name:
        raise RunError("no sweep is chosen: choose one first.")
    check_name(name)
    path = runs_dir / name
    if path.is_symlink() or not is_sweep(path):
        raise RunError(f"there is no sweep {name}: it may have been deleted.")
    return SweepFolder(path)


def names(runs_dir: Path) -> list[str]:
    """All sweeps, oldest first."""
    found = [name for name in folders(runs_dir) if is_name(name) and is_sweep(runs_dir / name)]
    return sorted(found, key=lambda name: (_age(runs_dir / name), name))


def report(runs_dir: Path, name: str) -> SweepReport:
    """How a sweep stands now.

    Raises:
        RunError: there is no such sweep.
    """
    folder = existing(runs_dir, name)
    worker = worker_of(runs_dir, name)  # first: a process that ends meanwhile has written status
    status, record = status_of(folder.path), read_record(job_folder(runs_dir, name) / "job.json")
    if worker:
        state, message = worker.state(status), ""
    else:
        state, message = sweep_outcome(folder.path, status, record)
    cell = status.get("cell")
    return SweepReport(
        name=name,
        state=state,
        message=message,
        done=whole(status.get("done")),
        total=whole(status.get("total")),
        cell=cell if worker and isinstance(cell, str) and is_name(cell) else "",
        is_active=worker is not None,
    )


def tail(runs_dir: Path, name: str, lines: int = 30) -> str:
    """The last lines that the sweep's process printed, as jobs.tail cleans them; "" of one that was
    started elsewhere.

    Raises:
        RunError: there is no such sweep.
    """
    existing(runs_dir, name)
    text = end_of(job_folder(runs_dir, name) / "output.log")
    return "\n".join(text.splitlines()[-lines:])


def runs_of(folder: SweepFolder) -> list[str]:
    """Names of its runs that there are; of one that cannot be read any more, none."""
    try:
        return [cell.run for cell in folder.cells if (folder.runs_dir / cell.run).is_dir()]
    except ConfigError:
        return []


def delete(runs_dir: Path, name: str) -> None:
    """Removes a sweep, its report and all its runs.

    Raises:
        RunError: there is no such sweep, it is at work, or not all of it can be removed.
    """
    with changing(runs_dir):
        folder = existing(runs_dir, name)
        if worker_of(runs_dir, name):
            raise RunError(f"the sweep {name} is at work: stop it first.")
        runs = runs_of(folder)
        if busy := [run for run in runs if worker_of(runs_dir, run)]:
            raise RunError(f"its run {busy[0]} is being trained: stop that first.")
        places = [runs_dir / run for run in runs] + [job_folder(runs_dir, run) for run in runs]
        with folder.lock():
            # The sweep itself last: what could not be removed is still found then.
            for place in (*places, job_folder(runs_dir, name), folder.path):
                _remove(place)


def _launch(folder: SweepFolder) -> None:
    processes.launch(folder.runs_dir, folder.name, ["sweep", "--resume", folder.name])


def _worker_to_end(runs_dir: Path, name: str) -> Worker:
    existing(runs_dir, name)
    worker = worker_of(runs_dir, name)
    if worker is None:
        raise RunError(f"the sweep {name} is not at work, so there is nothing to stop.")
    return worker


def _remove(place: Path) -> None:
    if place.is_symlink():
        return
    remove_run(Run(place))
    if place.exists():
        raise RunError(f"not all of {place} could be removed: a file in it may not be this user's.")


def _age(folder: Path) -> float:
    try:
        return (folder / "sweep.yaml").stat().st_mtime
    except OSError:  # deleted meanwhile
        return 0.0
