"""The Sweeps tab's HTML: what a form comes to, the list of sweeps, a sweep's table as it fills."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import urlencode

from app import views
from app.notices import as_html
from app.sweep_jobs import SweepReport
from app.sweep_services import Plan
from gapo_lite.report_verdict import MEASURES, Measure, with_interval
from gapo_lite.statistics import estimate
from gapo_lite.sweep_config import SweepConfig
from gapo_lite.sweep_results import CellResult, ContenderResult, SweepResults

SHOWN = tuple(
    one
    for one in MEASURES
    if one.key in ("accuracy", "reward_margin", "chosen_change", "tokens", "repetition")
)
"""Columns of the table; the report has all."""
_MOST_LISTED = 30
_UNCHANGED = "the base's settings"
_CHOSEN = ' class="chosen"'
_SIGNED = ("chosen_change",)

Progress = Mapping[str, tuple[str, int, int]]
"""Runs that have begun and not ended → state, step, total steps."""


def plan(found: Plan) -> str:
    """What would be trained."""
    number, seeds = len(found.contenders), ", ".join(map(str, found.seeds[:8]))
    noun = "seed" if len(found.seeds) == 1 else "seeds"
    told = views.facts(
        [
            ("runs", f"{found.runs:,}"),
            ("contenders", f"{number:,}"),
            (noun, seeds + (" …" if len(found.seeds) > 8 else "")),
            *([("training", f"about {views.duration(found.seconds)}")] if found.seconds else []),
        ]
    )
    rows = [
        (f"{name} (baseline)" if name == found.baseline else name, settings or _UNCHANGED)
        for name, settings in found.contenders
    ]
    more = views.subtle(f"… and {number - _MOST_LISTED} more." if number > _MOST_LISTED else "")
    shared = views.subtle(f"All runs: {found.shared}." if found.shared else "")
    return told + shared + views.table(("contender", "settings"), rows[:_MOST_LISTED]) + more


def listed(reports: Sequence[SweepReport], chosen: str) -> str:
    """All sweeps, the newest first, to choose from."""
    if not reports:
        return ""
    rows = "".join(
        f"<tr{_CHOSEN if one.name == chosen else ''}>"
        f"<td>{_button('sweep-choice', one.name, one.name)}</td><td>{badge(one.state)}</td>"
        f"<td>{_done(one)}</td></tr>"
        for one in reports[:_MOST_LISTED]
    )
    return _table(("sweep", "state", "runs done"), rows, "sweep-list")


def status(
    report: SweepReport,
    config: SweepConfig | None,
    place: int,
    step: tuple[str, int, int] | None,
    seconds_left: float | None,
) -> str:
    """The line above the table.

    Args:
        report: how the sweep stands.
        config: what it tries; None where that cannot be read.
        place: of the run that is being trained, from 1; 0 where there is none.
        step: state, step and total of that run.
        seconds_left: an estimate, where there is one.
    """
    items = [f'<span class="name">{as_html(report.name)}</span>', badge(report.state)]
    if report.total:
        items.append(f"<b>{report.done}</b> of <b>{report.total}</b> runs done")
    if report.cell:
        where = f", step {step[1]} of {step[2]}" if step and step[2] else ""
        shown = f"run {place} of {report.total}: {report.cell}{where}" if place else report.cell
        items.append(_button("sweep-run", report.cell, shown))
    if report.is_active and seconds_left is not None:
        items.append(f"about <b>{views.duration(seconds_left)}</b> to go")
    items += _budget(config)
    share = 100 * min(1.0, report.done / report.total) if report.total else 0.0
    link = f"report?{urlencode({'sweep': report.name})}"
    items.append(
        f'<a class="quiet-button" href="{as_html(link)}" target="_blank" rel="noopener">'
        "Open the report</a>"
    )
    is_all_there = report.state == "finished" and report.done == report.total  # none has failed
    state = "complete" if is_all_there else report.state
    return (
        f'<div class="status-line" data-sweep-state="{as_html(state)}">'
        + "".join(f"<span>{item}</span>" for item in items)
        + f'</div><div class="meter"><i style="width:{share:.1f}%"></i></div>'
        + views.warnings([report.message] if report.message else [])
    )


def table(results: SweepResults, progress: Progress) -> str:
    """Each contender's mean over its seeds, and below it its runs; a click opens one."""
    shown = [one for one in SHOWN if any(each.values(one.key) for each in results.contenders)]
    shown = shown or list(SHOWN[:3])
    rows = "".join(_contender(one, results, shown, progress) for one in results.contenders)
    heads = ("contender, run", "state", *(one.title for one in shown))
    remark = (
        "Of held-out pairs; the change is of chosen answers' log-probability, nats a token. ± is "
        "half of a 95 % interval over seeds. A click on a run opens it."
    )
    return _table(heads, rows, "sweep-table") + views.subtle(remark)


