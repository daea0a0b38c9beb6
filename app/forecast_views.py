"""Will it fit, as HTML: the memory by what takes it, speed and hours, and what was measured."""

from __future__ import annotations

from typing import Any

from app import forms, views
from app.forecasts import THIS_MACHINE, Outlook, Question
from app.notices import as_html


def progress(outlook: Outlook) -> str:
    """What is being waited for."""
    if not outlook.total:
        return views.subtle("reading model and data …")
    return views.subtle(f"counting tokens: pair {outlook.done:,} of {outlook.total:,} …")


def answer(question: Question, outlook: Outlook, *, is_stale: bool = False) -> str:
    """The answer to a question.

    Args:
        question: what was asked.
        outlook: the last one, with the answer.
        is_stale: whether the form asks something else by now.
    """
    found = outlook.found
    stale = "For other settings than those of the form now. Ask again." if is_stale else ""
    return (
        views.warnings(filter(None, [stale]))
        + f'<div class="outlook{" stale" if is_stale else ""}">'
        + _verdict(found)
        + _memory(found)
        + views.facts(_pace(found))
        + views.subtle(f"With {found['dials']}.")
        + "".join(views.subtle(note) for note in found["notes"])
        + _remedy(question, found)
        + _measured(question, found)
        + views.subtle(_basis(found, outlook.beside))
        + "</div>"
    )


def _verdict(found: dict[str, Any]) -> str:
    state, words = ("finished", "it fits") if found["fits"] else ("failed", "it does not fit")
    peak, memory = found["peak"], found["memory"]
    items = [
        f'<span class="state {state}">{words}</span>',
        f"about <b>{_gib(peak)}</b> of <b>{memory:.0f} GiB</b> ({peak / memory:.0%})",
        f'<span class="name">{as_html(found["device"])}</span>',
    ]
    return f'<div class="status-line">{"".join(f"<span>{item}</span>" for item in items)}</div>'


def _memory(found: dict[str, Any]) -> str:
    """A bar as long as the card's memory, or the peak if that is more; and its parts by name."""
    scale = max(found["memory"], found["peak"])
    parts = sorted(enumerate(found["parts"].items()), key=lambda part: -part[1][1])
    bar = "".join(
        f'<i class="tone-run{tone}" style="width:{100 * size / scale:.2f}%"></i>'
        for tone, (_, size) in parts
    )
    legend = "".join(
        f'<li class="tone-run{tone}"><i></i>{as_html(name)} <b>{_gib(size)}</b></li>'
        for tone, (name, size) in parts
    )
    edge = f'<u style="left:{100 * found["usable"] / scale:.2f}%"></u>'
    limit = f"The line is at {_gib(found['usable'])}: what may be planned with."
    return (
        f'<div class="memory-bar">{bar}{edge}</div><ul class="memory-parts">{legend}</ul>'
        f"{views.subtle(limit)}"
    )


def _pace(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("tokens/s", f"{found['tokens_per_second']:,.0f}"),
        ("pairs/s", f"{found['pairs_per_second']:.3g}"),
        ("a step", _seconds(found["step_seconds"])),
        ("the whole run", _seconds(3600 * found["hours"])),
        ("pairs", f"{found['pairs']:,}"),
        ("tokens a pair", f"{found['tokens_a_pair']:,.0f}"),
    ]


def _remedy(question: Question, found: dict[str, Any]) -> str:
    """What would make it fit: each setting as the form has it, and as it would have to be."""
    if found["fits"]:
        return ""
    now = forms.values_of(question.config)
    rows = [
        (key, _setting(now[key]), _setting(value))
        for key, value in found["advice"].items()
        if now[key] != value
    ]
    if not rows:
        return views.warnings(["No setting of memory would make this fit: take a smaller model."])
    return views.table(("setting", "now", "it fits with"), rows)


def _measured(question: Question, found: dict[str, Any]) -> str:
    if question.card != THIS_MACHINE:
        return ""
    if not found["measured"]:
        return views.subtle("Measured: no run yet with this model, adapter and memory settings.")
    rows = [(name, _gib(peak), f"{speed:,.0f}") for name, peak, speed in found["measured"]]
    return views.table(("measured in the run", "memory", "tokens/s"), rows)


def _basis(found: dict[str, Any], beside: str) -> str:
    """Which of the numbers were measured, and when."""
    words = "Estimated by arithmetic from the model's shape and the data's lengths; "
    if not found["is_cpu"]:
        return f"{words}{found['basis']}."
    rate = f"this CPU's matrix rate, {found['matrix_rate'] / 1e9:,.0f} GFLOP/s, was measured now"
    slowed = f", while {beside} was being trained: alone it is quicker" if beside else ""
    return f"{words}{rate}{slowed}; the rest {found['basis']}."


def _setting(value: Any) -> str:
    return "open" if value is None else str(value)


def _gib(size: float) -> str:
    return f"{size:.2f} GiB" if size < 10 else f"{size:.1f} GiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else views.duration(seconds)
