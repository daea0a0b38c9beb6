"""What the Sweeps tab may call: plain values in and out, no gradio; no browser is trusted."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app import curves, history, jobs, sweep_forms, sweep_jobs
from app.downloads import text_file
from app.forecasts import PATIENCE_S
from app.places import Places
from app.sweep_forms import AGAINST, TRAIN_FORM, Filled
from app.worker import run_task
from gapo_lite.config import RunConfig
from gapo_lite.errors import GapoError, RunError
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.report import write_report
from gapo_lite.runs import Run, check_name
from gapo_lite.sweep_config import SweepConfig, contenders
from gapo_lite.sweep_presets import mean_margin

_LOOKED_AT = 60  # the newest runs, for how long such runs take
_COSTS_NOTHING = {
    *("seed", "learning_rate", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *("max_chosen_fall", "on_drift", "keep_checkpoints", "report_to"),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a filled form comes to.

    Attributes:
        runs: how many.
        seeds: of each contender.
        contenders: name and settings of each.
        baseline: name of the one that the others are compared with, None for a single one.
        name: of the sweep, where a person gives none.
        shared: settings of all runs that the sweep's file has over its base, in words.
        seconds: that finished runs with such settings took, times the runs; None where some of them
            have no like, or losers are stopped early.
    """

    runs: int
    seeds: tuple[int, ...]
    contenders: tuple[tuple[str, str], ...]
    baseline: str | None
    name: str
    shared: str
    seconds: float | None


@dataclass(frozen=True, slots=True)
class SweepServices:
    """The sweeps of one server.

    Attributes:
        runs_dir: folder of all runs.
        places: which data and models may be opened.
    """

    runs_dir: Path
    places: Places

    # -- build --

    def plan(self, filled: Filled, train_form: Mapping[str, Any]) -> Plan:
        """How many runs a filled form is, and which; nothing is read but files of settings.

        Raises:
            GapoError: naming every problem.
        """
        sweep = self._sweep(filled, train_form, _known_margin)
        found = tuple(sweep_forms.own_words(sweep))
        return Plan(
            runs=len(found) * len(sweep.seeds),
            seeds=tuple(sweep.seeds),
            contenders=found,
            baseline=sweep.baseline,
            name=sweep_forms.default_name(filled.start),
            shared=", ".join(f"{key} = {value}" for key, value in sweep.settings.items()),
            seconds=self._seconds(sweep),
        )

    def start(self, filled: Filled, train_form: Mapping[str, Any], name: Any = "") -> str:
        """Starts the sweep that a filled form means; returns its name.

        Raises:
            GapoError: something in it is not usable, or another training is at work.
        """
        given = name.strip() if isinstance(name, str) else ""
        if given:
            check_name(given)
        sweep = self._sweep(filled, train_form, measured_margin)
        default = sweep_forms.default_name(filled.start)
        return sweep_jobs.start(sweep, self.runs_dir, given or None, default)

    def against_simpo(self, train_form: Mapping[str, Any]) -> str:
        """Starts GaPO against SimPO with the Train tab's settings; returns the sweep's name.

        Raises:
            GapoError: as `start`.
        """
        filled = sweep_forms.filled_from(AGAINST)
        assert filled.base == TRAIN_FORM
        return self.start(filled, train_form)

    def _sweep(
        self, filled: Filled, train_form: Mapping[str, Any], margin: sweep_forms.MeanMargin
    ) -> SweepConfig:
        return sweep_forms.sweep_of(filled, train_form, self.places, margin)

    def _seconds(self, sweep: SweepConfig) -> float | None:
        if sweep.halving:
            return None
        known: dict[str, float] = {}
        for name in jobs.names(self.runs_dir)[-_LOOKED_AT:]:
            run = Run(self.runs_dir / name)
            with contextlib.suppress(GapoError):
                if run.state() == "finished" and (took := curves.summary(run).duration_s):
                    known[_costs(history.config_of(run))] = took
        took_each = [known.get(_costs(one.config)) for one in contenders(sweep)]
        if any(took is None for took in took_each):
            return None
        return len(sweep.seeds) * sum(took for took in took_each if took)

    # -- a sweep --

    def names(self) -> list[str]:
        """All sweeps, the newest first."""
        return sweep_jobs.names(self.runs_dir)[::-1]

    def watched(self) -> str:
        """The sweep that is to be looked at first: the one at work, else the newest."""
        names = self.names()
        busy = (name for name in names if sweep_jobs.report(self.runs_dir, name).is_active)
        return next(busy, names[0] if names else "")

    def resume(self, name: str) -> None:
        """Goes on with a sweep.

        Raises:
            GapoError: see sweep_jobs.resume.
        """
        sweep_jobs.resume(self.runs_dir, name)

    def stop(self, name: str) -> None:
        """Asks a sweep to save its run and to end.

        Raises:
            RunError: nobody works on it, or it is not ours to stop.
        """
        sweep_jobs.stop(self.runs_dir, name)

    def lost_by_deleting(self, name: str) -> str:
        """What is asked before a sweep is deleted.

        Raises:
            RunError: there is no such sweep.
        """
        state = sweep_jobs.report(self.runs_dir, name).state
        runs = sweep_jobs.runs_of(sweep_jobs.existing(self.runs_dir, name))
        return (
            f"Delete the sweep {name} ({state}) with its report and its {len(runs)} runs? It "
            "cannot be undone."
        )

    def delete(self, name: str) -> None:
        """Removes a sweep and its runs.

        Raises:
            RunError: there is no such sweep, or it is at work.
        """
        sweep_jobs.delete(self.runs_dir, name)

    # -- its report --

    def report_page(self, name: str) -> str:
        """A sweep's report as it is now, as HTML.

        Raises:
            GapoError: there is no such sweep, or its files cannot be read or written.
        """
        return _read(self._report(name)[0])

    def report_html(self, name: str) -> str:
        """The same as a file to download.

        Raises:
            GapoError: as `report_page`.
        """
        return text_file(f"{name}.html", self.report_page(name))

    def report_markdown(self, name: str) -> str:
        """Its Markdown as a file to download.

        Raises:
            GapoError: as `report_page`.
        """
        return text_file(f"{name}.md", _read(self._report(name)[1]))

    def _report(self, name: str) -> tuple[Path, Path]:
        return write_report(sweep_jobs.existing(self.runs_dir, name).path)


