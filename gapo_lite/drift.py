"""The drift guard: how far the held-out chosen answers have become less likely than at the start.

All of it follows from the evaluations in metrics.jsonl, of which the one at step 0 is the base
model's. Nothing is kept elsewhere, so a run that was killed and goes on knows what it knew.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapo_lite.checkpoints import list_checkpoints, verify_checkpoint
from gapo_lite.runs import Run

LOGPS = "eval/logps/chosen"
FALL = "eval/logps/chosen_fall"
"""The column of metrics.jsonl with what the guard watches, in nats a token."""

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


@dataclass(frozen=True, slots=True)
class Fall:
    """What an evaluation said of the held-out chosen answers.

    Attributes:
        step: of the evaluation.
        base, now: their log-probability at step 0 and then, in nats a token.
    """

    step: int
    base: float
    now: float

    @property
    def nats(self) -> float:
        """By how much they are less likely, in nats a token; negative where they are more so."""
        return self.base - self.now

    def is_within(self, limit: float) -> bool:
        """Whether that is allowed; what is not a number is not."""
        return self.nats <= limit


@dataclass(frozen=True, slots=True)
class Drift:
    """The newest evaluation where it lies beyond the limit.

    Attributes:
        fall: what it said.
        limit: `training.max_chosen_fall`.
        is_new: whether the evaluation before it was within the limit.
        good_step: of the newest evaluation that was.
        good: the newest whole checkpoint at or before that one, if there is any.
    """

    fall: Fall
    limit: float
    is_new: bool
    good_step: int
    good: Path | None

    def what(self) -> str:
        """What was found, with step and numbers."""
        fall = self.fall
        return (
            f"At step {fall.step} the log-probability of the held-out chosen answers was "
            f"{fall.nats:.2f} nats a token below the base model's ({fall.base:.2f} → "
            f"{fall.now:.2f}); training.max_chosen_fall is {self.limit:g}."
        )

    def warning(self) -> str:
        """For a run that goes on."""
        good = f"{self.good.name} is the last from before it. " if self.good else ""
        return f"{self.what()} {good}{_REMEDY}"

    def farewell(self) -> str:
        """For a run that ends by this."""
        kept = (
            f"adapter/ is that of {self.good.name}, the last checkpoint from before it."
            if self.good
            else f"No checkpoint was saved by step {self.good_step}, the last evaluation within "
            f"the limit, so adapter/ is that of step {self.fall.step}: lower training.save_steps."
        )
        return f"{self.what()} So training.on_drift stopped it. {kept} {_REMEDY}"


_REMEDY = (
    "Start a new run with a third of the training.learning_rate or fewer training.epochs; if it "
    "falls again, with a lower margin.gamma."
)


def look(run: Run, limit: float | None) -> Drift | None:
    """What the newest evaluation of a run says; None where it is within the limit, or there is no
    limit, or nothing was held out.

    Args:
        run: its folder.
        limit: `training.max_chosen_fall`, in nats a token.
    """
    falls = falls_of(run.metrics()) if limit is not None else []
    if limit is None or not falls or falls[-1].is_within(limit):
        return None
    good_step = max(fall.step for fall in falls if fall.is_within(limit))  # the base's own is 0
    is_new = falls[-2].is_within(limit)
    return Drift(falls[-1], limit, is_new, good_step, _whole_checkpoint(run, good_step))


def last_good_step(rows: Iterable[Mapping[str, Any]], limit: float | None) -> int | None:
    """Step of the newest evaluation within the limit; None where none is looked at."""
    if limit is None:
        return None
    good = [fall.step for fall in falls_of(rows) if fall.is_within(limit)]
    return max(good, default=None)


def falls_of(rows: Iterable[Mapping[str, Any]]) -> list[Fall]:
    """What each evaluation said, oldest first; nothing where the base model's is not among them."""
    known = [(int(row["step"]), float(row[LOGPS])) for row in rows if LOGPS in row]
    if not known or known[0][0] != 0 or not math.isfinite(known[0][1]):
        return []
    return [Fall(step, known[0][1], now) for step, now in known]


def with_fall(
    metrics: Mapping[str, float], step: int, rows: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """An evaluation's metrics with FALL, where the base model was evaluated too.

    Args:
        metrics: of the evaluation.
        step: at which it is.
        rows: what was logged before.
    """
    falls = falls_of([*rows, {"step": step, LOGPS: metrics[LOGPS]}])
    return {**metrics, **({FALL: falls[-1].nats} if falls else {})}


def copy_adapter(checkpoint: Path, folder: Path) -> None:
    """What peft loads of a checkpoint, to a new folder."""
    folder.mkdir()
    for name in _ADAPTER_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)


def _whole_checkpoint(run: Run, step: int) -> Path | None:
    """The newest one at or before a step that is as it was written."""
    older = [path for number, path in list_checkpoints(run.checkpoints) if number <= step]
    return next((path for path in reversed(older) if not verify_checkpoint(path)), None)
