"""Progress for a person: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)

_SECONDS_A_LINE = 15.0


class TrainingProgress:
    """Step n of N with loss, reward margin, accuracy, pairs/s and ETA.

    Args:
        name: of the run.
        enabled: whether to show anything; train.log gets its lines in any case.
    """

    def __init__(self, name: str, enabled: bool):
        self._bar = (
            _bar(TextColumn("{task.fields[numbers]}")) if enabled and sys.stderr.isatty() else None
        )
        self._name = name
        self._total = 0
        self._task = None if self._bar is None else self._bar.add_task(name, total=None, numbers="")

    def begin(self, step: int, total: int) -> None:
        """Starts at `step` of `total`."""
        self._total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total, completed=step)
            self._bar.start()

    def advance(self, step: int) -> None:
        """`step` optimizer steps are done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, logs: dict[str, float]) -> None:
        """New numbers, of training or (prefixed `eval/`) of held-out pairs."""
        prefix, where = ("eval/", "held out: ") if "eval/loss" in logs else ("", "")
        text = (
            f"{where}loss {logs[f'{prefix}loss']:.4f} · reward margin "
            f"{logs[f'{prefix}rewards/margins']:+.3f} · "
            f"accuracy {logs[f'{prefix}rewards/accuracies']:.1%}"
        )
        if not prefix:
            text += f" · {logs['pairs_per_second']:.2f} pairs/s"
        logger.info("step %d/%d %s%s", step, self._total, text, self._eta(step, logs))
        if self._bar is not None and self._task is not None and not prefix:
            self._bar.update(self._task, numbers=text)

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        """Leaves the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def _eta(self, step: int, logs: dict[str, float]) -> str:
        if "elapsed_s" not in logs or not step:
            return ""
        left = logs["elapsed_s"] / step * (self._total - step)
        return f" · {left / 60:.1f} min left"


@contextlib.contextmanager
def scoring_progress(metric: str, enabled: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A callback (done, total) that moves a bar."""
    if not enabled:
        yield None
        return
    with counting_progress(f"scoring {metric}", "pairs") as progress:
        yield progress


@contextlib.contextmanager
def counting_progress(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that moves a bar with a time to go.

    Args:
        label: what is being done.
        unit: of what is counted.
    """
    if not sys.stderr.isatty():
        yield _Lines(label, unit)
        return
    with _bar() as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """The callback where there is no terminal: a line at most every few seconds."""

    def __init__(self, label: str, unit: str):
        self._label, self._unit = label, unit
        self._begin = self._last = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._begin = done, now
        if now - self._last <= _SECONDS_A_LINE:
            return
        self._last, eta = now, ""
        if done > self._first:
            left = (now - self._begin) / (done - self._first) * (total - done)
            eta = f" · {left / 60:.1f} min left"
        logger.info("%s: %d of %d %s%s", self._label, done, total, self._unit, eta)


def _bar(*more: TextColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        *more,
        console=Console(stderr=True),
    )
