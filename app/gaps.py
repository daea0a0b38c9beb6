"""From evaluation factors or ratings to gaps and target margins, for all pairs of a set and any
settings.

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
from gapo_lite.ef import EVALUATION_FACTORS, find_unseen
from gapo_lite.margins import Margins, constant_margins, estimate_margins, rating_margins
from gapo_lite.objectives import OBJECTIVES


@dataclass(frozen=True, slots=True, eq=False)
class GapView:
    """From evaluation factors or ratings to target margins.

    Attributes:
        split: which pairs are trained on; all counts and means are over these.
        ef: (N,) by the configuration's metric, before the floor; NaN where it is not known.
        gap: (N,) NaN where EF or ratings are not known, and where the margin is not made of a gap.
        margin: (N,) target margins in the units of `logps_avg`; NaN for an objective without.
        reward_margin: (N,) the same in reward units: times β, or times 1 (`margin_scale`).
        known: every metric's (N,) that is known by now, the configuration's included.
        mean_ef: NaN where it is not known.
        mean_gap: what margins are normalised by.
        mean_reward_margin: γ in reward units under `scale` and `shift`; NaN without margins.
        gamma_beta_ratio: SimPO's γ/β of a run whose constant margin is that mean; None where
            rewards are not SimPO's averages per token.
        num_zero, num_equal: pairs with EF = 0 and EF = 1.
        num_unrated: pairs without ratings of both responses.
        num_floored: pairs whose EF was raised to the floor.
        num_negative: pairs with a margin below 0.
        warning: what to say of texts and letters that the metric does not see, "" for nothing.
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
    gamma_beta_ratio: float | None
    num_zero: int
    num_equal: int
    num_unrated: int
    num_floored: int
    num_negative: int
    warning: str


def gaps(pair_set: PairSet, config: RunConfig) -> GapView | None:
    """What a run of `config` makes of the pairs.

    Args:
        pair_set: N pairs.
        config: its sections data (the split), ef, margin and objective count.

    Returns:
        None if the scores have to be measured first, where margins are made of them.

    Raises:
        DataError: the set can't be split so, no pair has the ratings that are asked for, or
            `scale` is asked for where every gap is 0.
    """
    metric = config.ef.metric
    found = {name: scores(pair_set, name, config) for name in EVALUATION_FACTORS}
    known = {name: values for name, values in found.items() if values is not None}
    source = config.margin.source
    if metric not in known and source == "ef":
        return None
    used = split_of(pair_set, config)
    ef = known.get(metric, np.full(len(pair_set), np.nan))
    rated = _rating_gaps(pair_set)
    gap, margin, margins = _margins(config, ef if source == "ef" else rated, used)
    scale = config.objective.reward_scale
    mean = float(margin[used.training].mean()) * scale
    beta, is_averaged = config.objective.beta, OBJECTIVES[config.objective.name].length_normalized
    own_ef = ef[used.training]
    return GapView(
        split=used,
        ef=ef,
        gap=gap,
        margin=margin,
        reward_margin=margin * scale,
        known=known,
        mean_ef=float(own_ef.mean()),
        mean_gap=margins.mean_gap,
        mean_reward_margin=mean,
        gamma_beta_ratio=mean / beta if source and beta and is_averaged else None,
        num_zero=int((own_ef == 0.0).sum()),
        num_equal=int((own_ef == 1.0).sum()),
        num_unrated=int(np.isnan(rated[used.training]).sum()),
        num_floored=margins.num_floored,
        num_negative=margins.num_negative,
        warning=_unseen_warning(pair_set, config) if source == "ef" else "",
    )


def _margins(config: RunConfig, known: Floats, used: Split) -> tuple[Floats, Floats, Margins]:
    """Gap and margin of each pair, and what is known of the training pairs' (preparation.prepare).

    Args:
        config: its section margin counts.
        known: (N,) evaluation factors or differences of ratings, as margin.source asks.
        used: which pairs are trained on.
    """
    settings, count = config.margin, len(known)
    nothing = np.full(count, np.nan)
    if settings.source is None:
        return nothing, nothing, constant_margins(len(used.training), 0.0)
    if settings.source == "constant":
        every = constant_margins(count, settings.gamma or 0.0)
        return nothing, every.values, constant_margins(len(used.training), settings.gamma or 0.0)
    if settings.source == "rating":
        how = settings.model_dump(include={"normalization", "gamma"})
        margins = rating_margins(known[used.training], **how)
        every = rating_margins(known, **how, mean_gap=margins.mean_gap)
        return known, every.values, margins
    how = settings.model_dump(exclude={"source"})
    margins = estimate_margins(known[used.training], **how)
    is_known = ~np.isnan(known)
    some = estimate_margins(known[is_known], **how, mean_gap=margins.mean_gap)
    gap, margin = nothing.copy(), nothing.copy()
    gap[is_known], margin[is_known] = some.gaps, some.values
    return gap, margin, margins


def _rating_gaps(pair_set: PairSet) -> Floats:
    """(N,) how much better the data say the chosen response is; NaN where they say nothing."""
    return pair_set.kept.get(
        "rating gaps", lambda: np.array([pair.rating_gap for pair in pair_set.pairs])
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


def _unseen_warning(pair_set: PairSet, config: RunConfig) -> str:
    metric, tokenizer = config.ef.metric, config.ef.tokenizer
    if EVALUATION_FACTORS[metric].family != "lexical":
        return ""
    unseen = pair_set.kept.get(
        ("unseen", tokenizer, split_key(config)),
        lambda: find_unseen(*texts_of(pair_set, split_of(pair_set, config).training), tokenizer),
    )
    remedy = "ef.tokenizer: unicode, or bertscore_f1 with a multilingual encoder"
    return unseen.warning(metric, remedy, "training pairs")
