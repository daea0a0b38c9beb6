"""From evaluation factors to target margins: floor, mapping, normalisation.

Source: *Gap-Aware Preference Optimization*, section 3.2 (eqs. 6, 8 and 10) and Table 4. The floor
is this project's own decision: real data has pairs with no common token (EF = 0, so log(1/EF) would
be infinite), and the paper does not say what it does with them.

    ef ── clamp to [ef_floor, 1] ── mapping ──> gap ── normalisation with γ ──> target margin

A gap can also be the difference of the data's own ratings, the paper's future work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gapo_lite.errors import ConfigError, DataError

MAPPINGS = {
    "log": lambda ef: -np.log(ef),  # eq. 6, best in Table 4
    "linear": lambda ef: 1.0 - ef,
    "square": lambda ef: 1.0 - ef**2,
    "sqrt": lambda ef: 1.0 - np.sqrt(ef),
}
"""Name → gap(ef), all falling, with gap(1) = 0."""

NORMALIZATIONS = {
    "scale": lambda gap, mean_gap, gamma: gamma * gap / mean_gap,  # eq. 8
    "shift": lambda gap, mean_gap, gamma: gap - mean_gap + gamma,  # eq. 10
    "none": lambda gap, mean_gap, gamma: gap,
}
"""Name → margin(gap, mean gap of the training split, γ)."""


@dataclass(frozen=True, slots=True)
class Margins:
    """Target margins of some pairs, in the units of `logps_avg`.

    Attributes:
        values: (N,) float64 target margins; multiply by β for reward units (equation 5).
        gaps: (N,) float64 gaps before normalisation.
        mean_gap: mean gap of the training split: what held-out pairs are normalised by.
        num_floored: pairs whose EF lay below the floor and was raised to it.
        num_equal: pairs with EF = 1, whose gap is 0.
        num_negative: pairs with a margin below 0 (possible under `shift`; allowed).
    """

    values: np.ndarray
    gaps: np.ndarray
    mean_gap: float
    num_floored: int
    num_equal: int
    num_negative: int


def estimate_margins(
    ef: np.ndarray,
    *,
    mapping: str = "log",
    normalization: str = "scale",
    gamma: float = 0.3,
    ef_floor: float = 0.01,
    mean_gap: float | None = None,
) -> Margins:
    """Turns the evaluation factors of a set of pairs into target margins.

    Args:
        ef: (N,) similarities in [0, 1].
        mapping: a key of MAPPINGS.
        normalization: a key of NORMALIZATIONS.
        gamma: γ, the mean target margin under `scale` and `shift`. Paper: 0.3.
        ef_floor: EF values below it are raised to it, in (0, 1].
        mean_gap: mean gap of the training split, for held-out pairs; None computes it from `ef`
            (the training split).

    Raises:
        ConfigError: an unknown mapping or normalisation, or a floor outside (0, 1].
        DataError: an EF outside [0, 1] or not finite, no pairs, or `scale` where every gap is 0.
    """
    ef = np.asarray(ef, dtype=np.float64)
    _check_settings(mapping, normalization, ef_floor)
    _check_ef(ef)
    gaps = MAPPINGS[mapping](np.clip(ef, ef_floor, 1.0)) + 0.0  # -log(1) = -0.0 becomes 0.0
    return _normalized(
        gaps,
        normalization,
        gamma,
        mean_gap,
        f"every gap is 0: all {ef.size} pairs have an evaluation factor of 1 (chosen and rejected "
        "look the same to this metric)",
        num_floored=int((ef < ef_floor).sum()),
        num_equal=int((ef == 1.0).sum()),
    )


def rating_margins(
    gaps: np.ndarray,
    *,
    normalization: str = "scale",
    gamma: float = 0.3,
    mean_gap: float | None = None,
) -> Margins:
    """Turns differences of ratings into target margins.

    Args:
        gaps: (N,) chosen minus rejected rating; NaN where a pair has none, which then gets the
            mean gap.
        normalization: a key of NORMALIZATIONS.
        gamma: γ, the mean target margin under `scale` and `shift`.
        mean_gap: mean gap of the training split, for held-out pairs; None computes it.

    Raises:
        ConfigError: an unknown normalisation.
        DataError: no pair has ratings, or `scale` where the mean gap is not above 0.
    """
    gaps = np.asarray(gaps, dtype=np.float64)
    _check_settings("log", normalization, 1.0)
    rated = np.isfinite(gaps)
    if not rated.any() and mean_gap is None:
        raise DataError(
            f"none of {gaps.size} pairs has ratings of both responses, so margin.source: rating "
            "has nothing to go by. Name the columns in data.rating_columns, or use margin.source: "
            "ef."
        )
    mean = float(gaps[rated].mean()) if mean_gap is None else mean_gap
    return _normalized(
        np.where(rated, gaps, mean),
        normalization,
        gamma,
        mean,
        f"the mean gap is {mean:.4g}: the ratings of {gaps.size} pairs do not favour the chosen "
        "responses",
        num_floored=0,
        num_equal=int((gaps == 0.0).sum()),
    )


def _normalized(
    gaps: np.ndarray,
    normalization: str,
    gamma: float,
    mean_gap: float | None,
    why_none: str,
    *,
    num_floored: int,
    num_equal: int,
) -> Margins:
    if mean_gap is None:
        mean_gap = float(gaps.mean())
    if normalization == "scale" and mean_gap <= 0.0:
        raise DataError(
            f"{why_none}, so `normalization: scale` would divide by zero or less. Choose another "
            "EF metric or margin.source, use `normalization: shift`, or check that chosen and "
            "rejected are different columns."
        )
    values = NORMALIZATIONS[normalization](gaps, mean_gap, gamma)
    return Margins(
        values=values,
        gaps=gaps,
        mean_gap=mean_gap,
        num_floored=num_floored,
        num_equal=num_equal,
        num_negative=int((values < 0.0).sum()),
    )


def constant_margins(num_pairs: int, gamma: float) -> Margins:
    """The same margin γ for every pair, as SimPO's. `gaps` equal `values`; nothing is floored."""
    values = np.full(num_pairs, float(gamma))
    return Margins(values, values, float(gamma), num_floored=0, num_equal=0, num_negative=0)


def _check_settings(mapping: str, normalization: str, ef_floor: float) -> None:
    for key, value, table in (
        ("mapping", mapping, MAPPINGS),
        ("normalization", normalization, NORMALIZATIONS),
    ):
        if value not in table:
            raise ConfigError(f"unknown {key} {value!r}: choose one of {', '.join(table)}.")
    if not 0.0 < ef_floor <= 1.0:
        raise ConfigError(
            f"ef_floor is {ef_floor}, but must lie in (0, 1]: the logarithm of 0 is infinite."
        )


def _check_ef(ef: np.ndarray) -> None:
    if ef.ndim != 1 or ef.size == 0:
        raise DataError(
            f"evaluation factors must be a non-empty row of numbers, but have shape {ef.shape}."
        )
    bad = np.flatnonzero(~((ef >= 0.0) & (ef <= 1.0)))  # NaN fails both comparisons
    if bad.size:
        raise DataError(
            f"{bad.size} evaluation factors lie outside [0, 1]; the first is {ef[bad[0]]} of "
            f"pair {bad[0]} (from 0)."
        )
