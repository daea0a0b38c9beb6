"""Figures of few points with intervals: one measure against another, and differences from zero.

Drawn like those of `plots`, in the same colours; colour and shape together tell up to 20 names
apart. Where the pointer rests on a mark, the browser itself shows its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from gapo_lite.axes import Plane, drawable, floats, number, plane_of, ticks
from gapo_lite.drawing import (
    SMALL,
    WHOLE,
    Head,
    axes_of,
    figure,
    message,
    plain,
    swatch,
    text,
    words_at,
)

TALL = (420, 290)

Style = Literal["mean", "baseline", "run", "reference", "line", "dashed"]
_LONGEST_LABEL = 24
_WIDTH, _HEIGHT = 7.2, 13.0  # of a letter, in units of the viewBox


@dataclass(frozen=True, slots=True, eq=False)
class Cloud:
    """Points of one name.

    Attributes:
        name: as the legend and the label say it.
        x, y: (N,); points that aren't numbers are left out.
        tone: colour, a class of charts.css.
        style: "mean" is a mark with a label, "baseline" the same in a ring, "run" a faint dot,
            "reference" a cross with a label, "line" marks joined by a line, "dashed" a line alone.
        shape: of the mark, any whole number.
        x_half, y_half: (N,) half widths of intervals; NaN for none.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    tone: str
    style: Style = "mean"
    shape: int = 0
    x_half: np.ndarray | None = None
    y_half: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of an interval chart.

    Attributes:
        name: on the left.
        middle: NaN for none.
        half: half width of the interval, None for none.
        words: the same on the right.
        tone, shape: of the mark.
    """

    name: str
    middle: float
    half: float | None
    words: str
    tone: str
    shape: int = 0


def scatter(
    title: str,
    clouds: Sequence[Cloud],
    *,
    x_label: str,
    y_label: str = "",
    explanation: str = "",
    small: bool = False,
    y_range: tuple[float, float] | None = None,
    y_limits: tuple[float, float] = (-math.inf, math.inf),
    empty: str = "nothing to compare yet",
) -> str:
    """A figure of points, their means and intervals; an interval that leaves the picture is cut.

    Args:
        y_label: stands beside the title.
        explanation: shown when the pointer rests on the title.
        small: half the size and without a legend, for many side by side.
        y_range: for several figures to share.
        y_limits: what intervals may reach beyond, but the picture does not, as 0 and 100 %.
    """
    size = SMALL if small else TALL
    clouds = [_known(one) for one in clouds]
    clouds = [one for one in clouds if len(one.x)]
    named = [one for one in clouds if one.style != "run"]
    keys = "".join(_key(one) for one in named)
    head = Head(title, explanation, y_label, "" if small else keys)
    if not clouds:
        return figure(head, message(empty, size), size, f"{title}: {empty}.")
    plane = plane_of(
        size,
        _range([(one.x, one.x_half) for one in clouds]),
        y_range or _range([(one.y, one.y_half) for one in clouds], y_limits),
    )
    order = ("dashed", "run", "line", "reference", "mean", "baseline")
    drawn = sorted(clouds, key=lambda one: order.index(one.style))
    body = axes_of(plane, x_label) + "".join(_cloud(one, plane) for one in drawn)
    if not small:
        body += _name_marks([one for one in named if one.style in order[3:]], plane)
    return figure(head, body, size, f"{title}: {', '.join(one.name for one in named)}.")


def intervals(
    title: str, rows: Sequence[Row], *, x_label: str = "", explanation: str = "", unit: str = ""
) -> str:
    """A figure of differences and their intervals beside a line at zero, a row each.

    An interval that leaves the picture is cut.
    """
    head = Head(title, explanation, unit)
    values = floats([row.middle for row in rows])
    if not drawable(values).any():
        empty = "nothing to compare yet"
        return figure(head, message(empty, WHOLE), WHOLE, f"{title}: {empty}.")
    halves = floats([math.nan if row.half is None else row.half for row in rows])
    size = (WHOLE[0], 40 + 20 * len(rows) + (16 if x_label else 0))
    left = min(130.0, 12 + 7.2 * max(len(_short(row.name, 17)) for row in rows))
    right = size[0] - min(130.0, 12 + 7.2 * max(len(row.words) for row in rows))
    x = _range([(np.append(values, 0), np.append(halves, math.nan))])
    x_ticks = tuple(ticks(*x, about=max(2, int((right - left) / 55))))
    box = (left, 4.0, right, 12.0 + 20 * len(rows))
    plane = Plane(box, x, (0.0, 1.0), x_ticks, ())
    zero = plane.across(0.0)
    lines = [
        axes_of(plane, x_label),
        f'<path class="zero-mark" d="M{zero:.1f} 4V{box[3]:.1f}"/>',
        *(_row(row, 16.0 + 20 * at, plane) for at, row in enumerate(rows)),
    ]
    told = ", ".join(f"{row.name} {row.words}" for row in rows)
    return figure(head, "".join(lines), size, f"{title}: {told}.")


# --- marks ----------------------------------------------------------------------------------------


def _cloud(cloud: Cloud, plane: Plane) -> str:
    across, up = plane.across(cloud.x), plane.up(cloud.y)
    parts = []
    if cloud.style in ("line", "dashed"):
        steps = "L".join(
            f"{x:.1f} {y:.1f}" for x, y in zip(across.tolist(), up.tolist(), strict=True)
        )
        parts.append(f'<path class="{cloud.style}" d="M{steps}"/>')
    if cloud.style != "dashed":
        marks = zip(across.tolist(), up.tolist(), strict=True)
        parts += [
            f"<g><title>{text(_told(cloud, at))}</title>{_whiskers(cloud, at, plane)}"
            f"{_styled(cloud.style, cloud.shape, x, y)}</g>"
            for at, (x, y) in enumerate(marks)
        ]
    return f'<g class="tone-{text(cloud.tone)}">{"".join(parts)}</g>'


def _styled(style: Style, shape: int, x: float, y: float) -> str:
    if style == "reference":
        return f'<path class="cross" d="M{x - 4:.1f} {y:.1f}h8m-4 -4v8"/>'
    size = {"run": 2.2, "line": 2.4}.get(style, 4.2)
    ring = f'<path class="ring" d="{_shape(0, x, y, 7.5)}"/>' if style == "baseline" else ""
    kind = "run" if style == "run" else "point"
    return f'{ring}<path class="{kind}" d="{_shape(shape, x, y, size)}"/>'


def _shape(shape: int, x: float, y: float, r: float) -> str:
    """Path data of a circle, square, triangle or diamond of about the same area."""
    if shape % 4 == 0:
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    if shape % 4 == 1:
        s = 0.9 * r
        return f"M{x - s:.1f} {y - s:.1f}h{2 * s:.2f}v{2 * s:.2f}h{-2 * s:.2f}z"
    if shape % 4 == 2:
        s = 1.25 * r
        return f"M{x:.1f} {y - s:.1f}l{s:.2f} {1.75 * s:.2f}h{-2 * s:.2f}z"
    s = 1.3 * r
    return f"M{x:.1f} {y - s:.1f}l{s:.2f} {s:.2f}l{-s:.2f} {s:.2f}l{-s:.2f} {-s:.2f}z"


def _whiskers(cloud: Cloud, at: int, plane: Plane) -> str:
    x, y = float(cloud.x[at]), float(cloud.y[at])
    lines = []
    if cloud.x_half is not None and drawable(cloud.x_half[at]):
        low, high = _cut(x, float(cloud.x_half[at]), plane.x)
        lines.append(f"M{plane.across(low):.1f} {plane.up(y):.1f}H{plane.across(high):.1f}")
    if cloud.y_half is not None and drawable(cloud.y_half[at]):
        low, high = _cut(y, float(cloud.y_half[at]), plane.y)
        lines.append(f"M{plane.across(x):.1f} {plane.up(low):.1f}V{plane.up(high):.1f}")
    return f'<path class="whisker" d="{"".join(lines)}"/>' if lines else ""


def _cut(middle: float, half: float, ends: tuple[float, float]) -> tuple[float, float]:
    return max(middle - half, ends[0]), min(middle + half, ends[1])


def _row(row: Row, y: float, plane: Plane) -> str:
    left, _, right, _ = plane.box
    words = [
        words_at("mark", left - 8, y, _short(row.name, 17), "end", 0.35),
        words_at("tick", right + 8, y, row.words, "start", 0.35),
    ]
    mark = ""
    if drawable(floats(row.middle)):
        x = plane.across(row.middle)
        if row.half is not None and drawable(floats(row.half)):
            low, high = _cut(row.middle, row.half, plane.x)
            ends = plane.across(low), plane.across(high)
            whole = (row.middle - row.half == low, row.middle + row.half == high)
            caps = "".join(
                f"M{end:.1f} {y - 3:.1f}v6"
                for end, is_end in zip(ends, whole, strict=True)
                if is_end
            )
            mark = f'<path class="whisker" d="M{ends[0]:.1f} {y:.1f}H{ends[1]:.1f}{caps}"/>'
        mark += f'<path class="point" d="{_shape(row.shape, x, y, 4.0)}"/>'
    told = f"<title>{text(row.name)}: {text(row.words)}</title>"
    return f'<g class="tone-{text(row.tone)}">{told}{mark}{"".join(words)}</g>'


# --- words ----------------------------------------------------------------------------------------


def _name_marks(clouds: Sequence[Cloud], plane: Plane) -> str:
    """A label beside each mark where one fits without covering another or coming near another
    mark; the legend has the others."""
    left, top, right, bottom = plane.box
    spots = [(float(plane.across(one.x[0])), float(plane.up(one.y[0]))) for one in clouds]
    marks = [(x - 9, y - 9, x + 9, y + 9) for x, y in spots]
    taken: list[_Box] = []
    words = []
    for at, (cloud, (x, y)) in enumerate(zip(clouds, spots, strict=True)):
        label = _short(cloud.name, _LONGEST_LABEL)
        length = _WIDTH * len(label)
        others = [*marks[:at], *marks[at + 1 :], *taken]
        for dx, dy, anchor in (
            (9, 4, "start"),
            (-9, 4, "end"),
            (0, -10, "middle"),
            (0, 18, "middle"),
        ):
            start = x + dx - length * {"start": 0, "end": 1, "middle": 0.5}[anchor]
            box = (start, y + dy - _HEIGHT + 3, start + length, y + dy + 3)
            inside = left <= box[0] and box[2] <= right + 8 and top - 8 <= box[1] <= bottom - 9
            if inside and not any(_overlap(box, other) for other in others):
                taken.append(box)
                words.append(words_at("mark", x + dx, y + dy, label, anchor))
                break
    return "".join(words)


_Box = tuple[float, float, float, float]


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _key(cloud: Cloud) -> str:
    if cloud.style in ("line", "dashed"):
        return swatch(cloud.name, cloud.tone, cloud.style)
    mark = _styled(cloud.style, cloud.shape, 8, 8)
    name = text(cloud.name)
    return (
        f'<span class="chart-key tone-{text(cloud.tone)}"><svg viewBox="0 0 16 16" '
        f'aria-hidden="true">{mark}</svg><span class="chart-name" title="{name}">{name}</span>'
        "</span>"
    )


def _told(cloud: Cloud, at: int) -> str:
    return (
        f"{cloud.name}: {_with_half(cloud.x, cloud.x_half, at)}, "
        f"{_with_half(cloud.y, cloud.y_half, at)}"
    )


def _with_half(values: np.ndarray, halves: np.ndarray | None, at: int) -> str:
    half = math.nan if halves is None else float(halves[at])
    words = number(float(values[at]))
    return f"{words} ± {number(half)}" if math.isfinite(half) else words


def _short(words: str, longest: int) -> str:
    words = plain(words)
    return words if len(words) <= longest else words[: longest - 1] + "…"


# --- ranges ---------------------------------------------------------------------------------------


def _known(cloud: Cloud) -> Cloud:
    """As float64, without the points that can't be drawn."""
    x, y = floats(cloud.x), floats(cloud.y)
    known = drawable(x) & drawable(y)

    def of(halves: np.ndarray | None) -> np.ndarray | None:
        return None if halves is None else floats(halves)[known]

    return replace(cloud, x=x[known], y=y[known], x_half=of(cloud.x_half), y_half=of(cloud.y_half))


def _range(
    parts: Sequence[tuple[np.ndarray, np.ndarray | None]],
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[float, float]:
    """Room for all points, and for intervals as far as they don't make the points a spot."""
    points = np.concatenate([values for values, _ in parts])
    points = points[drawable(points)]
    low, high = float(points.min()), float(points.max())
    span = high - low
    if span <= 1e-9 * max(abs(low), abs(high), 1e-300):
        span = 0.1 * max(abs(low), abs(high)) or 1.0
    ends = [low, high]
    for values, halves in parts:
        if halves is not None:
            with np.errstate(invalid="ignore", over="ignore"):
                reach = np.concatenate([values - halves, values + halves])
            reach = np.clip(reach[np.isfinite(reach)], low - span, high + span)
            ends += np.clip(reach, *limits).tolist()
    air = 0.07 * span
    return min(ends) - air, max(ends) + air
