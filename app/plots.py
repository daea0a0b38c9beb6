"""The page's figures: HTML strings with SVG drawn on the server. numpy only, no plotting library.

A curve of any length becomes at most some 500 points that keep every spike, so that a figure
costs a few milliseconds and kilobytes however long the run and however many people watch. Colours
are CSS variables (static/charts.css), so a theme change redraws nothing; static/charts.js adds
the tooltip, from the `data-points` attribute, and saving as PNG.

Titles, names and labels may come from anywhere: `_text` is the only way into the HTML.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

BUCKETS = 250
"""Stretches of a curve that keep their extremes; the plot is some 370 units wide."""

_LARGEST = 1e300  # beyond it differences overflow; counts as not a number
_LONGEST = 500  # characters of a title or name
_WHOLE_SIZE, _SMALL_SIZE = (420, 230), (210, 130)
_MOST_DOTS = 80
_JOINERS = "\u200c\u200d"  # not printable by themselves, but part of Persian words and of emoji


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
    head = _Head(title, explanation, unit, "".join(_key(one) for one in shown))
    if not any(len(one.x) for one in shown):
        return _figure(head, _message(empty, _WHOLE_SIZE), _WHOLE_SIZE, f"{title}: {empty}.")
    thin = [_thinned(one) for one in shown]
    xs = np.concatenate([one.x for one in thin])
    whole = bool((xs == np.rint(xs)).all())
    y_range = _y_range([values for one in thin for values in (one.y, one.raw)])
    plane = _plane(_WHOLE_SIZE, _x_range(xs), y_range or (0.0, 1.0), x_whole=whole)
    if y_range is None:
        plane = replace(plane, y_ticks=())
    body = "".join(
        (
            _axes(plane, x_label),
            *(_curve(one, plane) for one in sorted(thin, key=lambda one: one.style != "dashed")),
            _gap_marks(shown, plane, x_label),
        )
    )
    data = _scales("line", plane, x_label, unit) | {"series": _points(thin)}
    return _figure(head, body, _WHOLE_SIZE, _summary(title, shown, x_label), data)


def histogram(
    title: str,
    values: np.ndarray,
    *,
    bins: int = 30,
    range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    x_label: str = "",
    note: str = "",
    tone: str = "train",
    small: bool = False,
) -> str:
    """A figure of how (N,) values are distributed; those that aren't finite are left out.

    Args:
        bins: how many; fewer for whole numbers that span less.
        range: of the bins, else that of the values. Values outside are counted in the caption.
        marks: (x, label) of vertical lines, such as a mean; the axis is widened to show them.
        note: a short remark in the caption, else the number of values.
        small: half the size, for many side by side.
    """
    size = _SMALL_SIZE if small else _WHOLE_SIZE
    values = _floats(values)
    values = values[_numbers(values)]
    marks = [(float(at), label) for at, label in marks if abs(at) <= _LARGEST]
    if not len(values):
        empty = "nothing to count yet"
        head = _Head(title, legend=_note(note))
        return _figure(head, _message(empty, size), size, f"{title}: {empty}.")
    edges = _edges(values, bins, range)
    counts = np.histogram(values, edges)[0]
    outside = len(values) - int(counts.sum())
    note = note or f"{len(values):,} values"
    head = _Head(title, legend=_note(note + (f" · {outside:,} outside" if outside else "")))
    ends = [edges[0], edges[-1], *(at for at, _ in marks)]
    placed = _mark_rows(marks, (min(ends), max(ends)), size)
    plane = _plane(
        size,
        (min(ends), max(ends)),
        (0.0, 1.05 * max(1, int(counts.max()))),
        y_whole=True,
        above=12 * (1 + max((row for *_, row in placed), default=-1)),
    )
    body = (
        _axes(plane, x_label)
        + _bar_path(plane, edges[:-1], edges[1:], counts, tone)
        + "".join(_mark(plane, *one) for one in placed)
    )
    data = _scales("histogram", plane, x_label) | {
        "total": len(values),
        "edges": _exact(edges),
        "counts": counts.tolist(),
        "tone": _plain(tone),
    }
    span = f"{number(float(values.min()))} to {number(float(values.max()))}"
    return _figure(head, body, size, f"{title}: {len(values):,} values from {span}.", data)


def bars(
    title: str,
    labels: Sequence[str],
    series: Sequence[BarSeries],
    *,
    x_label: str = "",
    explanation: str = "",
    unit: str = "",
    empty: str = "nothing to compare yet",
) -> str:
    """A figure of grouped bars: for each label one bar of each series. Arguments as in
    `line_chart`."""
    shown = [replace(one, y=_floats(one.y)) for one in series]
    keys = "".join(_swatch(one.name, one.tone, "bar") for one in shown)
    head = _Head(title, explanation, unit, keys)
    heights = _y_range([np.zeros(1), *(one.y for one in shown)])
    if heights is None or not any(_numbers(one.y).any() for one in shown):
        return _figure(head, _message(empty, _WHOLE_SIZE), _WHOLE_SIZE, f"{title}: {empty}.")
    plane = replace(_plane(_WHOLE_SIZE, (0.0, float(len(labels))), heights), x_ticks=())
    left, width = np.arange(len(labels)) + 0.14, 0.72 / len(shown)
    body = _axes(plane, x_label) + _labels(plane, labels)
    for at, one in enumerate(shown):
        low = left + at * width
        body += _bar_path(plane, low, low + width, one.y, one.tone)
    data = _scales("bars", plane, x_label, unit) | {
        "labels": [_plain(label) for label in labels],
        "series": [
            {"name": _plain(one.name), "tone": _plain(one.tone), "y": _short(one.y)}
            for one in shown
        ],
    }
    names = " and ".join(one.name for one in shown)
    by = f" by {x_label}" if x_label else ""
    return _figure(head, body, _WHOLE_SIZE, f"{title}{by}: {names}, {len(labels)} groups.", data)


def number(value: float) -> str:
    """A value for people, with four significant digits: 0.6931, 1,235, 2e-5, −0.5000, 1.

    charts.js has the same rule, for the tooltip.
    """
    value = _rounded(value)
    size = abs(value)
    if not size <= _LARGEST:
        return "not a number"
    if size < 1e6 and value == int(value):
        return _minus(f"{int(value):,}")
    if 1e-3 <= size < 1e6:
        return _minus(f"{value:,.{3 - math.floor(math.log10(size))}f}")
    return _scientific(value, 3)


def ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 × 10ⁿ in [low, high], some `about` of them.

    Args:
        whole: only whole numbers.
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough * 0.8)
    if whole:
        step = max(step, 1.0)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [at * step for at in np.arange(first, last + 1).tolist()]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Labels for `ticks`, all with the same decimals: 0.5 and 1.0, or 5e-6 and 1e-5."""
    if len(values) < 2:
        return [number(value) for value in values]
    largest = max(abs(value) for value in values)
    exponent = math.floor(math.log10(values[1] - values[0]) + 1e-9)
    if not 1e-3 <= largest < 1e6:
        return [_scientific(value, math.floor(math.log10(largest)) - exponent) for value in values]
    return [_minus(f"{value:,.{max(0, -exponent)}f}") for value in values]


