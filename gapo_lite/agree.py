"""Does a metric's gap follow what the judge said? Asked of the data, before anything is trained.

    agree(load_pairs("pairs.jsonl").pairs).sentence

For each evaluation factor: Spearman's rank correlation of its gap with the data's own judgement,
which is the difference of ratings, or `strength` where twice as many pairs have one. A rank
correlation is the same for every mapping of EF to gap (all fall), and so for the margins under
every normalisation; of the floor it sees nothing. Beside it stands what the difference of lengths
alone (characters of chosen minus those of rejected) says of the judgement, and what is left of each
metric with that difference held fixed (the partial rank correlation): judges like long answers, and
long answers have less in common with short ones.

Intervals are percentiles of a seeded bootstrap over prompts: pairs of one prompt are drawn together
because they are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapo_lite.ef import EVALUATION_FACTORS, OPTIONS, check_options
from gapo_lite.ef.cache import cached_bert_scores, cached_scores
from gapo_lite.errors import ConfigError, DataError
from gapo_lite.progress import scoring_progress
from gapo_lite.ranks import RESAMPLES, bootstrap, correlations, settled
from gapo_lite.types import PreferencePair

Floats = NDArray[np.float64]

LEVEL = 0.95
FEWEST_PROMPTS = 10
"""Drawing from fewer says little of how another sample of prompts would have come out."""

_DEGREES = ((0.1, "hardly"), (0.3, "weakly"), (0.5, "moderately"), (1.0, "strongly"))
"""|ρ| below which one says so."""


@dataclass(frozen=True, slots=True)
class Correlation:
    """A rank correlation with the judgement.

    Attributes:
        rho: in [−1, 1]; None where it is not defined, as when all values are the same.
        low, high: its 95 % interval; None with too few prompts.
    """

    rho: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class MetricAgreement:
    """What one evaluation factor has to do with the judgement.

    Attributes:
        metric: a key of EVALUATION_FACTORS.
        gap: its gap's correlation.
        at_equal_lengths: the same with the difference of lengths held fixed.
    """

    metric: str
    gap: Correlation
    at_equal_lengths: Correlation


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the data's judgement has to do with the texts.

    Attributes:
        judgement: "ratings" (chosen minus rejected) or "strength".
        num_pairs: pairs that were judged.
        num_unjudged: the others, which are left out.
        num_prompts: different prompts of the judged pairs.
        metrics: in the order asked for.
        length: the correlation of the difference of lengths alone.
        seed, resamples: of the bootstrap over prompts.
        sentence: all this in plain words.
    """

    judgement: str
    num_pairs: int
    num_unjudged: int
    num_prompts: int
    metrics: tuple[MetricAgreement, ...]
    length: Correlation
    seed: int
    resamples: int
    sentence: str


