"""The sweep's folder: everything that is known of a sweep, for its process to write and for others
to read. It lies among the runs, and its runs are ordinary run folders beside it.

    runs/<sweep>/
      sweep.yaml           what it tries, its base written out
      sweep-status.json    state, cell under way, done of total, heartbeat
      base.json            the base model's answers, measured; they are in base_answers.jsonl
      agree.json           gaps against the data's own judgements, where there are any
      rounds.json          of successive halving: steps of a round → contenders that went on
      cells/<run>.json     what came of a cell
      report.html, .md     see report.py
    runs/<sweep>-<contender>-s<seed>/

As with runs, a sweep is alive while its process holds the lock on `.lock`. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gapo_lite.disk import replace_text, telling_disk_errors
from gapo_lite.errors import RunError
from gapo_lite.runs import ACTIVE_STATES, Run, create_run, folders_with, remove_run
from gapo_lite.sweep_config import Cell, SweepConfig, cells_of, load_begun, to_yaml

ENDED = ("finished", "dropped")
"""States of a cell that is never trained again; a failed one is tried anew."""


@dataclass(frozen=True)
class SweepFolder:
    """A sweep's folder.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def runs_dir(self) -> Path:
        """Where its runs lie."""
        return self.path.parent

    @cached_property
    def config(self) -> SweepConfig:
        """What it tries."""
        return load_begun(self.path / "sweep.yaml")

    @cached_property
    def cells(self) -> list[Cell]:
        """All its cells, in the order in which they are trained."""
        return cells_of(self.config, self.name)

    # -- read side --

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty where it is not there (yet)."""
        return Run(self.path).read(name)

    def state(self) -> str:
        """starting, running, stopped, finished, failed, or interrupted (its process is gone without
        a word)."""
        state = str(self.read("sweep-status.json").get("state", "starting"))
        return "interrupted" if state in ACTIVE_STATES and not self.is_locked() else state

    def is_locked(self) -> bool:
        """Whether a process works on it now."""
        return Run(self.path).is_locked()

    def results(self) -> dict[str, dict[str, Any]]:
        """What came of the cells that have ended: name of the run → record; see sweep_cells.py."""
        found = {}
        for path in sorted((self.path / "cells").glob("*.json")):
            with contextlib.suppress(ValueError, OSError):
                record = json.loads(path.read_text(encoding="utf-8"))
                if _is_record(record) and record["run"] == path.stem:
                    found[path.stem] = record
        return found

    def to_come(self) -> list[Cell]:
        """Cells that have not ended, in the order in which they are trained."""
        results = self.results()
        return [one for one in self.cells if results.get(one.run, {}).get("state") not in ENDED]

    def seconds_left(self) -> float | None:
        """Estimate for the cells to come, from the mean of those that have ended; None before."""
        taken = [record["seconds"] for record in self.results().values() if record.get("seconds")]
        return statistics.mean(taken) * len(self.to_come()) if taken else None

    # -- write side --

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Replaces a JSON file of the folder in one step."""
        Run(self.path).write(name, content)

    def record(self, result: dict[str, Any]) -> None:
        """Keeps what came of a cell; whole or not at all."""
        with telling_disk_errors(self.path):
            (self.path / "cells").mkdir(exist_ok=True)
        self.write(f"cells/{result['run']}.json", result)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Holds the sweep for this process.

        Raises:
            RunError: another process works on it.
        """
        return Run(self.path).lock("the sweep", "sweep-status.json")


def _is_record(found: Any) -> bool:
    """Whether a file that may be damaged says of a run what is relied on."""
    return (
        isinstance(found, dict)
        and isinstance(found.get("run"), str)
        and isinstance(found.get("state"), str)
        and isinstance(found.get("seconds", 0), int | float)
    )


def create_sweep(
    config: SweepConfig, runs_dir: Path, name: str | None, default: str
) -> SweepFolder:
    """A new sweep's folder; nothing is trained yet.

    Args:
        config: what it tries.
        runs_dir: folder of all runs.
        name: what a person asked for, or None for `default`, `default-2`, …
        default: used where no name is given.

    Raises:
        RunError: the name is in use, cannot be one, or one of its runs' names is in use or too
            long.
    """
    folder = SweepFolder(create_run(runs_dir, name, default).path)
    try:
        _check_run_names(config, folder)
        replace_text(folder.path / "sweep.yaml", to_yaml(config))
    except BaseException:
        remove_run(Run(folder.path))  # a full disk leaves half a file in it
        raise
    return folder


def _check_run_names(config: SweepConfig, folder: SweepFolder) -> None:
    names = [cell.run for cell in cells_of(config, folder.name)]
    longest = max(names, key=len)
    if len(longest) > 100:
        raise RunError(
            f"{longest} would be a run's name of {len(longest)} characters, and 100 are the most: "
            "give the sweep a shorter --name."
        )
    taken = [name for name in names if (folder.runs_dir / name).exists()]
    if taken:
        raise RunError(
            f"{folder.runs_dir} has {len(taken)} of the runs of a sweep {folder.name} already, "
            f"such as {taken[0]}. Choose another --name, or remove them."
        )


def open_sweep(name: str | Path, runs_dir: Path) -> SweepFolder:
    """An existing sweep, by its name in `runs_dir` or by its folder's path.

    Raises:
        RunError: there is no such sweep.
    """
    for path in (runs_dir / name, Path(name)):
        if (path / "sweep.yaml").is_file():
            return SweepFolder(path if path.name not in ("", "..") else path.resolve())
    known = [sweep.name for sweep in list_sweeps(runs_dir)]
    hint = (
        f"Sweeps in {runs_dir}: {', '.join(known[-8:])}."
        if known
        else f"{runs_dir} holds no sweeps yet: gapo-lite sweep configs/sweeps/demo.yaml."
    )
    raise RunError(f"there is no sweep {str(name)!r}. {hint}")


def list_sweeps(runs_dir: Path) -> list[SweepFolder]:
    """All sweeps of a folder, oldest first."""
    return [SweepFolder(path) for path in folders_with("sweep.yaml", runs_dir)]