def badge(state: str) -> str:
    """A state in its colour."""
    return f'<span class="state {as_html(state)}">{as_html(state)}</span>'


def _contender(
    one: ContenderResult, results: SweepResults, shown: Sequence[Measure], progress: Progress
) -> str:
    mark = ' <span class="subtle">baseline</span>' if one.name == results.baseline else ""
    means = _cells(
        with_interval(estimate(list(one.values(m.key).values())), m, signed=m.key in _SIGNED)
        if one.values(m.key)
        else ""
        for m in shown
    )
    done = f"{len(one.finished)} of {len(one.cells)}"
    head = (
        f'<tr class="contender"><th scope="row">{as_html(one.name)}{mark}</th><td>{done}</td>'
        f"{means}</tr>"
    )
    return head + "".join(_run(cell, shown, progress.get(cell.run)) for cell in one.cells)


def _run(cell: CellResult, shown: Sequence[Measure], begun: tuple[str, int, int] | None) -> str:
    seed = f"seed {cell.seed}"
    exists = cell.state != "missing" or begun is not None
    name = _button("sweep-run", cell.run, seed) if exists else as_html(seed)
    if cell.message:
        rest = f'<td colspan="{len(shown)}" class="text">{as_html(cell.message)}</td>'
    else:
        rest = _cells(
            m.write(cell.values[m.key], signed=m.key in _SIGNED) if m.key in cell.values else ""
            for m in shown
        )
    return (
        f'<tr data-run="{as_html(cell.run)}" data-state="{as_html(_state(cell, begun))}">'
        f"<td>{name}</td><td>{_state_of(cell, begun)}</td>{rest}</tr>"
    )


def _state(cell: CellResult, begun: tuple[str, int, int] | None) -> str:
    if cell.state != "missing":
        return cell.state
    return begun[0] if begun else "to come"


def _state_of(cell: CellResult, begun: tuple[str, int, int] | None) -> str:
    state = _state(cell, begun)
    if state == "to come":
        return '<span class="subtle">to come</span>'
    if begun and cell.state == "missing" and begun[2]:
        return f"{badge(state)} {begun[1]} of {begun[2]}"
    if state in ("dropped", "drifted") and "step" in cell.values:
        return f"{badge(state)} at step {cell.values['step']:.0f}"
    return badge(state)


def _done(report: SweepReport) -> str:
    return f"{report.done} of {report.total}" if report.total else "–"


def _budget(config: SweepConfig | None) -> list[str]:
    if config is None or (config.hours is None and config.max_runs is None):
        return []
    parts = [f"{config.hours:g} h"] if config.hours is not None else []
    parts += [f"{config.max_runs} runs"] if config.max_runs is not None else []
    return [f"budget {' and '.join(parts)} a start"]


def _button(presses: str, value: str, text: str) -> str:
    """Presses a hidden button of the page (see page.js), whose handler gets the value."""
    return (
        f'<button type="button" class="quiet-button" data-presses="{presses}" '
        f'data-value="{as_html(value)}">{as_html(text)}</button>'
    )


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"<td>{as_html(text)}</td>" for text in texts)


def _table(columns: Sequence[str], rows: str, name: str) -> str:
    head = "".join(f"<th>{as_html(column)}</th>" for column in columns)
    return (
        f'<div class="table-scroll"><table class="plain-table {name}"><thead><tr>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )
