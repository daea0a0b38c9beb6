"""What a sweep has found so far, read from its folder; see sweep_folder.py for what lies there.

    results = read_sweep_results(Path("runs/table3"))
    results.contenders[0].values("accuracy")     # {42: 0.714, 43: 0.726}

Reads while the sweep goes on, and of a damaged file says so and leaves it out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from gapo_lite import sweep_config
from gapo_lite.config import RunConfig
from gapo_lite.errors import RunError
from gapo_lite.public import is_local, public_name
from gapo_lite.sweep_config import SweepConfig, load_begun, run_name

MEASURES: dict[str, tuple[str, ...]] = {
    "accuracy": ("tuned", "logps/accuracies"),
    "reward_accuracy": ("tuned", "rewards/accuracies"),
    "reward_margin": ("tuned", "rewards/margins"),
    "target_margin": ("target_reward_margin",),
    "chosen_logps": ("tuned", "logps/chosen"),
    "rejected_logps": ("tuned", "logps/rejected"),
    "base_accuracy": ("base", "logps/accuracies"),
    "base_chosen_logps": ("base", "logps/chosen"),
    "base_rejected_logps": ("base", "logps/rejected"),
    "tokens": ("answers", "mean_tokens"),
    "cut_short": ("answers", "cut_short"),
    "repetition": ("answers", "repetition"),
    "step": ("step",),
    "total": ("total",),
    "num_heldout": ("num_heldout",),
    "seconds": ("seconds",),
}
"""Name here → where it stands in a cell's record."""

_LARGEST = 1e150  # squares of differences and of percentages stay finite


@dataclass(frozen=True, slots=True)
class EfGroup:
    """Held-out pairs that are about equally alike, and a run's accuracy on them."""

    low: float
    high: float
    num_pairs: int
    base_accuracy: float
    tuned_accuracy: float


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """A histogram that a run has kept: (bins,) counts and (bins + 1,) edges."""

    counts: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True, slots=True)
class CellResult:
    """What came of one run.

    Attributes:
        run: its name.
        seed: training.seed.
        state: finished, failed, dropped by halving, drifted (stopped by its drift guard), or
            "missing" while nothing is known of it.
        message: why it failed or drifted.
        values: measures that are there, keys of MEASURES and "chosen_change", "rejected_change"
            (tuned − base, nats a token); what isn't a number is NaN.
        by_ef: the least alike first.
        hits: of each held-out pair, whether its chosen response is the likelier one; empty where
            that is not kept.
        data: fingerprint of the pairs, "" where that is not kept.
    """

    run: str
    seed: int
    state: str = "missing"
    message: str = ""
    values: dict[str, float] = field(default_factory=dict)
    by_ef: tuple[EfGroup, ...] = ()
    hits: tuple[bool, ...] = ()
    data: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class ContenderResult:
    """What came of a contender's runs.

    Attributes:
        name: of the contender.
        settings: what it changes of the sweep's base, dotted keys.
        metric: the evaluation factor of its margins, None for a margin without.
        cells: one a seed, in the sweep's order.
        ef: histogram of the training pairs' EF.
        margins: histogram of their target margins, in reward units.
    """

    name: str
    settings: dict[str, Any]
    metric: str | None
    cells: tuple[CellResult, ...]
    ef: Counted | None = None
    margins: Counted | None = None

    @property
    def finished(self) -> tuple[CellResult, ...]:
        """The runs that count."""
        return tuple(cell for cell in self.cells if cell.state == "finished")

    def values(self, measure: str) -> dict[int, float]:
        """Seed → value, of the finished runs that have one; may be NaN."""
        return {cell.seed: cell.values[measure] for cell in self.finished if measure in cell.values}


@dataclass(frozen=True, slots=True, eq=False)
class SweepResults:
    """Everything that a report says.

    Attributes:
        name: of the sweep.
        state: as its status has it; "" where there is none.
        started: the day on which it began, as 2026-11-28 (UTC); "" where that is not known.
        model, data: public names.
        settings: (what, value) of all runs.
        seeds: of each contender.
        contenders: in the sweep's order.
        baseline: name of the contender that others are compared with.
        decile_metric: evaluation factor of `CellResult.by_ef`.
        num_train: training pairs; None where no run has told.
        base_answers: the base model's `tokens`, `cut_short`, `repetition`; those that are known.
        num_prompts, max_tokens: of the answers; None where none are measured.
        agreement: what agree.json says.
        roots: folders of this machine that messages may name.
        machines, versions: of the runs, each once.
        problems: files that were left out, and why.
    """

    name: str
    state: str
    started: str
    model: str
    data: str
    settings: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]
    contenders: tuple[ContenderResult, ...]
    baseline: str | None
    decile_metric: str
    num_train: int | None = None
    base_answers: dict[str, float] = field(default_factory=dict)
    num_prompts: int | None = None
    max_tokens: int | None = None
    agreement: dict[str, Any] | None = None
    roots: tuple[Path, ...] = ()
    machines: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def cells(self) -> tuple[CellResult, ...]:
        """All runs."""
        return tuple(cell for one in self.contenders for cell in one.cells)

    @property
    def finished(self) -> tuple[CellResult, ...]:
        """The runs that count."""
        return tuple(cell for one in self.contenders for cell in one.finished)

    @property
    def baseline_result(self) -> ContenderResult | None:
        """The contender that others are compared with, if it has a finished run."""
        found = [one for one in self.contenders if one.name == self.baseline and one.finished]
        return found[0] if found else None

    def count(self, state: str) -> int:
        """Runs in a state."""
        return sum(cell.state == state for cell in self.cells)


