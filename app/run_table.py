"""The table of runs: a row each, which is computed again only when its files have changed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from app import curves, history, jobs, views
from gapo_lite.config import RunConfig
from gapo_lite.errors import GapoError
from gapo_lite.runs import Run

RUN_COLUMNS = (
    *("run", "state", "accuracy", "reward margin", "target", "chosen drift"),
    *("objective", "EF", "γ", "β", "data", "steps", "time"),
)
"""Columns of the table of runs; accuracy, margin and drift are of held-out pairs."""


def run_row(runs_dir: Path, name: str) -> list[Any]:
    """A run's cells under RUN_COLUMNS; of one that cannot be read, its name and why."""
    state = "?"
    try:
        state = jobs.report(runs_dir, name).state
        return [name, state, *_results(Run(runs_dir / name))]
    except GapoError as error:
        return [name, state, str(error).partition(":")[0], *[""] * (len(RUN_COLUMNS) - 3)]


def _results(run: Run) -> list[Any]:
    """The cells of a run after its name and state."""
    config = history.config_of(run)
    results = _result_cells(run, history.version(run))
    if not curves.asks_for_margin(config):
        results = [*results[:2], "–", *results[3:]]
    return [*results[:4], *_settings_cells(config), *results[4:]]


def _settings_cells(config: RunConfig) -> list[Any]:
    metrics = {"ef": config.ef.metric, "rating": "ratings"}
    return [
        config.objective.name,
        metrics.get(config.margin.source or "", "–"),
        _number(config.margin.gamma, "{:g}", none="–"),
        _number(config.objective.beta, "{:g}", none="–"),
        config.data.source.rpartition("/")[2],
    ]


@lru_cache(maxsize=5000)
def _result_cells(run: Run, version: str) -> list[str]:
    """What a run's files say; the same while they are the same."""
    found, status = curves.summary(run), run.read("status.json")
    return [
        _number(found.accuracy, "{:.1%}"),
        _number(found.reward_margin, "{:.2f}"),
        _number(found.target_reward_margin, "{:.2f}"),
        _number(found.chosen_drift, "{:+.3f}"),
        f"{status.get('step', 0)} of {status.get('total', 0)}",
        "" if found.duration_s is None else views.duration(found.duration_s),
    ]


def _number(value: float | None, form: str, none: str = "") -> str:
    return none if value is None else form.format(value)
