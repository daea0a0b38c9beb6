"""What all figures are made of: the card around them, axes, words. Words from outside go through
`text`, the only way into the HTML.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from gapo_lite.axes import Plane, rounded, tick_labels

WHOLE, SMALL = (420, 230), (210, 130)
"""Sizes of a figure, in the units of the viewBox; `charts.css` sizes words by the width."""

_LONGEST = 500  # characters of a title or name
_JOINERS = "\u200c\u200d"  # not printable by themselves, but part of Persian words and of emoji


@dataclass(frozen=True, slots=True)
class Head:
    """What stands above a figure; `legend` is HTML."""

    title: str
    explanation: str = ""
    unit: str = ""
    legend: str = ""


def figure(
    head: Head,
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
    hint = f' title="{text(head.explanation)}"' if head.explanation else ""
    unit = f'<span class="chart-unit">{text(head.unit)}</span>' if head.unit else ""
    small = " chart-small" if size == SMALL else ""
    return (
        f'<figure class="chart{small}"{points}><figcaption><div class="chart-head">'
        f'<span class="chart-title"{hint}>{text(head.title)}</span>{unit}'
        '<button type="button" class="chart-png" title="Save as PNG" '
        f'aria-label="PNG of {text(head.title)}">PNG</button></div>'
        f'<div class="chart-legend">{head.legend}</div></figcaption>'
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{text(summary)}">'
        f"{body}</svg></figure>"
    )


def still(drawn: str) -> str:
    """A figure for a page without scripts: without the tooltip's data and the PNG button."""
    drawn = re.sub(r' data-points="[^"]*"', "", drawn)
    return re.sub(r'<button type="button" class="chart-png".*?</button>', "", drawn)


def swatch(name: str, tone: str, style: str, value: str = "") -> str:
    """A name in the legend, with its colour and, where there is one, its value."""
    value = f"<b>{text(value)}</b>" if value else ""
    name = f'<span class="chart-name" title="{text(name)}">{text(name)}</span>'
    return f'<span class="chart-key tone-{text(tone)}"><i class="{style}"></i>{name}{value}</span>'


def remark(words: str) -> str:
    """Words in the legend's place."""
    return f'<span class="chart-note">{text(words)}</span>'


def message(words: str, size: tuple[int, int]) -> str:
    """What an empty figure says."""
    return words_at("empty", size[0] / 2, size[1] / 2, words)


def axes_of(plane: Plane, x_label: str) -> str:
    """Grid lines, the zero line, and labels along both axes."""
    left, _, right, bottom = plane.box
    rows = [plane.up(value) for value in plane.y_ticks]
    grid = "".join(f"M{left:.1f} {at:.1f}H{right}" for at in rows)
    zero = plane.up(0.0) if rows and plane.y[0] <= 0 <= plane.y[1] else bottom
    words = [
        words_at("tick", left - 6, at, label, "end", 0.35)
        for at, label in zip(rows, tick_labels(plane.y_ticks), strict=True)
    ]
    for value, label in zip(plane.x_ticks, tick_labels(plane.x_ticks), strict=True):
        furthest = right + 9 - 3.4 * len(label)  # the last label stays inside the picture
        words.append(under(plane, min(plane.across(value), furthest), label))
    words.append(words_at("label", right, bottom + 5, x_label, "end", 2.1))
    lines = (
        f'<path class="grid" d="{grid}"/><path class="zero" d="M{left:.1f} {zero:.1f}H{right}"/>'
    )
    return lines + "".join(words)


def under(plane: Plane, across: float, label: str) -> str:
    """A label under the x axis."""
    return words_at("tick", across, plane.box[3] + 5, label, dy=0.9)


def words_at(
    kind: str, x: float, y: float, words: str, anchor: str = "middle", dy: float = 0.0
) -> str:
    """Text; `dy` (in em) follows the font, whose size in units depends on the figure's width."""
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" dy="{dy}em" text-anchor="{anchor}">'
        f"{text(words)}</text>"
    )


def dots(across: np.ndarray, up: np.ndarray) -> str:
    """Path data in tenths of a unit: strokes of no length, which round caps make dots."""
    return "".join(
        f"M{x} {y}h0" for x, y in np.rint(10 * np.stack([across, up], axis=1)).astype(int).tolist()
    )


def short(values: np.ndarray) -> list[float | None]:
    """Values for the tooltip; what isn't a number is None, a whole one goes without ".0"."""
    shown = (rounded(value) for value in values.tolist())
    return [None if one != one else int(one) if one.is_integer() else one for one in shown]


def exact(values: np.ndarray) -> list[float]:
    """Positions along x, the same way but with eight digits."""
    rounded = (float(f"{value:.8g}") for value in values.tolist())
    return [int(one) if one.is_integer() else one for one in rounded]


def text(words: str) -> str:
    """Words as HTML."""
    return html.escape(plain(words))


def plain(words: str) -> str:
    """Words as one line without what would break an SVG file, turn the writing direction round or
    fill the page: control characters, lone surrogates and great length."""
    shown = words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…"
    return "".join(
        one if one.isprintable() or one in _JOINERS else " " if one.isspace() else "\ufffd"
        for one in shown
    )
