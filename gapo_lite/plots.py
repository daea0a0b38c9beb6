"""Figures: HTML strings with SVG drawn by numpy, without a plotting library.

A curve of any length becomes at most some 500 points that keep every spike, so that a figure
costs a few milliseconds and kilobytes however long the run and however many people watch. Colours
are CSS variables (charts.css), so a theme change redraws nothing; the page's charts.js adds the
tooltip, from the `data-points` attribute, and saving as PNG. Titles, names and labels may come from
anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gapo_lite.axes import (
    BUCKETS,
    LARGEST,
    Plane,
    decimate,
    drawable,
    edges_of,
    floats,
    number,
    plane_of,
    x_range,
    y_range_of,
)
from gapo_lite.drawing import (
    SMALL,
    WHOLE,
    Head,
    axes_of,
    dots,
    exact,
    figure,
    message,
    plain,
    remark,
    short,
    swatch,
    text,
    under,
    words_at,
)

STYLE = Path(__file__).with_name("charts.css")
"""The style sheet of all figures."""

_MOST_DOTS = 80
_BINS = 30


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One curve.

    Attributes:
        name: as the legend says it.
        x: (N,) steps or epochs, ascending.
        y: (N,) values; one that isn't finite is a gap, and marked.
        tone: colour, a class of charts.css: train, heldout, target, chosen, rejected, run0 … run9.
        style: "dots" for few points joined by a thin line, "dashed" for a target.
        raw: (N,) values before smoothing, drawn faintly behind.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    tone: str
    style: Literal["line", "dots", "dashed"] = "line"
    raw: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BarSeries:
    """One bar for each label: `y` is (labels,), NaN for no bar; `tone` as in `Series`."""

    name: str
    y: np.ndarray
    tone: str


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    explanation: str = "",
    unit: str = "",
    empty: str = "waiting for the first step",
) -> str:
    """A figure of curves over one axis; the legend holds the newest values.

    Args:
        x_label: what x counts, in the singular: "step", "epoch".
        explanation: shown when the pointer rests on the title.
        unit: of y, such as "pairs/s".
        empty: what an empty figure says.
    """
    shown = [_cleaned(one) for one in series]
    head = Head(title, explanation, unit, "".join(_key(one) for one in shown))
    if not any(len(one.x) for one in shown):
        return figure(head, message(empty, WHOLE), WHOLE, f"{title}: {empty}.")
    thin = [_thinned(one) for one in shown]
    xs = np.concatenate([one.x for one in thin])
    whole = bool((xs == np.rint(xs)).all())
    y_range = y_range_of([values for one in thin for values in (one.y, one.raw)])
    plane = plane_of(WHOLE, x_range(xs), y_range or (0.0, 1.0), x_whole=whole)
    if y_range is None:
        plane = replace(plane, y_ticks=())
    body = "".join(
        (
            axes_of(plane, x_label),
            *(_curve(one, plane) for one in sorted(thin, key=lambda one: one.style != "dashed")),
            _gap_marks(shown, plane, x_label),
        )
    )
    data = _scales("line", plane, x_label, unit) | {"series": _points(thin)}
    return figure(head, body, WHOLE, _summary(title, shown, x_label), data)


def histogram(
    title: str,
    values: np.ndarray,
    *,
    range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    x_label: str = "",
    note: str = "",
    tone: str = "train",
    small: bool = False,
) -> str:
    """A figure of how (N,) values are distributed; those that aren't finite are left out.

    Args:
        range: of the 30 bins (fewer for whole numbers that span less), else that of the values.
            Values outside are counted in the caption.
        marks: (x, label) of vertical lines, such as a mean; the axis is widened to show them.
        note: a short remark in the caption, else the number of values.
        small: half the size, for many side by side.
    """
    size = SMALL if small else WHOLE
    values = floats(values)
    values = values[drawable(values)]
    if not len(values):
        empty = "nothing to count yet"
        head = Head(title, legend=remark(note))
        return figure(head, message(empty, size), size, f"{title}: {empty}.")
    edges = edges_of(values, _BINS, range)
    counts = np.histogram(values, edges)[0]
    outside = len(values) - int(counts.sum())
    note = note or f"{len(values):,} values"
    return counted_histogram(
        title,
        counts,
        edges,
        marks=marks,
        x_label=x_label,
        note=note + (f" · {outside:,} outside" if outside else ""),
        tone=tone,
        small=small,
        span=(float(values.min()), float(values.max())),
        total=len(values),
    )


def counted_histogram(
    title: str,
    counts: np.ndarray,
    edges: np.ndarray,
    *,
    marks: Sequence[tuple[float, str]] = (),
    x_label: str = "",
    note: str = "",
    tone: str = "train",
    small: bool = False,
    span: tuple[float, float] | None = None,
    total: int | None = None,
    across: tuple[float, float] | None = None,
) -> str:
    """`histogram` of values that were counted before.

    Args:
        counts: (bins,).
        edges: (bins + 1,), ascending.
        span: of the values, where it is known better than by the edges.
        total: number of values, where some are outside of all bins.
        across: the range of x, for several figures to share; widened to show all.
    """
    size = SMALL if small else WHOLE
    marks = [(float(at), label) for at, label in marks if abs(at) <= LARGEST]
    ends = [edges[0], edges[-1], *(at for at, _ in marks), *(across or ())]
    placed = _mark_rows(marks, (min(ends), max(ends)), size)
    plane = plane_of(
        size,
        (min(ends), max(ends)),
        (0.0, 1.05 * max(1, int(counts.max()))),
        y_whole=True,
        above=12 * (1 + max((row for *_, row in placed), default=-1)),
    )
    body = (
        axes_of(plane, x_label)
        + _bar_path(plane, edges[:-1], edges[1:], counts, tone)
        + "".join(_mark(plane, *one) for one in placed)
    )
    total = int(counts.sum()) if total is None else total
    data = _scales("histogram", plane, x_label) | {
        "total": total,
        "edges": exact(edges),
        "counts": counts.tolist(),
        "tone": plain(tone),
    }
    low, high = span or (float(edges[0]), float(edges[-1]))
    summary = f"{title}: {total:,} values from {number(low)} to {number(high)}."
    return figure(Head(title, legend=remark(note)), body, size, summary, data)


def bars(
    title: str,
    labels: Sequence[str],
    series: Sequence[BarSeries],
    *,
    x_label: str = "",
    explanation: str = "",
    unit: str = "",
) -> str:
    """A figure of grouped bars: for each label one bar of each series. Arguments as in
    `line_chart`."""
    shown = [replace(one, y=floats(one.y)) for one in series]
    keys = "".join(swatch(one.name, one.tone, "bar") for one in shown)
    head = Head(title, explanation, unit, keys)
    heights = y_range_of([np.zeros(1), *(one.y for one in shown)])
    if heights is None or not any(drawable(one.y).any() for one in shown):
        empty = "nothing to compare yet"
        return figure(head, message(empty, WHOLE), WHOLE, f"{title}: {empty}.")
    plane = replace(plane_of(WHOLE, (0.0, float(len(labels))), heights), x_ticks=())
    left, width = np.arange(len(labels)) + 0.14, 0.72 / len(shown)
    body = axes_of(plane, x_label) + _labels(plane, labels)
    for at, one in enumerate(shown):
        low = left + at * width
        body += _bar_path(plane, low, low + width, one.y, one.tone)
    data = _scales("bars", plane, x_label, unit) | {
        "labels": [plain(label) for label in labels],
        "series": [
            {"name": plain(one.name), "tone": plain(one.tone), "y": short(one.y)} for one in shown
        ],
    }
    names = " and ".join(one.name for one in shown)
    by = f" by {x_label}" if x_label else ""
    return figure(head, body, WHOLE, f"{title}{by}: {names}, {len(labels)} groups.", data)


# --- data -----------------------------------------------------------------------------------------


def _cleaned(series: Series) -> Series:
    """As float64, without points that have no x; what can't be drawn is NaN."""
    x = floats(series.x)
    known = drawable(x)

    def cleaned(values: np.ndarray) -> np.ndarray:
        values = floats(values)[known]
        return np.where(drawable(values), values, np.nan)

    raw = None if series.raw is None else cleaned(series.raw)
    return replace(series, x=x[known], y=cleaned(series.y), raw=raw)


