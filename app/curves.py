"""From what a run has logged to the numbers that the page shows: curves, progress, drift, summary.

Nothing here draws, and nothing here imports torch: this runs in the page's server.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from app.history import Columns, History, as_float, config_of, read_history
from gapo_lite.config import RunConfig
from gapo_lite.errors import ConfigError, RunError
from gapo_lite.runs import Run, now

Axis = Literal["step", "epoch"]

MAX_SMOOTHING = 0.99
_ENDS_ROWS = 8
"""Fewer training rows have no beginning and end: batches differ more than a model moves."""
_ENDS_MEAN_ROWS = 20
_RECENT_ROWS = 10
_SAME_TARGET = 0.02


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the page.

    Attributes:
        key: names it, in a file name for example.
        title: above it.
        unit: of the vertical axis, "" for none.
        text: what it shows and what to look for, for a person.
        lines: (key of metrics.jsonl, label) of what is drawn; each also has held-out points where
            there are any.
        target: key whose values, times the reward scale, are drawn in as what the loss asks for.
    """

    key: str
    title: str
    unit: str
    text: str
    lines: tuple[tuple[str, str], ...]
    target: str | None = None


FIGURES = (
    Figure(
        "margin",
        "Reward margin",
        "reward units",
        "How far the chosen answers are ahead of the rejected ones. It should rise; where there is "
        "a target, to about that, and stay there.",
        (("rewards/margins", "reward margin"),),
        target="margin/mean",
    ),
    Figure(
        "loss",
        "Loss",
        "",
        "What training makes smaller. If it rises on held-out pairs while it falls in training, "
        "the model memorises.",
        (("loss", "loss"),),
    ),
    Figure(
        "accuracy",
        "Accuracy",
        "share of pairs",
        "Share of pairs whose chosen answer has the higher reward. 0.5 is guessing.",
        (("rewards/accuracies", "accuracy"),),
    ),
    Figure(
        "rewards",
        "Rewards",
        "reward units",
        "What the objective makes of log-probabilities; GaPO and SimPO: β times their average. The "
        "two lines should part; their distance is the reward margin.",
        (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")),
    ),
    Figure(
        "logps",
        "Average log-probability",
        "nats per token",
        "How likely the model finds the answers. Chosen should hold or rise; a margin that grows "
        "while chosen falls does harm.",
        (("logps/chosen", "chosen"), ("logps/rejected", "rejected")),
    ),
    Figure(
        "learning_rate",
        "Learning rate",
        "",
        "How big the steps are: up while warming up, then as the schedule says.",
        (("learning_rate", "learning rate"),),
    ),
    Figure(
        "grad_norm",
        "Gradient norm",
        "",
        "Length of the gradient before it is clipped. Single peaks are harmless; growth is not.",
        (("grad_norm", "gradient norm"),),
    ),
)
"""The figures in the order in which the page shows them."""


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One line of a figure.

    Attributes:
        key, label: of metrics.jsonl, and for a person.
        x, raw, smoothed: (R,) of the training rows; NaN is a gap.
        heldout_x, heldout_y: (E,) of the evaluations; empty where there are none.
    """

    key: str
    label: str
    x: np.ndarray
    raw: np.ndarray
    smoothed: np.ndarray
    heldout_x: np.ndarray
    heldout_y: np.ndarray


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is and how fast; None is what is not known (yet).

    Attributes:
        eta_s: seconds to the end, evaluations to come included; only of a running run.
        epoch: passes over the training pairs.
        pairs_per_second, tokens_per_second, memory_gib: as last logged.
    """

    eta_s: float | None
    epoch: float | None
    pairs_per_second: float | None
    tokens_per_second: float | None
    memory_gib: float | None


@dataclass(frozen=True, slots=True)
class Ends:
    """How a number began and how it stands.

    Attributes:
        first, last: of the first and the last evaluation, or the means of the first and the last
            training rows.
        heldout: whether they are of held-out pairs.
    """

    first: float
    last: float
    heldout: bool

    @property
    def change(self) -> float:
        """last − first."""
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Drift:
    """Change of the average log-probabilities since the run began, in nats per token.

    Attributes:
        chosen, rejected: below 0 is less likely than before.
        heldout: whether it was measured on held-out pairs, against the base model.
    """

    chosen: float
    rejected: float
    heldout: bool


@dataclass(frozen=True, slots=True)
class Summary:
    """A run's results for the table of runs; None is what is not known (yet).

    Attributes:
        accuracy, reward_margin: of the last evaluation on held-out pairs.
        target_reward_margin: average target margin of the training pairs, in reward units; None
            too where the run asks for none.
        chosen_drift: see Drift.
        duration_s: wall-clock seconds up to the last training row, over all resumes.
    """

    accuracy: float | None
    reward_margin: float | None
    target_reward_margin: float | None
    chosen_drift: float | None
    duration_s: float | None


def asks_for_margin(config: RunConfig) -> bool:
    """Whether a run has a target margin: its objective takes one, and it is not the plain method's
    0."""
    margin = config.margin
    return margin.source in ("ef", "rating") or bool(margin.source and margin.gamma)


def check_view(axis: Axis, smoothing: float) -> None:
    """Checks how a person wants curves drawn; anything may come from a browser.

    Raises:
        ConfigError: an unknown axis, or smoothing out of range.
    """
    if axis not in ("step", "epoch"):
        raise ConfigError(f"the axis has to be step or epoch, but is {axis!r:.40}.")
    if not 0 <= smoothing <= MAX_SMOOTHING:  # NaN is not either
        raise ConfigError(f"smoothing has to be from 0 to {MAX_SMOOTHING}, but is {smoothing}.")


def smooth(y: np.ndarray, strength: float) -> np.ndarray:
    """Debiased exponential moving average, as TensorBoard draws it.

    The same, step by step:

        last, count = 0.0, 0
        for i, value in enumerate(y):
            if isfinite(value):
                last, count = strength * last + (1 - strength) * value, count + 1
                result[i] = last / (1 - strength**count)
            else:
                result[i] = value    # a gap stays a gap, and does not weigh

    Args:
        y: (N,) values.
        strength: 0 (none) to MAX_SMOOTHING.
    """
    result = np.array(y, dtype=np.float64)
    finite = np.isfinite(result)
    values = ((1 - strength) * result[finite]).tolist()
    averages = list(accumulate(values, lambda last, value: strength * last + value))
    result[finite] = averages / (1 - strength ** np.arange(1.0, len(values) + 1))
    return result


def curve(
    history: History,
    key: str,
    *,
    axis: Axis = "step",
    smoothing: float = 0.0,
    label: str = "",
    scale: float = 1.0,
) -> Curve:
    """One number of the history as a line; empty where it was never logged.

    Args:
        history: of a run.
        key: of metrics.jsonl, without `eval/`.
        axis: what the line runs over.
        smoothing: see `smooth`; evaluations are never smoothed.
        label: for a person; none takes the key.
        scale: values are multiplied by it.

    Raises:
        ConfigError: an unknown axis, or smoothing out of range.
    """
    check_view(axis, smoothing)
    x, raw = _points(history.training, key, axis)
    heldout_x, heldout_y = _points(history.evaluation, key, axis)
    raw = raw * scale
    return Curve(key, label or key, x, raw, smooth(raw, smoothing), heldout_x, heldout_y * scale)


def figure_curves(
    history: History,
    figure: Figure,
    *,
    scale: float,
    axis: Axis = "step",
    smoothing: float = 0.0,
) -> tuple[list[Curve], Curve | None]:
    """The lines of a figure, and its target where it has one. A target of the held-out pairs that
    is the training pairs' own is left out.

    Args:
        history: of a run.
        figure: one of FIGURES.
        scale: `objective.reward_scale` of the run's configuration.
        axis, smoothing: see `curve`.

    Raises:
        ConfigError: an unknown axis, or smoothing out of range.
    """
    lines = [
        curve(history, key, axis=axis, smoothing=smoothing, label=label)
        for key, label in figure.lines
    ]
    if figure.target is None:
        return lines, None
    target = curve(
        history, figure.target, axis=axis, smoothing=smoothing, label="target", scale=scale
    )
    return lines, _without_equal_heldout(target)


def progress(run: Run) -> Progress:
    """How far a run is and how long it will take.

    Raises:
        GapoError: a file of the run is damaged.
    """
    status, history = _record(run, "status.json"), read_history(run)
    train = history.training
    return Progress(
        eta_s=_eta(run, history, status) if run.state() == "running" else None,
        epoch=_last(train, "epoch"),
        pairs_per_second=_last(train, "pairs_per_second"),
        tokens_per_second=_last(train, "tokens_per_second"),
        memory_gib=_last(train, "memory_gib"),
    )


def logged(columns: Columns, key: str) -> np.ndarray:
    """The values of a number that are one, in their order; empty where it was never logged."""
    values = columns.get(key, np.zeros(0))
    return values[np.isfinite(values)]


def ends(history: History, key: str) -> Ends | None:
    """How a number began (step 0 is the base model) and how it stands: by the evaluations where
    there are two, else by the training rows, else None."""
    held = logged(history.evaluation, key)
    if len(held) >= 2:
        return Ends(float(held[0]), float(held[-1]), True)
    rows = logged(history.training, key)
    if len(rows) < _ENDS_ROWS:
        return None
    few = min(_ENDS_MEAN_ROWS, len(rows) // 4)
    return Ends(float(rows[:few].mean()), float(rows[-few:].mean()), False)


def drift(history: History) -> Drift | None:
    """How the log-probabilities have moved, None while that cannot be said."""
    chosen, rejected = ends(history, "logps/chosen"), ends(history, "logps/rejected")
    if chosen is None or rejected is None:
        return None
    return Drift(chosen.change, rejected.change, chosen.heldout)


def summary(run: Run) -> Summary:
    """A run's results at a glance.

    Raises:
        GapoError: a file of the run is damaged.
    """
    history = read_history(run)
    moved = drift(history)
    margins = _record(run, "margins.json") if asks_for_margin(config_of(run)) else {}
    return Summary(
        accuracy=_last(history.evaluation, "rewards/accuracies"),
        reward_margin=_last(history.evaluation, "rewards/margins"),
        target_reward_margin=_number(margins, "mean_margin_in_reward_units"),
        chosen_drift=moved.chosen if moved else None,
        duration_s=_last(history.training, "elapsed_s"),
    )


def _points(columns: Columns, key: str, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    if key not in columns:
        return np.zeros(0), np.zeros(0)
    placed = np.isfinite(columns[axis])
    return columns[axis][placed], columns[key][placed]


def _without_equal_heldout(target: Curve) -> Curve:
    """Drops held-out points which say what the training pairs' say: their average is γ."""
    held, own = target.heldout_y[-1:], target.raw[np.isfinite(target.raw)]
    if not len(held) or not len(own) or not np.isclose(held[0], own.mean(), rtol=_SAME_TARGET):
        return target
    return replace(target, heldout_x=np.zeros(0), heldout_y=np.zeros(0))


def _record(run: Run, name: str) -> dict[str, Any]:
    record: Any = run.read(name)
    if not isinstance(record, dict):
        raise RunError(f"{run.path / name} is damaged: it holds no record.")
    return record


def _number(record: dict[str, Any], key: str) -> float | None:
    value = as_float(record.get(key))
    return value if math.isfinite(value) else None


def _last(columns: Columns, key: str) -> float | None:
    """The newest row's value."""
    values = columns.get(key, np.zeros(0))[-1:]
    return float(values[0]) if np.isfinite(values).any() else None


def _eta(run: Run, history: History, status: dict[str, Any]) -> float | None:
    """Steps to come at the recent pace, and evaluations to come. `pairs_per_second` leaves out
    evaluations and checkpoints, and so is true to the pace across them and across a resume."""
    speeds = logged(history.training, "pairs_per_second")[-_RECENT_ROWS:]
    total = int(_number(status, "total") or 0)
    if not len(speeds) or not total or not np.median(speeds) > 0:
        return None
    training = config_of(run).training
    pace = training.batch_size / float(np.median(speeds))
    step = max(_number(status, "step") or 0, _last(history.training, "step") or 0)
    done = int(_last(history.evaluation, "step") or 0)
    pauses = total // training.eval_steps - done // training.eval_steps
    if total % training.eval_steps and done < total:
        pauses += 1  # the last step is always evaluated
    left = (total - max(step, done)) * pace + pauses * _pause(history, pace)
    beat = _number(status, "heartbeat")
    silent_s = 0.0 if beat is None else max(0.0, now() - beat)
    return max(0.0, left - min(silent_s, pace))  # counts down between steps


def _pause(history: History, pace: float) -> float:
    """Seconds of an evaluation with its samples: what a logged stretch took beyond its steps."""
    if "elapsed_s" not in history.training:
        return 0.0
    steps = np.concatenate(([0.0], history.training["step"]))
    seconds = np.concatenate(([0.0], history.training["elapsed_s"]))
    held = history.evaluation["step"]
    counts = np.diff(np.searchsorted(held, steps))  # evaluations of [a, b): one at b comes after it
    pauses = (np.diff(seconds) - np.diff(steps) * pace)[counts > 0] / counts[counts > 0]
    pauses = pauses[np.isfinite(pauses)][-_RECENT_ROWS:]
    return max(0.0, float(np.median(pauses))) if len(pauses) else 0.0
