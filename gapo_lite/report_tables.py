"""The tables of a sweep's report, and what it says of how the runs were made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gapo_lite.public import is_local, public_name
from gapo_lite.report_blocks import Name, Table, Words
from gapo_lite.report_verdict import (
    ACCURACY,
    COMPARED,
    MEASURES,
    Comparison,
    Measure,
    num_heldout,
    with_interval,
    write_p,
)
from gapo_lite.statistics import estimate
from gapo_lite.sweep_results import ContenderResult, EfGroup, SweepResults

_NAME = r"""[^\s/"',;:()]+"""
# Folders may have blanks in their names, files end before one. What only looks so, as in "neither
# /a/b nor c/d", is cut as well: better than a client's name in a report.
_FOLDER = rf"(?!{_NAME}\.\w{{1,6}} ){_NAME}(?: (?![~.]*/){_NAME}){{0,3}}/+"
_PATH = re.compile(rf"""(["'])[~/][^"'\n]*\1|(?<![\w.:/~-])~?\.{{0,2}}/+(?:{_FOLDER})*{_NAME}/*""")
_LONGEST_MESSAGE = 600

# --- how it was made ------------------------------------------------------------------------------


def what_was_run(results: SweepResults) -> str:
    """One sentence."""
    num, seeds = len(results.contenders), len(results.seeds)
    train = f"{results.num_train:,} training pairs" if results.num_train else "training pairs"
    held = num_heldout(results)
    measured = f", measured on {held:,} held-out pairs" if held else ""
    return (
        f"{num} {_plural('contender', num)} on {seeds} {_plural('seed', seeds)}, each a LoRA "
        f"adapter for {results.model} trained on {train} of {results.data}{measured}."
    )


def progress(results: SweepResults) -> str:
    """How much of it is there."""
    total, finished = len(results.cells), len(results.finished)
    if finished == total:
        return f"All {total} runs are finished." if total > 1 else "Its run is finished."
    parts = [f"{finished} of {total} runs are finished"]
    for state, words in (
        ("failed", "failed"),
        ("drifted", "stopped by the drift guard"),
        ("dropped", "dropped by halving"),
        ("missing", "not done yet"),
    ):
        if num := results.count(state):
            parts.append(f"{num} {words}")
    change = ", and may change" if results.count("missing") else ""
    return f"{', '.join(parts)}. What follows is of the finished ones alone{change}."


def facts(results: SweepResults) -> Table:
    """What a reader needs to trust or repeat it."""
    steps = _spread([cell.values.get("step", math.nan) for cell in results.finished])
    seeds = ", ".join(map(str, results.seeds[:20]))
    rows = [
        ("base model", results.model),
        ("pairs", results.data),
        ("seeds", seeds if len(results.seeds) <= 20 else f"{seeds}, …"),
        ("optimizer steps of a run", steps),
        *results.settings,
        ("begun", results.started),
        ("hardware", "; ".join(results.machines)),
        ("versions", "; ".join(results.versions)),
    ]
    shown: list[tuple[Words, ...]] = [(name, value) for name, value in rows if value]
    return Table(("what", "value"), tuple(shown), prose=True)


def settings_table(results: SweepResults) -> Table:
    """What each contender changes of the base's settings."""
    rows: list[tuple[Words, ...]] = []
    for one in results.contenders:
        told = (f"{key} = {_value(value)}" for key, value in one.settings.items())
        rows.append((_name(one, results), ", ".join(told) or "the base's settings"))
    return Table(("contender", "settings"), tuple(rows), prose=True)


def troubles(results: SweepResults) -> tuple[Words, ...]:
    """Runs that failed or drifted, with their messages, and files that could not be read."""
    how = {"failed": "failed", "drifted": "was stopped by the drift guard"}
    ended: list[Words] = [
        (
            Name(one.name),
            f", seed {cell.seed}, {how[cell.state]}: "
            f"{without_paths(cell.message, results.roots) or 'it left no message'}",
        )
        for one in results.contenders
        for cell in one.cells
        if cell.state in how
    ]
    return (*ended, *(f"{problem[:1].upper()}{problem[1:]}." for problem in results.problems))


def without_paths(message: str, roots: Sequence[Path] = ()) -> str:
    """A message without folders of this machine: of each path the last part alone.

    Args:
        message: of a library, or our own.
        roots: folders that are known, whatever is in their names.
    """
    shown = message
    for root in sorted({*roots, Path.home()} - {Path("/"), Path()}, key=lambda one: -len(str(one))):
        end = r"(?![\w-])" if root.is_absolute() else "(?=/)"
        shown = re.sub(rf"(?<![\w.-]){re.escape(str(root))}{end}", "~", shown)
    shown = _PATH.sub(lambda found: found[0].strip("\"'").rstrip("/").rpartition("/")[2], shown)
    shown = " ".join(shown.split())
    return shown if len(shown) <= _LONGEST_MESSAGE else shown[: _LONGEST_MESSAGE - 1] + "…"


# --- results --------------------------------------------------------------------------------------


def results_table(results: SweepResults) -> Table:
    """All measures, a row a contender, below the base model's."""
    measures = [one for one in MEASURES if _is_known(results, one)]
    base = [_of_base(results, one) for one in measures]
    rows: list[tuple[Words, ...]] = [("base model, untrained", "", *base)]
    for one in results.contenders:
        cells = [_estimated(one, measure) for measure in measures]
        rows.append((_name(one, results), runs_in_words(one), *cells))
    columns = ("Contender", "Runs", *(one.title for one in measures))
    return Table(columns, tuple(rows), quiet=frozenset({0}))


def runs_in_words(contender: ContenderResult) -> str:
    """3 of 3; 1 of 4: 1 failed, 1 drifted at step 6, 1 dropped at step 8."""
    cells, finished = contender.cells, contender.finished
    words = f"{len(finished)} of {len(cells)}"
    parts = []
    if failed := sum(cell.state == "failed" for cell in cells):
        parts.append(f"{failed} failed")
    for state in ("drifted", "dropped"):
        if stopped := [cell for cell in cells if cell.state == state]:
            at = _spread([cell.values.get("step", math.nan) for cell in stopped])
            parts.append(f"{len(stopped)} {state}" + (f" at step {at}" if at else ""))
    if missing := sum(cell.state == "missing" for cell in cells):
        parts.append(f"{missing} to come")
    return f"{words}: {', '.join(parts)}" if parts else words


def differences_table(comparisons: list[Comparison]) -> Table:
    """Differences to the baseline, paired by seed."""
    measures = [
        one for one in COMPARED if any(each.differences[one.key].num for each in comparisons)
    ]
    by_pair = any(one.over_pairs for one in comparisons)
    rows: list[tuple[Words, ...]] = []
    for one in comparisons:
        cells = [with_interval(one.differences[each.key], each, signed=True) for each in measures]
        num = one.differences["accuracy"].num
        last = (write_p(one.p), _over_pairs(one)) if by_pair else (write_p(one.p),)
        rows.append((Name(one.contender.name), str(num), *cells, *last))
    titles = (f"{one.title.partition(',')[0]}, {one.unit}" for one in measures)
    ends = ("Holm's p of accuracy", "Accuracy, ± over pairs")[: 1 + by_pair]
    return Table(("Contender", "Seeds", *titles, *ends), tuple(rows))


def _over_pairs(one: Comparison) -> str:
    half = one.over_pairs.half_width if one.over_pairs else None
    return "–" if half is None else f"± {ACCURACY.write(half)}"


def deciles_table(results: SweepResults) -> Table | None:
    """Accuracy by how alike the pairs are; None where no run has told."""
    groups = ef_groups(results)
    if not groups:
        return None
    told = [one for one in results.contenders if one.finished]
    rows: list[tuple[Words, ...]] = []
    for at, group in enumerate(groups):
        found = (
            estimate([each.tuned_accuracy for each in groups_of(one, groups, at)]) for one in told
        )
        cells = [ACCURACY.write(each.mean) if each.num else "–" for each in found]
        span = f"{_number(group.low)} to {_number(group.high)}"
        rows.append((span, f"{group.num_pairs:,}", ACCURACY.write(group.base_accuracy), *cells))
    columns = (f"EF ({results.decile_metric})", "Pairs", "Base model, %")
    return Table((*columns, *(f"{one.name}, %" for one in told)), tuple(rows))


def ef_groups(results: SweepResults) -> tuple[EfGroup, ...]:
    """The groups of held-out pairs that most runs have been measured on."""
    found = [cell.by_ef for cell in results.finished if cell.by_ef]
    keys = [_keys(groups) for groups in found]
    return max(found, key=lambda groups: keys.count(_keys(groups)), default=())


def groups_of(contender: ContenderResult, groups: tuple[EfGroup, ...], at: int) -> list[EfGroup]:
    """What a contender's runs say of group `at`; runs that had other groups are left out."""
    same = [cell.by_ef for cell in contender.finished if _keys(cell.by_ef) == _keys(groups)]
    return [one[at] for one in same]


def agreement_table(found: dict[str, Any]) -> Table | None:
    """Rank correlations of gaps with the data's own judgement; see agree.py. None where the file
    is not as it was written."""
    rows: list[tuple[Words, ...]] = []
    listed = found.get("metrics")
    for one in listed if isinstance(listed, list) else []:
        if not isinstance(one, dict):
            return None
        cells = (_correlation(one.get(key)) for key in ("gap", "at_equal_lengths"))
        rows.append((str(one.get("metric")), *cells))
    rows.append(("length alone", _correlation(found.get("length")), "–"))
    columns = ("Metric", "ρ of its gap", "ρ at equal lengths")
    return Table(columns, tuple(rows), quiet=frozenset({len(rows) - 1})) if len(rows) > 1 else None


# --- cells ----------------------------------------------------------------------------------------


def _is_known(results: SweepResults, measure: Measure) -> bool:
    return any(one.values(measure.key) for one in results.contenders) or (
        measure.key in results.base_answers
    )


def _estimated(contender: ContenderResult, measure: Measure) -> str:
    values = list(contender.values(measure.key).values())
    found = estimate(values)
    words = with_interval(found, measure)
    fewer = 0 < found.num < len(contender.finished)
    return f"{words} ({found.num} of {len(contender.finished)})" if fewer else words


def _of_base(results: SweepResults, measure: Measure) -> str:
    if measure.key == "accuracy":
        return with_interval(estimate(base_accuracies(results)[:1]), measure)
    if measure.key in ("chosen_change", "rejected_change"):
        return measure.write(0.0) if results.finished else "–"
    if measure.key in results.base_answers:
        return measure.write(results.base_answers[measure.key])
    return "–"


def base_accuracies(results: SweepResults) -> list[float]:
    """The base model's, as each finished run has measured it."""
    found = (cell.values.get("base_accuracy", math.nan) for cell in results.finished)
    return [value for value in found if math.isfinite(value)]


def _name(contender: ContenderResult, results: SweepResults) -> Words:
    name = Name(contender.name)
    return (name, " (baseline)") if contender.name == results.baseline else name


def _value(value: Any) -> str:
    if isinstance(value, str):
        return public_name(value) if is_local(value) else value
    return json.dumps(value, ensure_ascii=False)


def _keys(groups: tuple[EfGroup, ...]) -> list[tuple[float, float, int]]:
    return [(one.low, one.high, one.num_pairs) for one in groups]


def _correlation(found: Any) -> str:
    parts = found if isinstance(found, dict) else {}
    rho, low, high = (parts.get(key) for key in ("rho", "low", "high"))
    if not isinstance(rho, int | float):
        return "–"
    words = _signed(rho)
    if isinstance(low, int | float) and isinstance(high, int | float):
        words += f" ({_signed(low)} to {_signed(high)})"
    return words


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\u2212")


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "?"


def _spread(values: list[float]) -> str:
    """8, or 8 to 12; "" for nothing."""
    known = [int(value) for value in values if math.isfinite(value)]
    if not known:
        return ""
    low, high = min(known), max(known)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _plural(word: str, num: int) -> str:
    return word if num == 1 else f"{word}s"
