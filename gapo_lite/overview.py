"""All runs at a glance, for a table: what each trains, how far it is, and how well it does.

A folder that cannot be read is one row that says so, and never breaks the list.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from gapo_lite.errors import GapoError
from gapo_lite.runs import Run, list_runs


@dataclass(frozen=True, slots=True)
class RunOverview:
    """One run; None is what is not known (yet).

    Attributes:
        name, path: of the folder.
        state: of `Run.state()`, or "damaged".
        problem: what is wrong with a damaged folder, else "".
        objective: key of OBJECTIVES.
        metric: key of EVALUATION_FACTORS, None for an objective without.
        gamma, beta: γ and β.
        target_reward_margin: average target margin of the training pairs, in reward units.
        step, total: optimizer steps done and to do.
        accuracy, reward_margin: of the last evaluation on held-out pairs.
        started: local time at which the run began, or was last resumed.
    """

    name: str
    path: str
    state: str
    problem: str = ""
    objective: str | None = None
    metric: str | None = None
    gamma: float | None = None
    beta: float | None = None
    target_reward_margin: float | None = None
    step: int | None = None
    total: int | None = None
    accuracy: float | None = None
    reward_margin: float | None = None
    started: str | None = None


def overview(runs_dir: Path) -> list[RunOverview]:
    """All runs of a folder, oldest first; then what is left of runs whose configuration is gone."""
    whole = list_runs(runs_dir)
    traces = {
        path.parent
        for name in ("status.json", "metrics.jsonl", "adapter")
        for path in runs_dir.glob(f"*/{name}")
    }
    torn = sorted(traces - {run.path for run in whole})
    return [_row(run) for run in [*whole, *map(Run, torn)]]


def _row(run: Run) -> RunOverview:
    try:
        return _readable_row(run)
    except GapoError as error:
        problem = str(error)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # JSON of another shape
        problem = f"a file in it is not as it was written ({type(error).__name__}: {error})"
    return RunOverview(run.name, str(run.path), "damaged", problem)


def _readable_row(run: Run) -> RunOverview:
    config, status, margins = run.config(), run.read("status.json"), run.read("margins.json")
    held = [row for row in run.metrics() if "eval/loss" in row]
    last = held[-1] if held else {}
    return RunOverview(
        name=run.name,
        path=str(run.path),
        state=run.state(),
        objective=config.objective.name,
        metric=config.ef.metric if config.margin.source == "ef" else None,
        gamma=config.margin.gamma,
        beta=config.objective.beta,
        target_reward_margin=margins.get("mean_margin_in_reward_units"),
        step=status.get("step", 0),
        total=status.get("total", 0),
        accuracy=last.get("eval/rewards/accuracies"),
        reward_margin=last.get("eval/rewards/margins"),
        started=_clock((run.path / "config.yaml").stat().st_mtime),
    )


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
