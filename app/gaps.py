"""From evaluation factors to gaps and target margins, for all pairs of a set and any settings.

The margins are those that a run of the same configuration will train with, since the same functions
make them of the same pairs; only pairs without room for a scored token, which tokenising drops, are
still among them.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

import numpy as np

from app.measures import scores
from app.pairs import Floats, PairSet, Split, split_key, split_of, texts_of
from gapo_lite.config import RunConfig
from gapo_lite.ef import EVALUATION_FACTORS, count_unseen
from gapo_lite.margins import constant_margins, estimate_margins

CONSTANT_MARGINS = ("simpo",)
"""Objectives without evaluation factors; told here because the table of objectives imports torch,
and held true by a test."""


@dataclass(frozen=True, slots=True, eq=False)
class GapView:
    """From evaluation factors to target margins, by the configuration's metric.

    Attributes:
        split: which pairs are trained on; all counts and means are over these.
        ef: (N,) before the floor; NaN where it is not known.
        gap: (N,) NaN where EF is, and for an objective with constant margins.
        margin: (N,) target margins in the units of `logps_avg`.
        reward_margin: (N,) the same in reward units: times β, or times 1 (`margin_scale`).
        known: every metric's (N,) that is known by now, the configuration's included.
        mean_ef: NaN where it is not known.
        mean_gap: what margins are normalised by.
        mean_reward_margin: γ in reward units under `scale` and `shift`.
        gamma_beta_ratio: SimPO's γ/β of a run whose constant margin is that mean.
        num_zero, num_equal: pairs with EF = 0 and EF = 1.
        num_floored: pairs whose EF was raised to the floor.
        num_negative: pairs with a margin below 0.
        warning: what to say of pairs with a text in which the metric sees no word, "" for nothing.
    """

    split: Split
    ef: Floats
    gap: Floats
    margin: Floats
    reward_margin: Floats
    known: dict[str, Floats]
    mean_ef: float
    mean_gap: float
    mean_reward_margin: float
    gamma_beta_ratio: float
    num_zero: int
    num_equal: int
    num_floored: int
    num_negative: int
    warning: str


def gaps(pair_set: PairSet, config: RunConfig) -> GapView | None:
    """What a run of `config` makes of the pairs.

    Args:
        pair_set: N pairs.
        config: its sections data (the split), ef, margin and objective count.

    Returns:
        None if the scores have to be measured first; never for an objective with constant margins.

    Raises:
        DataError: the set can't be split so, or `scale` is asked for where every gap is 0.
    """
    metric = config.ef.metric
    found = {name: scores(pair_set, name, config) for name in EVALUATION_FACTORS}
    known = {name: values for name, values in found.items() if values is not None}
    is_constant = config.objective.name in CONSTANT_MARGINS
    if metric not in known and not is_constant:
        return None
    used = split_of(pair_set, config)
    ef = known.get(metric, np.full(len(pair_set), np.nan))
    gap, margin = np.full((2, len(pair_set)), np.nan)
    if is_constant:
        margins = constant_margins(len(used.training), config.margin.gamma)
        margin[:] = config.margin.gamma
    else:
        settings = config.margin.model_dump()
        margins = estimate_margins(ef[used.training], **settings)
        is_known = ~np.isnan(ef)
        every = estimate_margins(ef[is_known], **settings, mean_gap=margins.mean_gap)
        gap[is_known], margin[is_known] = every.gaps, every.values
    scale = config.objective.reward_scale
    mean_margin = float(margins.values.mean())
    return GapView(
        split=used,
        ef=ef,
        gap=gap,
        margin=margin,
        reward_margin=margin * scale,
        known=known,
        mean_ef=float(ef[used.training].mean()),
        mean_gap=margins.mean_gap,
        mean_reward_margin=mean_margin * scale,
        gamma_beta_ratio=mean_margin * scale / config.objective.beta,
        num_zero=int((ef[used.training] == 0.0).sum()),
        num_equal=int((ef[used.training] == 1.0).sum()),
        num_floored=margins.num_floored,
        num_negative=margins.num_negative,
        warning=_unseen_warning(metric, _num_unseen(pair_set, config), len(used.training)),
    )


def to_csv(pair_set: PairSet, view: GapView) -> str:
    """A line for each pair: its row, which part it belongs to, every known EF, gap and margins;
    empty for what is not known, or is none."""
    parts = dict.fromkeys(range(len(pair_set)), "")
    for name, part in view.split.parts().items():
        parts |= dict.fromkeys(part.tolist(), name)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["row", "part", *view.known, "gap", "margin", "reward_margin"])
    columns = (*view.known.values(), view.gap, view.margin, view.reward_margin)
    for index, numbers in enumerate(zip(*columns, strict=True)):
        cells = ["" if np.isnan(number) else repr(float(number)) for number in numbers]
        writer.writerow([pair_set.pairs[index].line, parts[index], *cells])
    return text.getvalue()


def _num_unseen(pair_set: PairSet, config: RunConfig) -> int:
    if EVALUATION_FACTORS[config.ef.metric].family != "lexical":
        return 0
    return pair_set.kept.get(
        ("unseen", split_key(config)),
        lambda: count_unseen(*texts_of(pair_set, split_of(pair_set, config).training)),
    )


def _unseen_warning(metric: str, num_unseen: int, num_pairs: int) -> str:
    if not num_unseen:
        return ""
    return (
        f"{metric} sees no word at all in a text of {num_unseen:,} of {num_pairs:,} training "
        "pairs, since ROUGE's tokenizer knows a–z and 0–9 only: their margin says nothing. For "
        "other scripts choose bertscore_f1 with a multilingual encoder."
    )