def _thinned(series: Series) -> Series:
    """The points that get drawn. Smoothed and raw values share them, for the tooltip."""
    if not len(series.x):
        return series
    if series.raw is None:
        kept = decimate(series.y)
        return replace(series, x=series.x[kept], y=series.y[kept])
    kept = np.union1d(decimate(series.y, BUCKETS // 2), decimate(series.raw, BUCKETS // 2))
    return replace(series, x=series.x[kept], y=series.y[kept], raw=series.raw[kept])


def _scales(kind: str, plane: Plane, x_label: str, unit: str = "") -> dict[str, Any]:
    """What all kinds of figures tell the tooltip."""
    words = {"kind": kind, "label": plain(x_label), "unit": plain(unit)}
    return words | {"box": list(plane.box), "xs": list(plane.x), "ys": list(plane.y)}


def _points(series: Sequence[Series]) -> list[dict[str, Any]]:
    """The curves for the tooltip."""
    return [
        {"name": plain(one.name), "tone": plain(one.tone), "style": one.style}
        | {"x": exact(one.x), "y": short(one.y)}
        | ({} if one.raw is None else {"raw": short(one.raw)})
        for one in series
    ]


# --- SVG ------------------------------------------------------------------------------------------


def _labels(plane: Plane, labels: Sequence[str]) -> str:
    """Names under groups of bars; every second or third where there is no room for all."""
    longest = max(len(label) for label in labels)
    every = math.ceil(6.8 * (longest + 1) * len(labels) / (plane.box[2] - plane.box[0]))
    return "".join(
        under(plane, plane.across(at + 0.5), labels[at]) for at in range(0, len(labels), every)
    )


def _curve(series: Series, plane: Plane) -> str:
    """One series: a line, with dots or a faint unsmoothed line behind it where it has them."""
    if series.style == "dashed" and len(series.x) == 1:  # a target of the first step holds for all
        series = replace(series, x=np.array(plane.x), y=np.repeat(series.y, 2), raw=None)
    across, up = plane.across(series.x), plane.up(series.y)
    raw = series.raw
    paths = [] if raw is None else [("raw", _path(across, plane.up(raw)))]
    paths.append((series.style, _path(across, up)))
    known = np.flatnonzero(np.isfinite(up))
    if series.style == "line":
        paths.append(("tip", dots(across[known[-1:]], up[known[-1:]])))
    if series.style == "dots" and len(known) <= _MOST_DOTS:
        paths.append(("dot", dots(across[known], up[known])))
    drawn = "".join(f'<path class="{name}" d="{path}"/>' for name, path in paths if path)
    return f'<g class="tone-{text(series.tone)}" transform="scale(.1)">{drawn}</g>'


def _path(across: np.ndarray, up: np.ndarray) -> str:
    """Path data in tenths of a unit, relative, as short as can be. A gap ends a stroke; a point
    alone is a stroke of no length, which round caps make a dot."""
    known = np.flatnonzero(np.isfinite(up))
    if not len(known):
        return ""
    points = np.rint(10 * np.stack([across, up], axis=1)[known]).astype(int)
    strokes = np.split(points, np.flatnonzero(np.diff(known) > 1) + 1)
    return "".join(
        f"M{stroke[0, 0]} {stroke[0, 1]}"
        + "".join(f"l{x} {y}" for x, y in np.diff(stroke, axis=0).tolist() or [(0, 0)])
        for stroke in strokes
    )


def _gap_marks(series: Sequence[Series], plane: Plane, x_label: str) -> str:
    """Red flags at the top where a value isn't a number; the first one says so in words."""
    _, top, right, _ = plane.box
    at = np.unique(np.concatenate([one.x[_gaps(one)] for one in series]))
    if not len(at):
        return ""
    across = plane.across(at)
    starts = np.flatnonzero(np.diff(across, prepend=-np.inf) > 4)  # closer ones share a mark
    ends = np.append(starts[1:], len(at)) - 1
    marks = "".join(
        f"M{first:.1f} {top}l-3.5 -5.5H{last + 3.5:.1f}L{last:.1f} {top}z"
        for first, last in zip(across[starts].tolist(), across[ends].tolist(), strict=True)
    )
    words = f"not a number at {x_label} {number(float(at[0]))}"
    if len(at) > 1:
        words += f" and {len(at) - 1:,} more"
    after = across[0] + 6.2 * len(words) < right
    x, anchor = (across[0] - 4, "start") if after else (across[0] + 4, "end")
    return f'<path class="gap" d="{marks}"/>{words_at("gap", x, top + 12, words, anchor)}'


def _gaps(series: Series) -> np.ndarray:
    gaps = np.isnan(series.y)
    return gaps if series.raw is None else gaps | np.isnan(series.raw)


def _bar_path(
    plane: Plane, low: np.ndarray, high: np.ndarray, heights: np.ndarray, tone: str
) -> str:
    """Bars from zero, as one path; those that aren't numbers are left out."""
    drawn = np.flatnonzero(drawable(heights) & (heights != 0))
    left, right = plane.across(low[drawn]), plane.across(high[drawn])
    hair = np.minimum(0.5, 0.1 * (right - left))  # between neighbours
    top = plane.up(heights[drawn])
    boxes = np.stack([left + hair, top, right - left - 2 * hair, plane.up(0.0) - top], axis=1)
    path = "".join(
        f"M{x} {y}h{width}v{height}h{-width}z"
        for x, y, width, height in np.rint(10 * boxes).astype(int).tolist()
    )
    return f'<g class="tone-{text(tone)}" transform="scale(.1)"><path class="bar" d="{path}"/></g>'


_Placed = tuple[float, str, bool, int]
"""A mark: x, label, whether the label stands to the left of the line, and its row."""


def _mark_rows(
    marks: Sequence[tuple[float, str]], x: tuple[float, float], size: tuple[int, int]
) -> list[_Placed]:
    """Gives each mark's label the first row where it covers no other."""
    placed: list[_Placed] = []
    taken: list[tuple[int, float, float]] = []
    for at, label in sorted(marks):
        across = size[0] * (0.12 + 0.86 * (at - x[0]) / ((x[1] - x[0]) or 1))
        length = 6.4 * len(label) + 8
        before = across + length > size[0]
        start = across - length if before else across
        row = 0
        while any(row == used and start < b and a < start + length for used, a, b in taken):
            row += 1
        taken.append((row, start, start + length))
        placed.append((at, label, before, row))
    return placed


def _mark(plane: Plane, at: float, label: str, before: bool, row: int) -> str:
    x, y = plane.across(at), 13 + 12 * row
    beside = (
        words_at("mark", x - 4, y, label, "end")
        if before
        else words_at("mark", x + 4, y, label, "start")
    )
    return f'<path class="mark" d="M{x:.1f} {y - 9}V{plane.box[3]}"/>{beside}'


# --- HTML -----------------------------------------------------------------------------------------


def _key(series: Series) -> str:
    """A series in the legend, with its newest value."""
    value = number(float(series.y[-1])) if len(series.y) else "–"
    return swatch(series.name, series.tone, series.style, value)


def _summary(title: str, series: Sequence[Series], x_label: str) -> str:
    newest = ", ".join(f"{one.name} {number(float(one.y[-1]))}" for one in series if len(one.y))
    last = max(float(one.x[-1]) for one in series if len(one.x))
    return f"{title}: {newest}, at {x_label} {number(last)}."
