"""The figures of a sweep's report: the paper's Figures 1 and 2 and what else a reader asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gapo_lite.plots import counted_histogram
from gapo_lite.report_blocks import Figures
from gapo_lite.report_tables import base_accuracies, ef_groups, groups_of
from gapo_lite.report_verdict import (
    ACCURACY,
    COMPARED,
    TOKENS,
    Comparison,
    Measure,
    with_interval,
)
from gapo_lite.scatter import Cloud, Row, intervals, scatter
from gapo_lite.statistics import Estimate, estimate
from gapo_lite.sweep_results import ContenderResult, Counted, SweepResults

CHOSEN = next(one for one in COMPARED if one.key == "chosen_change")


def tone_of(at: int) -> tuple[str, int]:
    """Colour and shape of the contender number `at`; 20 differ."""
    return f"run{at % 10}", at % 4


def difference_figures(results: SweepResults, comparisons: list[Comparison]) -> Figures:
    """Differences to the baseline with their intervals: accuracy, chosen logps, length."""
    places = {one.name: at for at, one in enumerate(results.contenders)}
    drawn = []
    for measure, title in (
        (ACCURACY, "Accuracy"),
        (CHOSEN, "Chosen logps"),
        (TOKENS, "Length of answers"),
    ):
        found = [(one.contender.name, one.differences[measure.key]) for one in comparisons]
        if any(each.num for _, each in found):
            rows = [
                Row(
                    name,
                    each.mean * measure.scale,
                    _scaled_half(each, measure),
                    with_interval(each, measure, signed=True),
                    *tone_of(places[name]),
                )
                for name, each in found
            ]
            drawn.append(intervals(f"{title}, difference", rows, unit=measure.unit))
    caption = (
        "Differences to the baseline, paired by seed, with 95 % intervals. One that crosses the "
        "dashed line at 0 tells nothing; a mark without an interval stands for too few seeds."
    )
    return Figures(tuple(drawn), caption)


def quality_figures(results: SweepResults) -> Figures:
    """Accuracy against the change of chosen logps (the paper's Figure 1), and against length."""
    base = base_accuracies(results)[:1]
    drawn = [_against(results, CHOSEN, "Accuracy and change of chosen logps", _at_base(0.0, base))]
    if any(one.values("tokens") for one in results.contenders):
        tokens = results.base_answers.get("tokens", math.nan)
        drawn.append(
            _against(results, TOKENS, "Accuracy and length of answers", _at_base(tokens, base))
        )
    caption = (
        "Each small mark is a run, each large one a contender's mean with 95 % intervals over "
        "seeds; the ring marks the baseline, the cross the base model. The paper's Figure 1 shows "
        "win rates over chosen logps; here accuracy on held-out pairs stands for quality."
    )
    return Figures(tuple(drawn), caption)


def ef_figures(results: SweepResults) -> Figures | None:
    """How alike the training pairs are, by each evaluation factor (the paper's Figure 2)."""
    found: dict[str, Counted] = {}
    for one in results.contenders:
        if one.metric and one.ef:
            found.setdefault(one.metric, one.ef)
    drawn = [
        counted_histogram(metric, each.counts, each.edges, note=_num_pairs(each), small=True)
        for metric, each in found.items()
    ]
    caption = (
        "How alike chosen and rejected responses of the training pairs are, by evaluation factor "
        "(the paper's Figure 2): 0 is nothing in common, 1 the same text."
    )
    return Figures(tuple(drawn), caption, small=True) if drawn else None


def margin_figures(results: SweepResults) -> Figures | None:
    """Target margins of the training pairs, in reward units, on one axis."""
    found = [(at, one, _filled(one.margins)) for at, one in enumerate(results.contenders)]
    told = [(at, one, margins) for at, one, margins in found if margins]
    if not told:
        return None
    ends = [float(end) for *_, margins in told for end in (margins.edges[0], margins.edges[-1])]
    across = (min(0.0, *ends), max(0.0, *ends))
    drawn = []
    for at, one, margins in told:
        mean = estimate(list(one.values("target_margin").values())).mean
        drawn.append(
            counted_histogram(
                one.name,
                margins.counts,
                margins.edges,
                marks=[(mean, f"mean {mean:.2f}")] if math.isfinite(mean) else [],
                note=_num_pairs(margins),
                tone=tone_of(at)[0],
                small=True,
                across=across,
            )
        )
    caption = (
        "The target margins that each contender asked of the training pairs, in reward units. "
        "One bar is one margin for all."
    )
    return Figures(tuple(drawn), caption, small=True)


def decile_figures(results: SweepResults) -> Figures | None:
    """Accuracy by how alike the held-out pairs are, of the base model and each contender."""
    groups = ef_groups(results)
    if len(groups) < 2:
        return None
    x = np.arange(1, len(groups) + 1)
    base = np.array([group.base_accuracy for group in groups]) * 100
    lines = []
    for at, one in enumerate(results.contenders):
        found = [
            estimate([each.tuned_accuracy for each in groups_of(one, groups, number)])
            for number in range(len(groups))
        ]
        if any(each.num for each in found):
            tone, shape = tone_of(at)
            means = np.array([each.mean for each in found]) * 100
            halves = np.array([_scaled_half(each, ACCURACY) or math.nan for each in found])
            lines.append(Cloud(one.name, x, means, tone, "line", shape, y_half=halves))
    if not lines:
        return None
    shown = np.concatenate([base, *(line.y for line in lines)])
    shown = shown[np.isfinite(shown)]
    y_range = (float(shown.min()) - 6, float(shown.max()) + 6) if len(shown) else (0.0, 100.0)
    drawn = [
        scatter(
            line.name,
            [Cloud("base model", x, base, "target", "dashed"), line],
            x_label="",
            y_label="%",
            small=True,
            y_range=y_range,
        )
        for line in lines
    ]
    caption = (
        f"Accuracy by {len(groups)} groups of about as many held-out pairs, from the least alike "
        f"on the left to the most alike on the right by {results.decile_metric}; dashed: the base "
        "model. Intervals over seeds are cut where they leave the picture. A group is small, so "
        "that a point moves by several per cent with a single pair."
    )
    return Figures(tuple(drawn), caption, small=True)


# --- parts ----------------------------------------------------------------------------------------


def _against(results: SweepResults, measure: Measure, title: str, base: Sequence[Cloud]) -> str:
    clouds = [*base]
    for at, one in enumerate(results.contenders):
        clouds += _clouds(one, at, measure, is_baseline=one.name == results.baseline)
    x_label = f"{measure.title.lower()}, {measure.unit}" if measure is CHOSEN else "tokens"
    return scatter(title, clouds, x_label=x_label, y_label="accuracy, %", y_limits=(0, 100))


def _clouds(
    contender: ContenderResult, at: int, measure: Measure, *, is_baseline: bool
) -> list[Cloud]:
    """A contender's runs and their mean."""
    xs, ys = contender.values(measure.key), contender.values("accuracy")
    seeds = [seed for seed in xs if seed in ys]
    seeds = [seed for seed in seeds if math.isfinite(xs[seed]) and math.isfinite(ys[seed])]
    if not seeds:
        return []
    x = estimate([xs[seed] for seed in seeds])
    y = estimate([ys[seed] for seed in seeds])
    tone, shape = tone_of(at)
    mean = Cloud(
        contender.name,
        np.array([x.mean]) * measure.scale,
        np.array([y.mean]) * 100,
        tone,
        "baseline" if is_baseline else "mean",
        shape,
        np.array([_scaled_half(x, measure) or math.nan]),
        np.array([_scaled_half(y, ACCURACY) or math.nan]),
    )
    runs = Cloud(
        contender.name,
        np.array([xs[seed] for seed in seeds]) * measure.scale,
        np.array([ys[seed] for seed in seeds]) * 100,
        tone,
        "run",
        shape,
    )
    return [runs, mean] if len(seeds) > 1 else [mean]


def _at_base(x: float, accuracy: list[float]) -> list[Cloud]:
    y = np.array(accuracy or [math.nan]) * 100
    return [Cloud("base model", np.array([x]), y, "target", "reference")]


def _scaled_half(found: Estimate, measure: Measure) -> float | None:
    return None if found.half_width is None else found.half_width * measure.scale


def _filled(found: Counted | None) -> Counted | None:
    """Without the empty bins at both ends."""
    if found is None:
        return None
    filled = np.flatnonzero(found.counts)
    first, last = int(filled[0]), int(filled[-1])
    return Counted(found.counts[first : last + 1], found.edges[first : last + 2])


def _num_pairs(found: Counted) -> str:
    return f"{int(found.counts.sum()):,} pairs"
