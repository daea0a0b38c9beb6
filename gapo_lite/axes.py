"""The arithmetic of a figure: ranges, ticks, bins, numbers for people, and which points to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BUCKETS = 250
"""Stretches of a curve that keep their extremes; the plot is some 370 units wide."""

LARGEST = 1e300  # beyond it differences overflow; counts as not a number


def number(value: float) -> str:
    """A value for people, with four significant digits: 0.6931, 1,235, 2e-5, −0.5000, 1.

    charts.js has the same rule, for the tooltip.
    """
    value = rounded(value)
    size = abs(value)
    if not size <= LARGEST:
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


@dataclass(frozen=True, slots=True)
class Plane:
    """Where data lands in the viewBox: x and y ranges, and the box (left, top, right, bottom)."""

    box: tuple[float, float, float, float]
    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]

    def across(self, x: Any) -> Any:
        """Places from left to right, in the units of the viewBox."""
        left, _, right, _ = self.box
        return left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (right - left)

    def up(self, y: Any) -> Any:
        """Places from the top, in the units of the viewBox."""
        _, top, _, bottom = self.box
        return bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (bottom - top)


def plane_of(
    size: tuple[int, int],
    x: tuple[float, float],
    y: tuple[float, float],
    *,
    x_whole: bool = False,
    y_whole: bool = False,
    above: int = 0,
) -> Plane:
    """`above`: room for the labels of marks."""
    width, height = size
    y_ticks = tuple(ticks(*y, about=max(2, height // 45), whole=y_whole))
    longest = max((len(label) for label in tick_labels(y_ticks)), default=0)
    box = (max(width / 12 + 5, 7.4 * longest + 9), 10 + above, width - 10, height - 38)
    return Plane(box, x, y, tuple(ticks(*x, about=max(2, width // 75), whole=x_whole)), y_ticks)


def x_range(x: np.ndarray) -> tuple[float, float]:
    """From the first to the last, or from 0 where that is near, so that axes seldom move."""
    low, high = float(x.min()), float(x.max())
    if 0 < low <= 0.1 * high:
        low = 0.0
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    return (min(0.0, 2 * low), max(0.0, 2 * low)) if low else (0.0, 1.0)


def y_range_of(parts: Sequence[np.ndarray | None]) -> tuple[float, float] | None:
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
    part = part[drawable(part)]
    return (part.min(), part.max()) if len(part) else ()


def edges_of(values: np.ndarray, bins: int, range: tuple[float, float] | None) -> np.ndarray:
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


def floats(values: Any) -> np.ndarray:
    """As float64."""
    return np.asarray(values, dtype=np.float64)


def drawable(values: np.ndarray) -> np.ndarray:
    """(N,) bool: which ones can be drawn."""
    return np.abs(values) <= LARGEST


def _scientific(value: float, decimals: int) -> str:
    """2e-5, not 2.000e-05."""
    mantissa, exponent = f"{value:.{decimals}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return _minus(f"{mantissa}e{int(exponent)}" if value else "0")


def _minus(words: str) -> str:
    """With real minus signs, except in the exponent."""
    return "\u2212" + words[1:] if words.startswith("-") else words


def rounded(value: float) -> float:
    """With the digits that `number` shows: four, or all of those before the point."""
    return float(f"{value:.0f}" if 1e4 <= abs(value) < 1e6 else f"{value:.4g}")