def read_sweep_results(folder: Path) -> SweepResults:
    """Reads a sweep's folder, at any time.

    Raises:
        RunError: it is not a sweep's folder.
        ConfigError: its sweep.yaml is damaged.
    """
    if not (folder / "sweep.yaml").is_file():
        raise RunError(
            f"{folder} is not a sweep's folder: it holds no sweep.yaml. Name a folder that "
            "gapo-lite sweep has made."
        )
    sweep = load_begun(folder / "sweep.yaml")
    reader = _Reader(folder)
    records = reader.cells()
    found = tuple(_contender(reader, one, sweep, records) for one in sweep_config.contenders(sweep))
    names = {cell.run for one in found for cell in one.cells}
    if strange := sorted(records.keys() - names):
        reader.problems.append(f"{len(strange)} cells are of runs that the sweep does not name")
    status = reader.json("sweep-status.json")
    machines, versions = _environments(reader, found)
    configs = [one.config for one in sweep_config.contenders(sweep)]
    base_answers = _mapping(reader.json("base.json").get("answers"))
    return SweepResults(
        name=folder.resolve().name,
        state=str(status.get("state", "")),
        started=_day(status.get("started")),
        model=_listed(public_name(config.model.name) for config in configs),
        data=_listed(public_name(config.data.source) for config in configs),
        settings=_settings(configs),
        seeds=tuple(sweep.seeds),
        contenders=found,
        baseline=sweep.baseline,
        decile_metric=sweep.decile_metric,
        num_train=reader.num_train,
        base_answers=_values({"answers": base_answers}, ("tokens", "cut_short", "repetition")),
        num_prompts=sweep.answers.prompts if sweep.answers else None,
        max_tokens=sweep.answers.max_tokens if sweep.answers else None,
        agreement=reader.json("agree.json") or None,
        roots=_roots(configs, folder),
        machines=machines,
        versions=versions,
        problems=tuple(reader.problems),
    )


class _Reader:
    """Reads JSON files of a sweep and its runs, and remembers which it could not."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.problems: list[str] = []
        self.num_train: int | None = None

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object below the sweep's folder; empty where there is none."""
        return self._object(self.folder / name, name)

    def of_run(self, run: str, name: str) -> dict[str, Any]:
        """The same of a run."""
        return self._object(self.folder.parent / run / name, f"{run}/{name}")

    def cells(self) -> dict[str, dict[str, Any]]:
        """Name of the run → record."""
        paths = sorted((self.folder / "cells").glob("*.json"))
        records = {path.stem: self._object(path, f"cells/{path.name}") for path in paths}
        return {run: record for run, record in records.items() if record}

    def _object(self, path: Path, name: str) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            self.problems.append(f"{name} is damaged and was left out")
            return {}
        return found


def _contender(
    reader: _Reader,
    contender: sweep_config.Contender,
    sweep: SweepConfig,
    records: dict[str, dict[str, Any]],
) -> ContenderResult:
    cells = []
    for seed in sweep.seeds:
        run = run_name(reader.folder.resolve().name, contender.name, seed)
        cell = _cell(run, seed, records.get(run, {}))
        if cell.state == "finished":
            cell = replace(cell, hits=_hits(reader.of_run(run, "heldout.json")))
        cells.append(cell)
    config = contender.config
    ef, margins = None, None
    for cell in (cell for cell in cells if cell.state == "finished"):
        kept = reader.of_run(cell.run, "margins.json")
        reader.num_train = reader.num_train or _whole(_mapping(kept.get("train")).get("num_pairs"))
        ef = ef or _counted(kept.get("ef_histogram"), 1.0)
        margins = margins or _counted(kept.get("margin_histogram"), _reward_scale(kept))
        if kept:
            break
    asks = config.margin.source is not None
    uses_ef = config.margin.source == "ef"
    return ContenderResult(
        contender.name,
        contender.settings,
        config.ef.metric if uses_ef else None,
        tuple(cells),
        ef if uses_ef else None,
        margins if asks else None,
    )


def _cell(run: str, seed: int, record: dict[str, Any]) -> CellResult:
    if not record:
        return CellResult(run, seed)
    values = _values(record, tuple(MEASURES))
    for side in ("chosen", "rejected"):
        parts = (f"{side}_logps", f"base_{side}_logps")
        if all(part in values for part in parts):
            values[f"{side}_change"] = values[parts[0]] - values[parts[1]]
    state = str(record.get("state", "missing"))
    if state == "dropped" and record.get("stopped_by") == "drift":
        state = "drifted"
    return CellResult(
        run,
        seed,
        state,
        str(record.get("message") or ""),
        values,
        _groups(record.get("by_ef")),
        data=str(record.get("data_fingerprint") or ""),
    )