def agree(
    pairs: Sequence[PreferencePair],
    *,
    metrics: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> Agreement:
    """How far each metric's gap follows the judgement that the data came with.

    Args:
        pairs: from `load_pairs`; its `rating_columns` says where the judgement stands if not where
            it usually does.
        metrics: keys of EVALUATION_FACTORS; None takes the lexical ones, and BERTScore's if
            `options` names its `model`.
        options: of `score_pairs`; each metric takes those that its family knows.
        seed: of the bootstrap.
        show_progress: bars on stderr while scoring.

    Raises:
        ConfigError: a metric or option is unknown.
        DataError: no pair was judged.
        ModelError: BERTScore's encoder cannot be loaded.
    """
    options = options or {}
    metrics = _known(metrics, options)
    name, judged, values = _judgement(pairs)
    gaps = _gaps(judged, metrics, options, show_progress)
    lengths = np.array([len(pair.chosen) - len(pair.rejected) for pair in judged], np.float64)
    prompts = _numbered([_key(pair) for pair in judged])
    table = np.stack([settled(row) for row in (values, lengths, *gaps.values())])
    found, draws = correlations(table), None
    if prompts.max() + 1 >= FEWEST_PROMPTS:
        draws = bootstrap(table, prompts, seed=seed)
    plain = [_with_interval(found, draws, (0, row)) for row in range(1, len(table))]
    fixed = [_with_interval(found, draws, (1, row)) for row in range(2, len(table))]
    rows = tuple(map(MetricAgreement, gaps, plain[1:], fixed))
    num_prompts = int(prompts.max()) + 1
    return Agreement(
        judgement=name,
        num_pairs=len(judged),
        num_unjudged=len(pairs) - len(judged),
        num_prompts=num_prompts,
        metrics=rows,
        length=plain[0],
        seed=seed,
        resamples=0 if draws is None else RESAMPLES,
        sentence=_in_words(name, num_prompts, rows, plain[0]),
    )


def _with_interval(found: Floats, draws: Floats | None, place: tuple[int, int]) -> Correlation:
    rho = float(found[place])
    if not math.isfinite(rho):
        return Correlation(None)
    values = np.zeros(0) if draws is None else draws[:, place[0], place[1]]
    values = values[np.isfinite(values)]
    if not len(values):
        return Correlation(rho)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Correlation(rho, float(low), float(high))


# -- what is correlated --


def _known(metrics: Sequence[str] | None, options: Mapping[str, Any]) -> list[str]:
    """The metrics asked for, once each, after every option has been looked at."""
    if metrics is None:
        with_model = "model" in options
        metrics = [
            name
            for name, factor in EVALUATION_FACTORS.items()
            if factor.family == "lexical" or with_model
        ]
    for name in metrics:
        check_options(name, {})  # that there is such a metric
    families = {EVALUATION_FACTORS[name].family for name in metrics}
    known = {key for family in families for key in OPTIONS[family]}
    for key in options:
        if key not in known:
            raise ConfigError(
                f"None of {', '.join(metrics)} has an option {key!r}. They have: "
                f"{', '.join(sorted(known))}."
            )
    for name in metrics:
        check_options(name, _own(name, options))
    return list(dict.fromkeys(metrics))


def _own(metric: str, options: Mapping[str, Any]) -> dict[str, Any]:
    known = OPTIONS[EVALUATION_FACTORS[metric].family]
    return {key: value for key, value in options.items() if key in known}


def _judgement(pairs: Sequence[PreferencePair]) -> tuple[str, list[PreferencePair], Floats]:
    """Its name, the pairs that have one, and its values (N,)."""
    ratings = np.array([pair.rating_gap for pair in pairs], np.float64)
    strengths = np.array([pair.strength for pair in pairs], np.float64)  # None becomes NaN
    few = 2 * np.isfinite(ratings).sum() < np.isfinite(strengths).sum()
    name, values = ("strength", strengths) if few else ("ratings", ratings)
    known = np.isfinite(values)
    if known.any():
        judged = [pair for pair, is_known in zip(pairs, known, strict=True) if is_known]
        return name, judged, values[known]
    raise DataError(
        f"none of {len(pairs)} pairs was judged: there is neither a number from 0 to 1 in "
        "`strength`, nor ratings of both responses. Name their columns (--strength COLUMN, or "
        "--rating-columns CHOSEN,REJECTED)."
    )


def _gaps(
    pairs: Sequence[PreferencePair],
    metrics: Sequence[str],
    options: Mapping[str, Any],
    show_progress: bool,
) -> dict[str, Floats]:
    """Metric → 1 − EF (N,), which has the order of the gaps under every mapping."""
    chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    found: dict[str, Floats] = {}
    semantic = [name for name in metrics if EVALUATION_FACTORS[name].family == "semantic"]
    for name in metrics:
        if name in found:
            continue
        own = _own(name, options)
        with scoring_progress(name, show_progress) as progress:
            if name in semantic:
                found |= cached_bert_scores(chosen, rejected, own, progress)
            else:
                found[name] = cached_scores(chosen, rejected, name, own, progress)
    return {name: 1.0 - found[name] for name in metrics}


def _key(pair: PreferencePair) -> tuple[tuple[str, str], ...]:
    return tuple((turn["role"], turn["content"]) for turn in pair.prompt)


def _numbered(keys: Sequence[Any]) -> NDArray[np.int64]:
    """(N,) the number of each key among the different ones, from 0."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


# -- in words --


def _in_words(
    name: str, num_prompts: int, rows: Sequence[MetricAgreement], length: Correlation
) -> str:
    what = {"ratings": "the difference of ratings", "strength": "the judged strength"}
    judgement = what[name]
    ranked = [row for row in rows if row.gap.rho is not None]
    if not ranked:
        return f"Nothing can be said: either {judgement} or every metric's gap is always the same."
    best = max(ranked, key=lambda row: row.gap.rho or 0.0)
    few = ""
    if num_prompts < FEWEST_PROMPTS:
        few = f" With {num_prompts} prompts all of this may be chance."
    return (
        f"{_about_best(best, judgement)} ({_figures(best.gap)}).{_about_length(best, length)}"
        f"{_about_fixed(ranked)}{few}"
    )


def _about_best(best: MetricAgreement, judgement: str) -> str:
    if best.gap.high is not None and best.gap.high < 0:
        return (
            f"No metric's gap follows {judgement}: all go the opposite way, {best.metric}'s the "
            "least"
        )
    return (
        f"Of these metrics, {best.metric}'s gap follows {judgement} best, and does so "
        f"{_degree(best.gap)}"
    )


def _degree(found: Correlation) -> str:
    rho = found.rho or 0.0
    if rho <= 0:
        return "not at all"
    if found.low is not None and found.low <= 0:
        return "not for certain"
    return next(word for below, word in _DEGREES if rho <= below)


def _about_length(best: MetricAgreement, length: Correlation) -> str:
    if length.rho is None:
        return " All differences of lengths are the same, so they say nothing."
    gap = best.gap.rho or 0.0
    compared = "does better" if abs(length.rho) > max(gap, 0.0) else "does not do better"
    return f" The difference of lengths alone {compared} ({_figures(length)})."


def _about_fixed(rows: Sequence[MetricAgreement]) -> str:
    """Which metrics say something that lengths do not."""
    defined = [row for row in rows if row.at_equal_lengths.rho is not None]
    if not defined:
        return ""
    left = [row for row in defined if _is_above_zero(row.at_equal_lengths)]
    if not left:
        most = max(defined, key=lambda row: row.at_equal_lengths.rho or 0.0)
        return (
            " With lengths held fixed, no metric's gap follows it for certain any more: the most "
            f"is {most.metric}'s ({_figures(most.at_equal_lengths)})."
        )
    named = ", ".join(f"{row.metric} ({_figures(row.at_equal_lengths)})" for row in left)
    return f" With lengths held fixed, this is left: {named}."


def _is_above_zero(found: Correlation) -> bool:
    return found.low is not None and found.low > 0


def _figures(found: Correlation) -> str:
    """Of a correlation that is defined."""
    text = f"ρ {found.rho:.2f}"
    return (
        text if found.low is None else f"{text}, 95 % interval {found.low:.2f} to {found.high:.2f}"
    )
