"""What may be said of a sweep's numbers, and what may not.

Sentences are made from the numbers alone. A contender is called better or worse than the baseline
only where the interval of their differences, paired by seed, excludes 0 and still does when all
comparisons are taken together (Holm). Length stands beside accuracy in every verdict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gapo_lite.axes import number
from gapo_lite.report_blocks import Name, Words
from gapo_lite.statistics import Estimate, difference, estimate, holm, t_quantile, wilson
from gapo_lite.sweep_results import ContenderResult, SweepResults


@dataclass(frozen=True, slots=True)
class Measure:
    """How a measure is written.

    Attributes:
        key: of `ContenderResult.values`.
        title: of its column.
        unit: of a difference.
        scale: 100 for a share in percent.
        decimals: after the point.
    """

    key: str
    title: str
    unit: str = ""
    scale: float = 1.0
    decimals: int = 1

    def write(self, value: float, *, signed: bool = False) -> str:
        """A value in words, with a real minus sign."""
        scaled = value * self.scale
        if not math.isfinite(scaled):
            return "not a number"
        if abs(scaled) >= 1e6:
            return number(scaled)
        shown = round(scaled, self.decimals) or 0.0  # not −0
        sign = "+" if signed and shown else ""
        return f"{shown:{sign},.{self.decimals}f}".replace("-", "\u2212")


ACCURACY = Measure("accuracy", "Accuracy, %", "points", 100)
TOKENS = Measure("tokens", "Answer, tokens", "tokens")
MEASURES = (
    ACCURACY,
    Measure("reward_accuracy", "Accuracy by its own reward, %", "points", 100),
    Measure("reward_margin", "Reward margin", decimals=2),
    Measure("target_margin", "Target margin", decimals=2),
    Measure("chosen_change", "Chosen logps, change", "nats a token", decimals=3),
    Measure("rejected_change", "Rejected logps, change", "nats a token", decimals=3),
    TOKENS,
    Measure("cut_short", "Cut short, %", "points", 100, 0),
    Measure("repetition", "Repetition, %", "points", 100),
)
COMPARED = tuple(
    one for one in MEASURES if one.key in ("accuracy", "chosen_change", "rejected_change", "tokens")
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A contender against the baseline.

    Attributes:
        contender: with at least one finished run, or none.
        differences: key of COMPARED → differences paired by seed.
        p: of the accuracy's difference, Holm's over all comparisons; None without an interval.
        over_pairs: the accuracy's difference with its interval over held-out pairs, each pair's
            mean over the seeds; None where it is not known which pairs were hit.
    """

    contender: ContenderResult
    differences: dict[str, Estimate]
    p: float | None
    over_pairs: Estimate | None = None

    @property
    def is_found(self) -> bool:
        """Whether a difference of accuracy may be spoken of."""
        return not self.differences["accuracy"].includes_zero and (self.p or 0.0) <= 0.05


def compare(results: SweepResults) -> list[Comparison]:
    """All contenders against the baseline; empty without one that has a finished run."""
    baseline = results.baseline_result
    if baseline is None:
        return []
    others = [one for one in results.contenders if one is not baseline]
    found = [
        {one.key: difference(other.values(one.key), baseline.values(one.key)) for one in COMPARED}
        for other in others
    ]
    # One without an interval cannot be found, but is a comparison that was made.
    adjusted = holm([1.0 if each["accuracy"].p is None else each["accuracy"].p for each in found])
    return [
        Comparison(
            other,
            each,
            None if each["accuracy"].p is None else p,
            difference_over_pairs(other, baseline),
        )
        for other, each, p in zip(others, found, adjusted, strict=True)
    ]


def difference_over_pairs(contender: ContenderResult, baseline: ContenderResult) -> Estimate | None:
    """How much more often a contender hits a pair, with the interval over pairs.

    None where a run has not kept its hits, or the two were measured on other pairs.
    """
    theirs = {cell.seed: cell for cell in baseline.finished}
    shared = [(cell, theirs[cell.seed]) for cell in contender.finished if cell.seed in theirs]
    if not shared or len({len(cell.hits) for both in shared for cell in both}) > 1:
        return None
    if len({cell.data for both in shared for cell in both}) > 1 or not shared[0][0].hits:
        return None
    gains = [np.subtract(ours.hits, other.hits, dtype=np.float64) for ours, other in shared]
    return estimate(np.mean(gains, axis=0).tolist())


def with_interval(found: Estimate, measure: Measure, *, signed: bool = False) -> str:
    """+1.2 ± 3.4; the mean alone where there is no interval."""
    if not found.num:
        return "not a number" if found.num_lost else "–"
    words = measure.write(found.mean, signed=signed)
    if found.half_width is not None:
        words += f" ± {measure.write(found.half_width)}"
    return words


# --- sentences ------------------------------------------------------------------------------------