def _costs(config: RunConfig) -> str:
    """What decides how long a run takes, as text."""
    training = config.training.model_dump(mode="json", exclude=_COSTS_NOTHING)
    uses_reference = OBJECTIVES[config.objective.name].uses_reference
    others = [one.model_dump(mode="json") for one in (config.model, config.lora, config.data)]
    return json.dumps([training, uses_reference, *others])


def _read(path: Path) -> str:
    if path.is_symlink():
        raise RunError(f"{path.name} is a link to another place, which the page leaves alone.")
    return path.read_text(encoding="utf-8")


def _known_margin(config: RunConfig) -> float:
    """For a plan, which must be there at once: γ, also where the pairs would have to be read."""
    margin = config.margin
    return mean_margin(config) if margin.normalization != "none" else (margin.gamma or 0.0)


def measured_margin(config: RunConfig) -> float:
    """Mean margin of GaPO's training pairs. Under `normalization: none` they have to be read, which
    a process of its own does: their tokens take torch.

    Raises:
        GapoError: the data are not usable, or it takes too long.
    """
    if config.margin.normalization != "none":
        return mean_margin(config)
    answer: dict[str, Any] = {}
    deadline = time.monotonic() + PATIENCE_S
    for _ in run_task("margin", {"config": config.model_dump(mode="json")}, answer):
        if time.monotonic() > deadline:
            raise RunError(
                f"the mean margin was not found within {PATIENCE_S / 60:.0f} minutes. Use fewer "
                "pairs (data.max_pairs), or margin.normalization: scale, whose mean is γ."
            )
    return float(answer["mean_margin"])
