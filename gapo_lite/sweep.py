"""A sweep at work: cell after cell on one GPU, whatever kills it on the way.

    config = load_sweep(Path("configs/sweeps/table3.yaml"))
    run_sweep(create_sweep(config, Path("runs"), None, "table3"))
    run_sweep(open_sweep("table3", Path("runs")))      # after a kill: goes on where it was

Nothing is stored of where it stands but what each cell leaves: a cell with a record is done, one
with a run goes on from its newest checkpoint, and who lost a round of successive halving is read
again from the runs' own metrics.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState

from gapo_lite.agree import agree
from gapo_lite.chat import base_voice
from gapo_lite.errors import ConfigError, DataError, GapoError, RunError
from gapo_lite.preparation import Shared, split_once
from gapo_lite.run_callback import status_record
from gapo_lite.runs import Run, now
from gapo_lite.sweep_cells import (
    cell_record,
    failed_record,
    free_memory,
    heldout_prompts,
    is_trained,
    measure_answers,
    train_cell,
)
from gapo_lite.sweep_config import Cell, Halving
from gapo_lite.sweep_folder import ENDED, SweepFolder

logger = logging.getLogger(__name__)

MOST_FAILURES = 3
"""Cells in a row that fail before the whole does: then it is not the cell."""
ROUNDS = "rounds.json"


class _Stop(Exception):
    """The sweep ends here for this time; the text says why."""


@dataclass(frozen=True, order=True)
class _Score:
    """How a contender did in a round: first how many of its seeds came to the end, since a mean of
    those that did looks better than it is, then their mean."""

    num_seeds: int
    mean: float

    def __str__(self) -> str:
        noun = "seed" if self.num_seeds == 1 else "seeds"
        return f"{self.mean:.3f} on {self.num_seeds} {noun}" if self.num_seeds else "no seed"


class _DataChangedError(RunError):
    """No further cell could be compared with those that are there."""


@dataclass(slots=True)
class Budget:
    """What one call may use.

    Attributes:
        hours: of wall-clock time; the run under way then is saved and stopped.
        max_runs: runs trained; one that was trained before, and lacks its record alone, is none.
    """

    hours: float | None = None
    max_runs: int | None = None
    began: float = field(default_factory=time.monotonic)
    used_runs: int = 0

    def time_is_up(self) -> bool:
        """Whether the hours are used."""
        return self.hours is not None and time.monotonic() - self.began >= 3600 * self.hours

    def spent(self) -> str:
        """What is used up, "" while there is some left."""
        if self.time_is_up():
            return f"its {self.hours:g} hours are over"
        if self.max_runs is not None and self.used_runs >= self.max_runs:
            return f"it has trained its {self.max_runs} runs"
        return ""


def run_sweep(
    folder: SweepFolder,
    *,
    budget: Budget | None = None,
    show_progress: bool = True,
    tell: Callable[[str], None] = logger.info,
) -> str:
    """Trains all cells that are not done, and returns the sweep's state: "finished", or "stopped"
    by a signal or the budget.

    Args:
        folder: a new or begun sweep.
        budget: of this call; by default the sweep's own.
        show_progress: bars on stderr.
        tell: hears a line a cell.

    Raises:
        GapoError: nothing of it can be trained, or the disk is full. A cell that fails alone is
            recorded, and the others go on.
    """
    if PartialState().num_processes > 1:
        raise ConfigError("a sweep trains one run after the other: start it as a single process.")
    config = folder.config
    budget = budget or Budget(config.hours, config.max_runs)
    with folder.lock(), _terminated_as_interrupted():
        sweep = _Sweep(folder, budget, show_progress, tell)
        try:
            sweep.work()
        except (_Stop, KeyboardInterrupt) as stop:
            why = str(stop) or "it was interrupted"
            tell(f"Stopped: {why}. Go on with: gapo-lite sweep --resume {folder.path}")
            sweep.say("stopped", message=why)
            return "stopped"
        except GapoError as error:
            sweep.say("failed", message=str(error))
            raise
        sweep.say("finished")
        return "finished"


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM does as Ctrl-C wherever no run is being trained; see run_callback.py for there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Sweep:
    """One call of `run_sweep`."""

    def __init__(
        self, folder: SweepFolder, budget: Budget, show_progress: bool, tell: Callable[[str], None]
    ):
        self.folder, self.budget, self.show_progress = folder, budget, show_progress
        self.tell = tell
        self.shared = Shared()
        self.results = folder.results()
        self.failures = 0
        self.failed: set[str] = set()  # runs that failed in this call, which are not tried again
        self.started = now()

    def work(self) -> None:
        """All cells; with halving only the best of them to their end."""
        self._check_name()
        self.say("running")
        self._ask_the_data()
        self._measure_base()
        halving = self.folder.config.halving
        for cell in self._rounds(halving) if halving else self.folder.cells:
            self._reach(cell, math.inf)

    def _rounds(self, halving: Halving) -> list[Cell]:
        """The cells of the contenders that go on to the end, after all rounds."""
        cells, limit = self.folder.cells, halving.first_steps
        alive = list(dict.fromkeys(cell.contender for cell in cells))
        while sum(name != self.folder.config.baseline for name in alive) > 1:
            kept = self.folder.read(ROUNDS).get(str(limit))
            if kept is None:
                for cell in cells:
                    self._reach(cell, limit)
                if all(self._is_over(cell) for cell in cells):
                    break
                kept = self._better_half(cells, alive, limit, halving)
            self._drop(cell for cell in cells if cell.contender not in kept)
            alive = [name for name in alive if name in kept]
            cells = [cell for cell in cells if cell.contender in alive]
            # A whole number: runs stop at steps, and are compared by what they were there.
            limit = math.ceil(limit * halving.growth)
        return cells

    def _check_name(self) -> None:
        """Runs are named after their sweep, so one with another name knows none of its own."""
        names = {cell.run for cell in self.folder.cells}
        if self.results and names.isdisjoint(self.results):
            raise RunError(
                f"{self.folder.path} has results of other runs than those of a sweep of that name, "
                f"such as {min(self.results)}: it was renamed or copied. Give it its name back, or "
                "start a new sweep; all its runs would be trained again."
            )

    def say(self, state: str, cell: str | None = None, message: str = "") -> None:
        """Writes sweep-status.json."""
        cells = self.folder.cells
        done = sum(self._has_ended(cell) for cell in cells)
        self.folder.write(
            "sweep-status.json",
            {
                **status_record(state, done, len(cells)),
                "done": done,
                "cell": cell,
                "started": self.started,
                "message": message,
            },
        )

    # -- one cell --

    def _has_ended(self, cell: Cell) -> bool:
        return self.results.get(cell.run, {}).get("state") in ENDED

    def _is_over(self, cell: Cell) -> bool:
        """Whether this call has nothing more to do for it."""
        return self._has_ended(cell) or cell.run in self.failed

    def _reach(self, cell: Cell, limit: float) -> None:
        """Trains a cell up to `limit` steps or its end, and records it if it has ended."""
        run = Run(self.folder.runs_dir / cell.run)
        if self._is_over(cell) or self._is_at(run, limit):
            return
        if why := self.budget.spent():
            raise _Stop(why)
        self._announce(cell)
        self.budget.used_runs += not is_trained(_status(run))
        began = time.monotonic()
        try:
            run = train_cell(
                cell,
                self.folder.runs_dir,
                self.shared,
                lambda step: step >= limit or self.budget.time_is_up(),
                show_progress=self.show_progress,
            )
            if run.state() == "finished":
                seconds = time.monotonic() - began
                self._record(cell, run, "finished", seconds)
            elif run.read("status.json").get("stopped_by") == "drift":
                self._record(cell, run, "dropped")
                self.tell(f"{cell.run}: {run.read('status.json')['message']}")
            elif not self._is_at(run, limit):
                raise _Stop(self._why_stopped(run))
            self._heed(run)
        except (_DataChangedError, _Stop):
            raise
        except Exception as error:  # of one cell, whatever it is: the others may fare better
            self._failed(cell, error)
        else:
            self.failures = 0
        finally:
            AcceleratorState._reset_state(reset_partial_state=False)  # another precision may come

    def _is_at(self, run: Run, limit: float) -> bool:
        """Whether it waits at the end of a round."""
        status = _status(run)
        is_waiting = status.get("state") == "stopped" and not run.is_locked()
        return is_waiting and math.isfinite(limit) and int(status.get("step", 0)) >= limit

    def _heed(self, run: Run) -> None:
        """A stop that was asked for while the run came to its end is for the sweep."""
        status = run.read("status.json")
        if status.get("stop_asked") and status["heartbeat"] >= self.started:
            raise _Stop("it was asked to stop")

    def _why_stopped(self, run: Run) -> str:
        message = run.read("status.json").get("message")
        return self.budget.spent() or message or f"the run {run.name} was stopped"

    def _announce(self, cell: Cell) -> None:
        cells = self.folder.cells
        self.say("running", cell.run)
        left = self.folder.seconds_left()
        eta = "" if left is None else f", about {left / 3600:.1f} hours left"
        number = cells.index(cell) + 1
        self.tell(f"cell {number} of {len(cells)}: {cell.contender}, seed {cell.seed}{eta}")

    def _record(self, cell: Cell, run: Run, state: str, seconds: float = 0.0) -> None:
        record = cell_record(
            cell, run, self.folder.config, self.shared, state=state, seconds=seconds
        )
        self._check_same_data(cell, record)
        self._keep(record)

    def _keep(self, record: dict[str, Any]) -> None:
        self.folder.record(record)
        self.results[record["run"]] = record

    def _check_same_data(self, cell: Cell, record: dict[str, Any]) -> None:
        """Numbers on other pairs cannot be compared."""
        for other in self.folder.cells:
            known = self.results.get(other.run, {}).get("data_fingerprint")
            same_source = other.config.data == cell.config.data
            if known and same_source and known != record["data_fingerprint"]:
                raise _DataChangedError(
                    f"the pairs of {cell.config.data.source} have changed since {other.run} was "
                    f"trained, so {cell.run} cannot be compared with it. Restore the data, or "
                    "start a new sweep."
                )

    def _failed(self, cell: Cell, error: Exception) -> None:
        """Recorded; the others go on, unless none of them would fare better."""
        message = str(error) or type(error).__name__
        if not isinstance(error, GapoError):
            logger.warning("%s failed", cell.run, exc_info=error)
            message = f"{type(error).__name__}: {message}"
        self._keep(failed_record(cell, message))
        self.failed.add(cell.run)
        self.failures += 1
        self.tell(f"{cell.run} failed: {message}")
        if self.failures >= MOST_FAILURES:
            raise RunError(
                f"{self.failures} cells in a row have failed, the last one ({cell.run}) with: "
                f"{message}"
            ) from None

    # -- rounds --

    def _better_half(
        self, cells: list[Cell], alive: list[str], limit: int, halving: Halving
    ) -> list[str]:
        """The contenders that go on, the baseline among them. It is kept: a seed that failed then
        and succeeds in a later call changes nothing of it."""
        baseline = self.folder.config.baseline
        rivals = [name for name in alive if name != baseline]
        scores = {name: self._score(cells, name, limit, halving.metric) for name in rivals}
        ranked = sorted(rivals, key=lambda name: scores[name], reverse=True)  # stable
        better = {baseline, *ranked[: math.ceil(len(rivals) * halving.keep)]}
        kept = [name for name in alive if name in better]
        if dropped := [f"{name} ({scores[name]})" for name in alive if name not in better]:
            self.tell(f"After {limit} steps these are dropped: {', '.join(dropped)}")
        self.folder.write(ROUNDS, {**self.folder.read(ROUNDS), str(limit): kept})
        return kept

    def _drop(self, cells: Iterable[Cell]) -> None:
        """Records that no more will come of these cells."""
        for cell in cells:
            run = Run(self.folder.runs_dir / cell.run)
            if not self._has_ended(cell) and _status(run).get("state") == "stopped":
                self._record(cell, run, "dropped")

    def _score(self, cells: list[Cell], name: str, limit: float, metric: str) -> _Score:
        values = [v for c in cells if c.contender == name for v in self._at(c, limit, metric)]
        return _Score(len(values), statistics.mean(values) if values else -math.inf)

    def _at(self, cell: Cell, limit: float, metric: str) -> Iterator[float]:
        """The held-out measure at the end of the round, or where the run finished before; nothing
        of one that failed or that the drift guard stopped on the way, which cannot go on."""
        run = Run(self.folder.runs_dir / cell.run)
        key, status = f"eval/{metric}", _status(run)
        rows = [row for row in run.metrics() if key in row and row["step"] <= limit]
        got_there = bool(rows) and (rows[-1]["step"] >= limit or status.get("state") == "finished")
        has_drifted = status.get("stopped_by") == "drift" and status["step"] <= limit
        if got_there and not has_drifted and math.isfinite(rows[-1][key]):
            yield rows[-1][key]

    # -- what all cells share --

    def _ask_the_data(self) -> None:
        """Whether the gaps follow the data's own judgements, once, where it has any."""
        if self.folder.read("agree.json") or not self._all_have("data"):
            return
        used = [cell.config for cell in self.folder.cells if cell.config.margin.source == "ef"]
        options: dict[str, Any] = {}
        for config in used:
            options |= config.ef.options()
        _, pairs, _, _ = split_once(self.folder.cells[0].config, self.shared)
        metrics = list(dict.fromkeys(config.ef.metric for config in used)) or None
        with contextlib.suppress(DataError):  # no pair was judged
            found = agree(pairs, metrics=metrics, options=options)
            self.folder.write("agree.json", asdict(found))

    def _measure_base(self) -> None:
        """The base model's answers, once, where all cells have the same base and pairs."""
        how, config = self.folder.config.answers, self.folder.cells[0].config
        if self.folder.read("base.json") or not how:
            return
        measured = None
        if self._all_have("model") and self._all_have("data"):
            prompts = heldout_prompts(config, self.shared)
            self.tell(f"the base model answers {min(how.prompts, len(prompts))} prompts")
            out = self.folder.path / "base_answers.jsonl"
            measured = measure_answers(base_voice(config.model), prompts, how, out)
            free_memory()
        self.folder.write("base.json", {"answers": measured})

    def _all_have(self, section: str) -> bool:
        """Whether all cells have the same settings there."""
        first, *others = (getattr(cell.config, section) for cell in self.folder.cells)
        return all(other == first for other in others)


def _status(run: Run) -> dict[str, Any]:
    """What a run says of itself; nothing where that is damaged, which fails the cell in its turn,
    not the sweep."""
    with contextlib.suppress(RunError):
        return run.read("status.json")
    return {}
