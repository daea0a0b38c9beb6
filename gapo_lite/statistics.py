"""Means over seeds and what can be told from them: Student's t, paired differences, Holm, Wilson.

Without SciPy; the tests hold the numbers against published tables.

    estimate([0.71, 0.74, 0.72])                  # mean 0.7233, ± 0.0379
    difference({42: 0.71, 43: 0.74}, {42: 0.70, 43: 0.69})
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds with its interval.

    Attributes:
        mean: NaN where there is no value.
        half_width: of the 95 % interval, mean ± half_width; None where there is none: fewer than
            two values, or all of them equal, which says nothing of how seeds differ.
        num: values that are numbers, of which the mean is.
        num_lost: values that are not (NaN, infinite).
        p: two-sided probability of a mean this far from 0 if the true one is 0; None without an
            interval.
    """

    mean: float
    half_width: float | None
    num: int
    num_lost: int = 0
    p: float | None = None

    @property
    def includes_zero(self) -> bool:
        """Whether 0 is in the interval; True where there is none to exclude it."""
        return self.half_width is None or abs(self.mean) <= self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval of independent values: mean ± t(n − 1) · s / √n."""
    known = [value for value in values if math.isfinite(value)]
    num, lost = len(known), len(values) - len(known)
    if not num:
        return Estimate(math.nan, None, 0, lost)
    mean = math.fsum(value / num for value in known)  # divided first: a sum may overflow
    deviation = _deviation(known, mean)
    if num < 2 or deviation <= 1e-12 * abs(mean) or not math.isfinite(deviation):
        return Estimate(mean, None, num, lost)
    error = deviation / math.sqrt(num)
    return Estimate(
        mean,
        t_quantile(num - 1) * error,
        num,
        lost,
        1.0 - t_within(abs(mean) / error, num - 1),
    )


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """Mean and interval of the differences to a baseline, seed by seed.

    Args:
        values, baseline: seed → value. Seeds that only one of them has don't count.
    """
    shared = sorted(values.keys() & baseline.keys())
    return estimate([values[seed] - baseline[seed] for seed in shared])


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p of several comparisons: with all of them ≤ 0.05, the chance of even one
    false finding is at most 0.05. Holm (1979)."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = highest
    return adjusted


def wilson(share: float, num: int) -> tuple[float, float]:
    """The 95 % interval of a share that was found among `num` independent cases. Wilson (1927)."""
    z = 1.959963984540054
    middle = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + (z / (2 * num)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def t_quantile(df: int, confidence: float = CONFIDENCE) -> float:
    """t with P(|T| ≤ t) = confidence, T of Student's distribution with `df` degrees of freedom."""
    low, high = 0.0, 2.0
    while t_within(high, df) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if t_within(middle, df) < confidence else (low, middle)
    return high


def t_within(t: float, df: int) -> float:
    """P(|T| ≤ t), by the finite sums of Abramowitz & Stegun, 26.7.3 and 26.7.4.

    Args:
        t: at least 0.
        df: degrees of freedom, a whole number from 1.
    """
    angle = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0 if df == 1 else term
    for at in range(3 if odd else 2, df - 1, 2):  # cos³·2/3, cos⁵·2·4/(3·5), … or cos²·1/2, …
        term *= cosine * cosine * (at - 1) / at
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _deviation(values: Sequence[float], mean: float) -> float:
    """The sample's standard deviation, n − 1 below."""
    if len(values) < 2:
        return 0.0
    return math.hypot(*(value - mean for value in values)) / math.sqrt(len(values) - 1)