def decimate(y: np.ndarray, buckets: int = BUCKETS) -> np.ndarray:
    """Indexes of the points to draw: all, or of each bucket the lowest and the highest.

    The ends stay, and the first gap of each bucket does, so that a gap is seen. Equal to::

        width = math.ceil(len(y) / buckets)
        kept = {0, len(y) - 1}
        for start in range(0, len(y), width):
            bucket = range(start, min(start + width, len(y)))
            numbers = [i for i in bucket if math.isfinite(y[i])]
            gaps = [i for i in bucket if not math.isfinite(y[i])]
            kept |= {min(numbers, key=y.__getitem__), max(numbers, key=y.__getitem__)}  # if any
            kept |= set(gaps[:1])
        return sorted(kept)

    Args:
        y: (N,), N ≥ 1.

    Returns:
        Ascending indexes, all N of them where N ≤ 2 × buckets.
    """
    if len(y) <= 2 * buckets:
        return np.arange(len(y))
    width = math.ceil(len(y) / buckets)
    table = np.full((math.ceil(len(y) / width), width), np.nan)
    table.ravel()[: len(y)] = y
    gap = ~np.isfinite(table)
    low = np.where(gap, np.inf, table).argmin(axis=1)
    high = np.where(gap, -np.inf, table).argmax(axis=1)
    first_gap = np.where(gap.any(axis=1), gap.argmax(axis=1), low)
    kept = np.stack([low, high, first_gap]) + width * np.arange(len(table))
    kept = np.unique(np.append(kept, [0, len(y) - 1]))
    return kept[kept < len(y)]  # the last bucket's filling counts as a gap