def headline(results: SweepResults, comparisons: list[Comparison]) -> Words:
    """What it comes to, in one or two sentences."""
    yet = "" if results.state == "finished" else " yet"
    if not results.finished:
        return f"No run has finished{yet}, so there is nothing to say."
    if results.baseline is None:
        return (
            "The sweep names no baseline, so no differences are given: the table says how each "
            "contender did, and intervals that overlap tell no two of them apart."
        )
    baseline = Name(results.baseline)
    if not comparisons:
        if results.baseline_result is None:
            return (
                "The baseline ",
                baseline,
                f" has no finished run{yet}, so there is nothing to compare the others with.",
            )
        return ("There is nothing but the baseline ", baseline, ", and so nothing to compare.")
    better = [one for one in comparisons if one.is_found and one.differences["accuracy"].mean > 0]
    worse = [one for one in comparisons if one.is_found and one.differences["accuracy"].mean < 0]
    rest = len(comparisons) - len(better) - len(worse)
    words: list[str | Name] = []
    for found, how in ((better, "higher"), (worse, "lower")):
        if found:
            verb = "has" if len(found) == 1 else "have"
            words += [
                *_listed([one.contender for one in found]),
                f" {verb} a {how} accuracy than ",
                baseline,
                " on these pairs. ",
            ]
    if not rest:
        return tuple(words)
    some = f"{rest} of {len(comparisons)} contenders cannot" if words else _none_of(comparisons)
    return (
        *words,
        f"{some} be told apart from ",
        baseline,
        " by held-out accuracy in these runs.",
    )


def _none_of(comparisons: list[Comparison]) -> str:
    num = len(comparisons)
    return "The contender cannot" if num == 1 else f"None of {num} contenders can"


def _listed(found: list[ContenderResult]) -> list[str | Name]:
    words: list[str | Name] = []
    for at, one in enumerate(found):
        joint = "" if not at else " and " if at == len(found) - 1 else ", "
        words += [joint, Name(one.name)]
    return words


def verdict(one: Comparison, num_comparisons: int, num_heldout: int | None) -> Words:
    """What a comparison says of a contender, its length beside its accuracy."""
    name = Name(one.contender.name)
    found = one.differences["accuracy"]
    if not found.num:
        lost = " that is a number" if found.num_lost else ""
        return (
            name,
            f": there is no seed on which both it and the baseline have an accuracy{lost}, so "
            "nothing can be compared.",
        )
    told = f": accuracy {with_interval(found, ACCURACY, signed=True)} points"
    told += _in_pairs(found.mean, num_heldout)
    told += f" over {found.num} {_seeds(found.num)}. {_meaning(one, num_comparisons)}"
    return (name, told + _length(one) + _lost(one.contender))


def _meaning(one: Comparison, num_comparisons: int) -> str:
    found = one.differences["accuracy"]
    if found.num == 1:
        return "One seed has no interval: no difference can be told from it, whatever its size."
    if found.half_width is None:
        return (
            "It is the same on every seed, which says nothing of how seeds vary: there is no "
            "interval, and no difference can be told."
        )
    if found.includes_zero:
        return (
            "The interval of the difference includes 0: no difference can be told from these runs."
        )
    p = f"Holm's p {_p(one.p or 0.0)}"
    if not one.is_found:
        return (
            f"The interval excludes 0 by itself, but among {num_comparisons} comparisons that is "
            f"not enough ({p}): a lead for more seeds, not a finding."
        )
    how = "higher" if found.mean > 0 else "lower"
    among = f", also among {num_comparisons} comparisons" if num_comparisons > 1 else ""
    told = f"The interval excludes 0{among} ({p}): {how} on these held-out pairs."
    return told + _for_new_pairs(one.over_pairs)


def _for_new_pairs(found: Estimate | None) -> str:
    if found is None or found.half_width is None:
        return ""
    half = f" Over the pairs it is ± {ACCURACY.write(found.half_width)} points"
    if found.includes_zero:
        return f"{half}, which includes 0: other pairs might show nothing of it."
    return f"{half}, which excludes 0 too."


def _length(one: Comparison) -> str:
    found = one.differences["tokens"]
    if not found.num:
        return ""
    told = f" Length of answers: {with_interval(found, TOKENS, signed=True)} tokens"
    if found.half_width is None:
        return told + ", without an interval."
    if found.includes_zero:
        return told + ", which cannot be told apart from 0."
    return told + (", longer." if found.mean > 0 else ", shorter.")


def _lost(contender: ContenderResult) -> str:
    num = sum(cell.state == "drifted" for cell in contender.cells)
    total = len(contender.cells)
    return f" This is without {num} of its {total} runs, stopped by the drift guard." if num else ""


def _in_pairs(mean: float, num_heldout: int | None) -> str:
    if not num_heldout:
        return ""
    pairs = abs(mean) * num_heldout
    return f" ({pairs:.1f} of {num_heldout:,} pairs)" if math.isfinite(pairs) else ""


def _seeds(num: int) -> str:
    return "seed" if num == 1 else "seeds"


def _verb(num: int, one: str, more: str) -> str:
    return one if num == 1 else more


def _p(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.3f}"


def write_p(p: float | None) -> str:
    """Holm's p for a table."""
    return "–" if p is None else _p(p)


# --- how to read it -------------------------------------------------------------------------------