def _hits(heldout: dict[str, Any]) -> tuple[bool, ...]:
    scores = _mapping(heldout.get("newest"))
    try:
        chosen, rejected = (
            np.asarray(scores.get(key), dtype=np.float64)
            for key in ("chosen_logps", "rejected_logps")
        )
    except (TypeError, ValueError, OverflowError):
        return ()
    if chosen.ndim != 1 or chosen.shape != rejected.shape:
        return ()
    return tuple((chosen > rejected).tolist())


def _groups(found: Any) -> tuple[EfGroup, ...]:
    groups = []
    for one in found if isinstance(found, list) else []:
        one = _mapping(one)
        groups.append(
            EfGroup(
                _number(one.get("low")),
                _number(one.get("high")),
                _whole(one.get("num_pairs")) or 0,
                _number(one.get("base_accuracy")),
                _number(one.get("tuned_accuracy")),
            )
        )
    return tuple(groups)


def _counted(found: Any, scale: float | None) -> Counted | None:
    """A histogram that can be drawn, its edges times `scale`."""
    found = _mapping(found)
    try:
        counts = np.asarray(found.get("counts"), dtype=np.float64)
        edges = np.asarray(found.get("edges"), dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    if counts.ndim != 1 or edges.shape != (len(counts) + 1,) or scale is None:
        return None
    edges = edges * scale
    usable = np.isfinite(counts).all() and np.isfinite(edges).all() and counts.sum() > 0
    ascending = (counts >= 0).all() and (np.diff(edges) > 0).all()
    return Counted(counts.astype(np.int64), edges) if usable and ascending else None


def _reward_scale(kept: dict[str, Any]) -> float | None:
    """Reward units of a margin of 1, None where that cannot be told."""
    mean, in_units = (
        _number(kept.get(key)) for key in ("mean_margin", "mean_margin_in_reward_units")
    )
    if not (math.isfinite(mean) and math.isfinite(in_units) and mean):
        return None
    return in_units / mean


def _settings(configs: list[RunConfig]) -> tuple[tuple[str, str], ...]:
    """What all runs have in common; what they differ in is told as such."""
    told: dict[str, list[str]] = {}
    for config in configs:
        training, lora = config.training, config.lora
        rows = {
            "base weights in training": config.model.quantization,
            "LoRA": f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}",
            "learning rate": f"{training.learning_rate:g}, {training.schedule}",
            "pairs a step": f"{training.batch_size:,}",
            "longest pair": f"{config.data.max_length:,} tokens",
        }
        for what, value in rows.items():
            told.setdefault(what, []).append(value)
    return tuple(
        (what, values[0] if len(set(values)) == 1 else "differs: see the contenders")
        for what, values in told.items()
    )


def _roots(configs: list[RunConfig], folder: Path) -> tuple[Path, ...]:
    """Where data and models, runs, this process and this user's files lie."""
    named = dict.fromkeys(
        Path(name).parent
        for config in configs
        for name in (
            *(config.data.source, config.data.heldout_source),
            *(config.model.name, config.ef.bertscore_model),
        )
        if name and is_local(name)
    )
    return (*named, folder.resolve().parent, Path.cwd(), Path.home())


def _listed(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def _environments(
    reader: _Reader, contenders: tuple[ContenderResult, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    machines: dict[str, None] = {}
    versions: dict[str, None] = {}
    for cell in (cell for one in contenders for cell in one.finished):
        kept = reader.of_run(cell.run, "environment.json")
        if not kept:
            continue
        cores = _whole(kept.get("cpu_count"))
        machines[str(kept.get("gpu") or (f"{cores} CPU cores, no GPU" if cores else "no GPU"))] = (
            None
        )
        known = _mapping(kept.get("versions"))
        told = ("python", "torch", "transformers", "peft", "bitsandbytes")
        versions[", ".join(f"{name} {known[name]}" for name in told if known.get(name))] = None
    return tuple(filter(None, machines)), tuple(filter(None, versions))


def _day(started: Any) -> str:
    seconds = _number(started)
    try:
        return datetime.fromtimestamp(seconds, UTC).date().isoformat() if seconds > 0 else ""
    except (OverflowError, ValueError, OSError):
        return ""


def _values(record: dict[str, Any], measures: tuple[str, ...]) -> dict[str, float]:
    found = {}
    for measure in measures:
        value: Any = record
        for key in MEASURES[measure]:
            value = _mapping(value).get(key)
        if value is not None:
            found[measure] = _number(value)
    return found


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    """A JSON number as float; NaN for anything else, and for what is too large to reckon with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) <= _LARGEST else math.nan


def _whole(value: Any) -> int | None:
    number = _number(value)
    return int(number) if math.isfinite(number) and 0 <= number < 1e15 else None