# --- geometry -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plane:
    """Where data lands in the viewBox: x and y ranges, and the box (left, top, right, bottom)."""

    box: tuple[float, float, float, float]
    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]

    def across(self, x: Any) -> Any:
        left, _, right, _ = self.box
        return left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (right - left)

    def up(self, y: Any) -> Any:
        _, top, _, bottom = self.box
        return bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (bottom - top)


def _plane(
    size: tuple[int, int],
    x: tuple[float, float],
    y: tuple[float, float],
    *,
    x_whole: bool = False,
    y_whole: bool = False,
    above: int = 0,
) -> _Plane:
    """`above`: room for the labels of marks."""
    width, height = size
    y_ticks = tuple(ticks(*y, about=max(2, height // 45), whole=y_whole))
    longest = max((len(label) for label in tick_labels(y_ticks)), default=0)
    box = (max(width / 12 + 5, 7.4 * longest + 9), 10 + above, width - 10, height - 38)
    return _Plane(box, x, y, tuple(ticks(*x, about=max(2, width // 75), whole=x_whole)), y_ticks)


def _x_range(x: np.ndarray) -> tuple[float, float]:
    """From the first to the last, or from 0 where that is near, so that axes seldom move."""
    low, high = float(x.min()), float(x.max())
    if 0 < low <= 0.1 * high:
        low = 0.0
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    return (min(0.0, 2 * low), max(0.0, 2 * low)) if low else (0.0, 1.0)


def _y_range(parts: Sequence[np.ndarray | None]) -> tuple[float, float] | None:
    """The range of all numbers with some air; it starts at 0 where that is near."""
    ends = [float(end) for part in parts for end in _ends(part)]
    if not ends:
        return None
    low, high = min(ends), max(ends)
    size = max(abs(low), abs(high))
    if high - low <= 1e-6 * size or size < 1e-300:
        air = 0.1 * size if size >= 1e-300 else 1.0
        return low - air, high + air
    air = 0.05 * (high - low)
    bottom = 0.0 if 0 <= low <= 0.3 * high else low - air
    top = 0.0 if 0 >= high >= 0.3 * low else high + air
    return bottom, top


def _ends(part: np.ndarray | None) -> tuple[float, ...]:
    if part is None:
        return ()
    part = part[_numbers(part)]
    return (part.min(), part.max()) if len(part) else ()


def _edges(values: np.ndarray, bins: int, range: tuple[float, float] | None) -> np.ndarray:
    """Edges of the bins. Whole numbers get bins of whole width, else a comb would appear."""
    low, high = range or (float(values.min()), float(values.max()))
    if range is None and (values == np.rint(values)).all() and high - low < 1e9:
        width = math.ceil((high - low + 1) / bins)
        return (
            np.arange(low, high + width + 1, width)[: math.ceil((high - low + 1) / width) + 1] - 0.5
        )
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (0.1 * abs(low) or 0.5), high + (0.1 * abs(high) or 0.5)
    return np.linspace(low, high, bins + 1)


# --- data -----------------------------------------------------------------------------------------


def _floats(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def _numbers(values: np.ndarray) -> np.ndarray:
    """(N,) bool: which ones can be drawn."""
    return np.abs(values) <= _LARGEST


def _cleaned(series: Series) -> Series:
    """As float64, without points that have no x; what can't be drawn is NaN."""
    x = _floats(series.x)
    known = _numbers(x)

    def cleaned(values: np.ndarray) -> np.ndarray:
        values = _floats(values)[known]
        return np.where(_numbers(values), values, np.nan)

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


def _rounded(value: float) -> float:
    """With the digits that `number` shows: four, or all of those before the point."""
    return float(f"{value:.0f}" if 1e4 <= abs(value) < 1e6 else f"{value:.4g}")


def _short(values: np.ndarray) -> list[float | None]:
    """Values for the tooltip; what isn't a number is None, a whole one goes without ".0"."""
    rounded = (_rounded(value) for value in values.tolist())
    return [None if one != one else int(one) if one.is_integer() else one for one in rounded]


def _exact(values: np.ndarray) -> list[float]:
    """Positions along x, the same way but with eight digits."""
    rounded = (float(f"{value:.8g}") for value in values.tolist())
    return [int(one) if one.is_integer() else one for one in rounded]


def _scales(kind: str, plane: _Plane, x_label: str, unit: str = "") -> dict[str, Any]:
    """What all kinds of figures tell the tooltip."""
    words = {"kind": kind, "label": _plain(x_label), "unit": _plain(unit)}
    return words | {"box": list(plane.box), "xs": list(plane.x), "ys": list(plane.y)}


def _points(series: Sequence[Series]) -> list[dict[str, Any]]:
    """The curves for the tooltip."""
    return [
        {"name": _plain(one.name), "tone": _plain(one.tone), "style": one.style}
        | {"x": _exact(one.x), "y": _short(one.y)}
        | ({} if one.raw is None else {"raw": _short(one.raw)})
        for one in series
    ]


# --- SVG ------------------------------------------------------------------------------------------


def _axes(plane: _Plane, x_label: str) -> str:
    """Grid lines, the zero line, and labels along both axes."""
    left, _, right, bottom = plane.box
    rows = [plane.up(value) for value in plane.y_ticks]
    grid = "".join(f"M{left:.1f} {at:.1f}H{right}" for at in rows)
    zero = plane.up(0.0) if rows and plane.y[0] <= 0 <= plane.y[1] else bottom
    words = [
        _words("tick", left - 6, at, label, "end", 0.35)
        for at, label in zip(rows, tick_labels(plane.y_ticks), strict=True)
    ]
    for value, label in zip(plane.x_ticks, tick_labels(plane.x_ticks), strict=True):
        furthest = right + 9 - 3.4 * len(label)  # the last label stays inside the picture
        words.append(_under(plane, min(plane.across(value), furthest), label))
    words.append(_words("label", right, bottom + 5, x_label, "end", 2.1))
    lines = (
        f'<path class="grid" d="{grid}"/><path class="zero" d="M{left:.1f} {zero:.1f}H{right}"/>'
    )
    return lines + "".join(words)


def _under(plane: _Plane, across: float, label: str) -> str:
    return _words("tick", across, plane.box[3] + 5, label, dy=0.9)


def _labels(plane: _Plane, labels: Sequence[str]) -> str:
    """Names under groups of bars; every second or third where there is no room for all."""
    longest = max(len(label) for label in labels)
    every = math.ceil(6.8 * (longest + 1) * len(labels) / (plane.box[2] - plane.box[0]))
    return "".join(
        _under(plane, plane.across(at + 0.5), labels[at]) for at in range(0, len(labels), every)
    )


def _words(
    kind: str, x: float, y: float, words: str, anchor: str = "middle", dy: float = 0.0
) -> str:
    """Text; `dy` (in em) follows the font, whose size in units depends on the figure's width."""
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" dy="{dy}em" text-anchor="{anchor}">'
        f"{_text(words)}</text>"
    )


def _curve(series: Series, plane: _Plane) -> str:
    """One series: a line, with dots or a faint unsmoothed line behind it where it has them."""
    if series.style == "dashed" and len(series.x) == 1:  # a target of the first step holds for all
        series = replace(series, x=np.array(plane.x), y=np.repeat(series.y, 2), raw=None)
    across, up = plane.across(series.x), plane.up(series.y)
    raw = series.raw
    paths = [] if raw is None else [("raw", _path(across, plane.up(raw)))]
    paths.append((series.style, _path(across, up)))
    known = np.flatnonzero(np.isfinite(up))
    if series.style == "line":
        paths.append(("tip", _dots(across[known[-1:]], up[known[-1:]])))
    if series.style == "dots" and len(known) <= _MOST_DOTS:
        paths.append(("dot", _dots(across[known], up[known])))
    drawn = "".join(f'<path class="{name}" d="{path}"/>' for name, path in paths if path)
    return f'<g class="tone-{_text(series.tone)}" transform="scale(.1)">{drawn}</g>'


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


def _dots(across: np.ndarray, up: np.ndarray) -> str:
    return "".join(
        f"M{x} {y}h0" for x, y in np.rint(10 * np.stack([across, up], axis=1)).astype(int).tolist()
    )


def _gap_marks(series: Sequence[Series], plane: _Plane, x_label: str) -> str:
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
    return f'<path class="gap" d="{marks}"/>{_words("gap", x, top + 12, words, anchor)}'


def _gaps(series: Series) -> np.ndarray:
    gaps = np.isnan(series.y)
    return gaps if series.raw is None else gaps | np.isnan(series.raw)


def _bar_path(
    plane: _Plane, low: np.ndarray, high: np.ndarray, heights: np.ndarray, tone: str
) -> str:
    """Bars from zero, as one path; those that aren't numbers are left out."""
    drawn = np.flatnonzero(_numbers(heights) & (heights != 0))
    left, right = plane.across(low[drawn]), plane.across(high[drawn])
    hair = np.minimum(0.5, 0.1 * (right - left))  # between neighbours
    top = plane.up(heights[drawn])
    boxes = np.stack([left + hair, top, right - left - 2 * hair, plane.up(0.0) - top], axis=1)
    path = "".join(
        f"M{x} {y}h{width}v{height}h{-width}z"
        for x, y, width, height in np.rint(10 * boxes).astype(int).tolist()
    )
    return f'<g class="tone-{_text(tone)}" transform="scale(.1)"><path class="bar" d="{path}"/></g>'


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


def _mark(plane: _Plane, at: float, label: str, before: bool, row: int) -> str:
    x, y = plane.across(at), 13 + 12 * row
    beside = (
        _words("mark", x - 4, y, label, "end")
        if before
        else _words("mark", x + 4, y, label, "start")
    )
    return f'<path class="mark" d="M{x:.1f} {y - 9}V{plane.box[3]}"/>{beside}'


def _message(words: str, size: tuple[int, int]) -> str:
    return _words("empty", size[0] / 2, size[1] / 2, words)


# --- HTML -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Head:
    """What stands above a figure; `legend` is HTML."""

    title: str
    explanation: str = ""
    unit: str = ""
    legend: str = ""


def _figure(
    head: _Head,
    body: str,
    size: tuple[int, int],
    summary: str,
    data: dict[str, Any] | None = None,
) -> str:
    """The whole figure. The SVG is the image, not the figure: a button inside an image could not
    be reached by a screen reader."""
    points = (
        f' data-points="{html.escape(json.dumps(data, ensure_ascii=False, separators=(",", ":")))}"'
        if data
        else ""
    )
    hint = f' title="{_text(head.explanation)}"' if head.explanation else ""
    unit = f'<span class="chart-unit">{_text(head.unit)}</span>' if head.unit else ""
    small = " chart-small" if size == _SMALL_SIZE else ""
    return (
        f'<figure class="chart{small}"{points}><figcaption><div class="chart-head">'
        f'<span class="chart-title"{hint}>{_text(head.title)}</span>{unit}'
        '<button type="button" class="chart-png" title="Save as PNG" '
        f'aria-label="PNG of {_text(head.title)}">PNG</button></div>'
        f'<div class="chart-legend">{head.legend}</div></figcaption>'
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{_text(summary)}">'
        f"{body}</svg></figure>"
    )


def _key(series: Series) -> str:
    """A series in the legend, with its newest value."""
    value = number(float(series.y[-1])) if len(series.y) else "–"
    return _swatch(series.name, series.tone, series.style, value)


def _swatch(name: str, tone: str, style: str, value: str = "") -> str:
    value = f"<b>{_text(value)}</b>" if value else ""
    name = f'<span class="chart-name" title="{_text(name)}">{_text(name)}</span>'
    return f'<span class="chart-key tone-{_text(tone)}"><i class="{style}"></i>{name}{value}</span>'


def _note(words: str) -> str:
    return f'<span class="chart-note">{_text(words)}</span>'


def _summary(title: str, series: Sequence[Series], x_label: str) -> str:
    newest = ", ".join(f"{one.name} {number(float(one.y[-1]))}" for one in series if len(one.y))
    last = max(float(one.x[-1]) for one in series if len(one.x))
    return f"{title}: {newest}, at {x_label} {number(last)}."


def _text(words: str) -> str:
    return html.escape(_plain(words))


def _plain(words: str) -> str:
    """Words as one line without what would break an SVG file, turn the writing direction round or
    fill the page: control characters, lone surrogates and great length."""
    shown = words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…"
    return "".join(
        one if one.isprintable() or one in _JOINERS else " " if one.isspace() else "\ufffd"
        for one in shown
    )


def _scientific(value: float, decimals: int) -> str:
    """2e-5, not 2.000e-05."""
    mantissa, exponent = f"{value:.{decimals}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return _minus(f"{mantissa}e{int(exponent)}" if value else "0")


def _minus(words: str) -> str:
    """With real minus signs, except in the exponent."""
    return "\u2212" + words[1:] if words.startswith("-") else words