_GLOSSARY = (
    "A contender is one combination of settings, trained once a seed. Logps are log-probabilities "
    "of a response, averages per token, in nats (natural logarithms: 0.1 less makes a token 0.90 "
    "times as likely). EF, the evaluation factor, says how alike the two responses of a pair are, "
    "from 0 to 1. A reward margin is by how much the chosen response's reward lies above the "
    "rejected one's; the target margin is how much the training asked for."
)


def cautions(results: SweepResults, comparisons: list[Comparison]) -> tuple[Words, ...]:
    """What the numbers do and do not cover; only what these runs give cause for."""
    found: list[Words] = [
        _GLOSSARY,
        _on_intervals(results),
        _on_heldout(results, comparisons),
        _on_many(comparisons),
        "Accuracy counts the held-out pairs whose chosen response has the higher average "
        "log-probability per token, which is the same measure for all objectives. By its own "
        "reward, each objective has another scale, and its margins are in its own units. Neither "
        "is the quality of answers: nobody has judged the answers here.",
        "Change of logps is the tuned model minus the base, averages per token, in nats. Where the "
        "chosen ones fall, the model finds the preferred responses less likely than before, "
        "however well it ranks them.",
        _on_answers(results),
        _on_drifted(results),
        _on_dropped(results),
    ]
    return tuple(one for one in found if one)


def _on_intervals(results: SweepResults) -> str:
    num = len(results.seeds)
    text = (
        "± is half the width of a 95 % interval of Student's t over the seeds (n − 1 degrees of "
        "freedom). It covers what a seed changes: the order of the training pairs, dropout and "
        "where the adapter starts. It does not cover the choice of training and held-out pairs, of "
        "the base model, or of the settings."
    )
    if num == 1:
        return text + " With one seed there is none, and how much seeds matter is not known."
    return text + (
        f" With {num} seeds it reaches {t_quantile(num - 1):.2f} standard errors to each side, "
        "because so few say little of how seeds vary."
        if num <= 5
        else ""
    )


def _on_heldout(results: SweepResults, comparisons: list[Comparison]) -> str:
    num = num_heldout(results)
    accuracies = [value for one in results.contenders for value in one.values("accuracy").values()]
    mean = estimate(accuracies).mean
    if not num or not 0 <= mean <= 1:
        return ""
    differing = (
        "by how much is not known here."
        if all(one.over_pairs is None for one in comparisons)
        else "half of each difference's 95 % interval over pairs stands in the table of "
        "differences (of each pair the mean over the seeds; pairs taken as independent)."
    )
    share, low, high = (f"{ACCURACY.write(one)} %" for one in (mean, *wilson(mean, num)))
    return (
        "For new pairs of the same kind there is a second uncertainty that no number of seeds "
        f"takes away: an accuracy of {share} on {num:,} held-out pairs has a 95 % interval from "
        f"{low} to {high} (Wilson's, of a share). All contenders meet the same pairs, so "
        f"differences between them are less uncertain than that; {differing}"
    )


def _on_many(comparisons: list[Comparison]) -> str:
    num = len(comparisons)
    if num < 2 or all(one.p is None for one in comparisons):
        return ""
    return (
        f"There are {num} comparisons with the baseline. If none of them differed at all, about "
        f"{0.05 * num:.2g} of the intervals would still exclude 0 by chance; so a difference is "
        "spoken of only where Holm's p, which takes all of them together, is at most 0.05. The "
        "other measures are not corrected: read their intervals one at a time."
    )


def _on_answers(results: SweepResults) -> str:
    if results.num_prompts is None:
        return "No answers were measured, so nothing is known of their length."
    return (
        f"Length and repetition are of greedy answers to the first {results.num_prompts} held-out "
        f"prompts, stopped at {results.max_tokens} tokens: where many are cut short, the length is "
        "an underestimate. Repetition is the share of an answer that had been said before in it. "
        "Judges like long answers, so a gain in quality that comes with length is worth less than "
        "it looks."
    )


def _on_drifted(results: SweepResults) -> Words:
    num = results.count("drifted")
    if not num:
        return ""
    lost = [one for one in results.contenders if any(c.state == "drifted" for c in one.cells)]
    return (
        f"{num} {_verb(num, 'run was', 'runs were')} stopped by the drift guard "
        f"(training.on_drift) and {_verb(num, 'counts', 'count')} in no mean. The means of ",
        *_listed(lost),
        " are of the runs that survived, and look better than those settings are.",
    )


def _on_dropped(results: SweepResults) -> str:
    num = results.count("dropped")
    if not num:
        return ""
    return (
        f"{num} {_verb(num, 'run was', 'runs were')} stopped early by successive halving and "
        f"{_verb(num, 'counts', 'count')} in no mean. What went on was chosen by a measure on the "
        "held-out pairs, which therefore looks a little too good."
    )


def num_heldout(results: SweepResults) -> int | None:
    """Held-out pairs, where all runs agree on it."""
    numbers = {cell.values.get("num_heldout", math.nan) for cell in results.finished}
    (number,) = numbers if len(numbers) == 1 else (math.nan,)
    return int(number) if math.isfinite(number) and number >= 1 else None
