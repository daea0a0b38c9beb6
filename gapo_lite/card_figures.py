"""The figures of a model card: SVG files that stand alone, without scripts or style sheets.

A model's page on the Hub shows them as images, so they carry their own colours and a background.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gapo_lite.axes import (
    Plane,
    decimate,
    drawable,
    floats,
    plane_of,
    tick_labels,
    x_range,
    y_range_of,
)

_SIZE = (420, 230)
_TITLE = 34  # height of the title and its legend
_INK, _GRID = "#444444", "#dddddd"
_TRAIN, _HELDOUT, _TARGET = "#2563eb", "#d97706", "#16a34a"


@dataclass(frozen=True, slots=True, eq=False)
class _Curve:
    """(N,) steps and values; `dashed` for a target, `dots` for few points."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    dashed: bool = False
    dots: bool = False


def training_curves(
    rows: Sequence[dict[str, Any]], target: float | None, *, last_step: int
) -> str | None:
    """Loss, reward margin with its target, and accuracy over the steps: one SVG of three panels.

    Args:
        rows: of metrics.jsonl.
        target: mean target margin in reward units, None for an objective without.
        last_step: of the exported adapter; later rows are left out.

    Returns:
        None where there is nothing to draw.
    """
    rows = [row for row in rows if row.get("step", 0) <= last_step]
    panels = []
    for title, key, aim in (
        ("loss", "loss", None),
        ("reward margin", "rewards/margins", target),
        ("reward accuracy", "rewards/accuracies", None),
    ):
        curves = [
            _curve("training", rows, key, _TRAIN),
            _curve("held out", rows, f"eval/{key}", _HELDOUT, dots=True),
        ]
        if curves := [curve for curve in curves if len(curve.x)]:
            panels.append(_panel(title, curves, aim))
    return _svg(panels, "Loss, reward margin and reward accuracy over the steps") or None


def margin_histogram(histogram: dict[str, Any], mean: float | None) -> str | None:
    """How the training pairs' target margins are distributed; None where there is nothing to draw.

    Args:
        histogram: `counts` (N,) and `edges` (N + 1,), as margins.json has them.
        mean: drawn in, where it is known.
    """
    counts, edges = floats(histogram.get("counts", [])), floats(histogram.get("edges", []))
    usable = len(counts) and len(edges) == len(counts) + 1 and counts.sum() > 0
    if not usable or not (drawable(edges).all() and drawable(counts).all()):
        return None
    plane = plane_of(
        _SIZE, (float(edges[0]), float(edges[-1])), (0.0, float(counts.max()) * 1.05), y_whole=True
    )
    bars = "".join(
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(right - left - 1, 0.5):.1f}" '
        f'height="{plane.box[3] - top:.1f}" fill="{_TRAIN}"/>'
        for left, right, top in zip(
            plane.across(edges[:-1]), plane.across(edges[1:]), plane.up(counts), strict=True
        )
    )
    mark = ""
    if mean is not None and edges[0] <= mean <= edges[-1]:
        mark = _upright(plane, plane.across(mean))
    legend = _legend([("mean", _TARGET)] if mark else [])
    body = _frame(plane, "nats a token") + bars + mark
    panel = _titled("target margins of the training pairs", legend, body)
    return _svg([panel], "Distribution of the target margins of the training pairs")


def _curve(
    name: str, rows: Sequence[dict[str, Any]], key: str, colour: str, dots: bool = False
) -> _Curve:
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    x, y = floats(points).reshape(-1, 2).T
    known = drawable(y)
    x, y = x[known], y[known]
    kept = decimate(y) if len(y) else slice(0)
    return _Curve(name, x[kept], y[kept], colour, dots=dots)


def _panel(title: str, curves: list[_Curve], aim: float | None) -> str:
    steps = x_range(np.concatenate([curve.x for curve in curves]))
    if aim is not None and drawable(floats(aim)):
        level = np.full(2, aim)
        curves = [*curves, _Curve("target", floats(steps), level, _TARGET, dashed=True)]
    y = y_range_of([curve.y for curve in curves]) or (0.0, 1.0)
    plane = plane_of(_SIZE, steps, y, x_whole=True)
    body = _frame(plane, "step") + "".join(_line(curve, plane) for curve in curves)
    return _titled(title, _legend([(curve.name, curve.colour) for curve in curves]), body)


def _line(curve: _Curve, plane: Plane) -> str:
    across, up = plane.across(curve.x), plane.up(curve.y)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, up, strict=True))
    dashes = ' stroke-dasharray="6 4"' if curve.dashed else ""
    line = (
        f'<polyline points="{points}" fill="none" stroke="{curve.colour}" stroke-width="1.6"'
        f"{dashes}/>"
    )
    if not curve.dots and len(curve.x) > 1:
        return line
    return line + "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{curve.colour}"/>'
        for x, y in zip(across, up, strict=True)
    )


def _upright(plane: Plane, at: float) -> str:
    _, top, _, bottom = plane.box
    return (
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{_TARGET}" '
        'stroke-width="1.6" stroke-dasharray="6 4"/>'
    )


def _frame(plane: Plane, x_label: str) -> str:
    left, _, right, bottom = plane.box
    parts = [_text((left + right) / 2, bottom + 32, x_label, "middle")]
    for at, label in zip(plane.up(floats(plane.y_ticks)), tick_labels(plane.y_ticks), strict=True):
        parts += [
            f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}" '
            f'stroke="{_GRID}"/>',
            _text(left - 6, at + 4, label, "end"),
        ]
    for at, label in zip(
        plane.across(floats(plane.x_ticks)), tick_labels(plane.x_ticks), strict=True
    ):
        parts.append(_text(at, bottom + 16, label, "middle"))
    parts.append(
        f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{bottom:.1f}" y2="{bottom:.1f}" '
        f'stroke="{_INK}"/>'
    )
    return "".join(parts)


def _titled(title: str, legend: str, body: str) -> str:
    heading = (
        f'<text x="12" y="22" fill="{_INK}" font-size="14" font-weight="600">'
        f"{html.escape(title)}</text>"
    )
    return f'{heading}{legend}<g transform="translate(0 {_TITLE})">{body}</g>'


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    parts, at = [], _SIZE[0] - 10
    for name, colour in reversed(entries):
        parts.append(_text(at, 22, name, "end", colour))
        at -= 7 * len(name) + 14
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, colour: str = _INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="12">'
        f"{html.escape(text)}</text>"
    )


def _svg(panels: Sequence[str], title: str) -> str:
    """The panels side by side; "" for none."""
    if not panels:
        return ""
    width, height = _SIZE[0] * len(panels), _SIZE[1] + _TITLE
    placed = "".join(
        f'<g transform="translate({_SIZE[0] * number} 0)">{panel}</g>'
        for number, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" role="img">'
        f"<title>{html.escape(title)}</title>"
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>{placed}</svg>\n'
    )
