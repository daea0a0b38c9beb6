"""A run's figures, and several runs in one: numbers of `curves`, drawn by `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from app import curves
from app.curves import Axis, Curve, Figure
from app.history import History, config_of, read_history
from gapo_lite import plots
from gapo_lite.plots import Series
from gapo_lite.runs import Run

OVERLAID = ("margin", "loss", "accuracy", "logps")
"""Keys of FIGURES that runs are compared by."""

MAX_OVERLAID = 10  # charts.css has as many colours

_TONES = {
    "rewards/chosen": "chosen",
    "rewards/rejected": "rejected",
    "logps/chosen": "chosen",
    "logps/rejected": "rejected",
}


def of_run(run: Run, history: History, *, axis: Axis, smoothing: float) -> str:
    """All figures of one run, training and held-out apart.

    Raises:
        GapoError: its configuration cannot be read.
    """
    config = config_of(run)
    scale, target = config.objective.reward_scale, curves.summary(run).target_reward_margin
    figures: Sequence[Figure] = curves.FIGURES
    if not curves.asks_for_margin(config):
        figures = [replace(figure, target=None) for figure in figures]
    return "".join(_one(history, figure, scale, axis, smoothing, target) for figure in figures)


def overlay(runs: Sequence[Run], *, axis: Axis, smoothing: float) -> str:
    """The same number of several runs in one figure, for each of OVERLAID.

    Raises:
        GapoError: a run's files cannot be read.
    """
    histories = [read_history(run) for run in runs]
    figures = [figure for figure in curves.FIGURES if figure.key in OVERLAID]
    return "".join(
        plots.line_chart(
            _overlay_title(figure),
            [
                line
                for place, (run, history) in enumerate(zip(runs, histories, strict=True))
                for line in _run_lines(run, history, figure, place, axis, smoothing)
            ],
            x_label=axis,
            explanation=figure.text,
            unit=figure.unit,
            empty="nothing logged yet",
        )
        for figure in figures
    )


def _one(
    history: History,
    figure: Figure,
    scale: float,
    axis: Axis,
    smoothing: float,
    mean_target: float | None,
) -> str:
    lines, target = curves.figure_curves(
        history, figure, scale=scale, axis=axis, smoothing=smoothing
    )
    series = [part for line in lines for part in _parts(line, len(lines) > 1, smoothing > 0)]
    if target is not None:
        # The mean over all pairs, as the run's record has it: a batch's own mean is noise.
        level = target.smoothed if mean_target is None else np.full(len(target.x), mean_target)
        series.append(Series("target", target.x, level, "target", "dashed"))
        if len(target.heldout_y):
            series.append(
                Series("held-out target", target.heldout_x, target.heldout_y, "target", "dashed")
            )
    return plots.line_chart(
        figure.title, series, x_label=axis, explanation=figure.text, unit=figure.unit
    )


def _parts(line: Curve, several: bool, smoothed: bool) -> list[Series]:
    """Training as a line, held-out as dots; chosen and rejected each in a colour of its own."""
    tone = _TONES.get(line.key, "train")
    found = []
    if len(line.x):
        name = line.label if several else "training"
        raw = line.raw if smoothed else None
        found.append(Series(name, line.x, line.smoothed, tone, "line", raw))
    if len(line.heldout_x):
        name = f"{line.label}, held out" if several else "held out"
        own = tone if several else "heldout"
        found.append(Series(name, line.heldout_x, line.heldout_y, own, "dots"))
    return found


def _overlay_title(figure: Figure) -> str:
    return f"{figure.title}: {figure.lines[0][1]}" if len(figure.lines) > 1 else figure.title


def _run_lines(
    run: Run, history: History, figure: Figure, place: int, axis: Axis, smoothing: float
) -> list[Series]:
    """A run's first line of a figure; held-out points in the same colour."""
    key, label = figure.lines[0]
    line = curves.curve(history, key, axis=axis, smoothing=smoothing, label=label)
    tone, found = f"run{place}", []
    if len(line.x):
        found.append(Series(run.name, line.x, line.smoothed, tone))
    if len(line.heldout_x):
        found.append(Series(f"{run.name}, held out", line.heldout_x, line.heldout_y, tone, "dots"))
    return found
