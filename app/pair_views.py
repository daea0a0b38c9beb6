"""The Data tab's HTML: counts, figures of EF, gap and margin (the paper's Figure 2), one pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from app import views
from app.browser import BrowsedPair, diff_html
from app.curves import asks_for_margin
from app.gaps import GapView
from app.notices import as_html
from app.pairs import PairSet, overview, split_of
from gapo_lite import plots
from gapo_lite.config import RunConfig
from gapo_lite.ef import EVALUATION_FACTORS
from gapo_lite.errors import GapoError
from gapo_lite.lengths import cut

if TYPE_CHECKING:
    from app.services import Services


def facts(pair_set: PairSet) -> str:
    """What a set holds, and what of it cannot be used."""
    found = overview(pair_set)
    items = [
        ("pairs", f"{found.num_pairs:,}"),
        ("shape", found.shape_columns),
        ("columns", ", ".join(found.columns[:12]) + (" …" if len(found.columns) > 12 else "")),
        ("unusable rows", f"{found.num_problems:,}"),
        ("duplicates", f"{found.num_duplicates:,}"),
    ]
    if found.num_equal:
        items.append(("chosen = rejected", f"{found.num_equal:,}"))
    if found.num_rated:
        items.append(("with ratings", f"{found.num_rated:,}"))
    if found.num_with_strength:
        items.append(("with judged strength", f"{found.num_with_strength:,}"))
    return views.facts(items) + _problems(found)


def margins(view: GapView | None, config: RunConfig) -> str:
    """What the settings come to, in words."""
    if view is None:
        return views.warnings(
            [
                f"{config.ef.metric} has not been measured on these pairs yet: press Measure "
                "BERTScore. It is kept, so training will not measure it again."
            ]
        )
    margin = config.margin
    if margin.source is None:
        name = config.objective.name
        return views.subtle(f"{name} has no target margin: its loss compares the responses as is.")
    items = [
        ("average target margin", f"{view.mean_reward_margin:.4g} reward units"),
        ("γ", f"{margin.gamma:g}"),
    ]
    if view.gamma_beta_ratio is not None:
        items.append(("SimPO's γ/β for it", f"{view.gamma_beta_ratio:.4g}"))
    if margin.source == "constant":
        text = "Every pair has the same target margin: no evaluation factor has a part in it."
        if not asks_for_margin(config):
            text = f"No pair has a target margin: this is plain {config.objective.name}."
        return views.facts(items) + views.subtle(text)
    return (
        views.facts([*items, *_gap_facts(view, margin.source)])
        + views.warnings([view.warning] if view.warning else [])
        + views.subtle(f"Counted over the {len(view.split.training):,} training pairs.")
    )


def figures(view: GapView | None, config: RunConfig) -> str:
    """Distributions of EF, gap and target margin, as far as margins are made of them, and EF by
    all metrics."""
    if view is None:
        return ""
    used = view.split.training
    small = [
        plots.histogram(other, ef[used], range=(0.0, 1.0), small=True, note=_mean(ef[used]))
        for other in EVALUATION_FACTORS
        if (ef := view.known.get(other)) is not None
    ]
    large = "".join(_large_figures(view, config)) if asks_for_margin(config) else ""
    grid = f'<div class="chart-grid">{large}</div>' if large else ""
    return f'{grid}<div class="chart-grid small-charts">{"".join(small)}</div>'


def _large_figures(view: GapView, config: RunConfig) -> Iterator[str]:
    """From what margins are made of to the margins."""
    used, margin = view.split.training, config.margin
    is_constant, is_rating = margin.source == "constant", margin.source == "rating"
    if margin.source == "ef":
        yield plots.histogram(
            f"Evaluation factor: {config.ef.metric}",
            view.ef[used],
            range=(0.0, 1.0),
            marks=[(view.mean_ef, "mean"), (margin.ef_floor or 0.0, "floor")],
            x_label="EF: 1 is the same text",
        )
    if not is_constant:
        yield plots.histogram(
            "Gap: ratings" if is_rating else f"Gap: {margin.mapping}",
            view.gap[used],
            marks=[(view.mean_gap, "mean")],
            x_label="chosen minus rejected rating" if is_rating else "gap",
            tone="chosen",
        )
    yield plots.histogram(
        "Target margin",
        view.reward_margin[used],
        marks=[(view.mean_reward_margin, "γ, for all" if is_constant else "mean")],
        x_label="reward units",
        tone="heldout",
    )


def _gap_facts(view: GapView, source: str) -> list[tuple[str, str]]:
    """What the gaps are made of, and what stands out among them."""
    if source == "rating":
        return [
            ("mean gap of ratings", f"{view.mean_gap:.4g}"),
            ("without ratings, at the mean", f"{view.num_unrated:,}"),
            ("negative margins", f"{view.num_negative:,}"),
        ]
    return [
        ("mean EF", f"{view.mean_ef:.3f}"),
        ("mean gap", f"{view.mean_gap:.3f}"),
        ("EF = 0", f"{view.num_zero:,}"),
        ("EF = 1", f"{view.num_equal:,}"),
        ("raised to the floor", f"{view.num_floored:,}"),
        ("negative margins", f"{view.num_negative:,}"),
    ]


def lengths(services: Services, config: RunConfig) -> str:
    """How long the pairs are in the model's tokens, and what the limits cut."""
    try:
        counted = services.data.lengths(config)
    except GapoError as error:  # a model that is not usable here: the form says so, too
        return views.subtle(str(error))
    if counted is None:
        return views.subtle("Tokens are not counted yet: press Count tokens.")
    data = config.data
    counted = counted[split_of(services.data.pair_set(config), config).training]
    whole = counted[:, 0] + np.maximum(counted[:, 1], counted[:, 2])
    cuts = cut(counted, data.max_length, data.max_prompt_length)
    lost = views.facts(
        [
            ("prompts shortened", f"{cuts.num_prompts_truncated:,}"),
            ("responses cut", f"{cuts.num_responses_truncated:,}"),
            ("pairs dropped", f"{cuts.num_dropped:,}"),
            ("at max_length", f"{data.max_length:,} tokens"),
        ]
    )
    drawn = [
        plots.histogram(
            "Prompt and longer response", whole, x_label="tokens",
            marks=[(data.max_length, "max_length")] if data.max_length <= 1.6 * whole.max() else [],
        ),
        plots.histogram("Chosen", counted[:, 1], x_label="tokens", tone="chosen"),
        plots.histogram("Rejected", counted[:, 2], x_label="tokens", tone="rejected"),
    ]  # fmt: skip
    return (
        f'<h3 class="section">Lengths in tokens of the model</h3>{lost}'
        f'<div class="chart-grid">{"".join(drawn)}</div>'
    )


def pair(found: BrowsedPair | None, query: str) -> str:
    """One pair, differing words marked."""
    if found is None:
        return views.subtle(f"No pair holds “{query.strip()}”.")
    turns = "".join(
        f'<span class="role">{as_html(turn["role"])}</span><div dir="auto">'
        f"{views.verbatim(turn['content'])}</div>"
        for turn in found.prompt
    )
    chosen, rejected = diff_html(found.chosen, found.rejected)
    return (
        f"{views.facts(_pair_facts(found))}"
        f'<div class="pair-prompt">{turns}</div><div class="pair-sides">'
        f"{_side('chosen', chosen, found.chosen_rating)}"
        f"{_side('rejected', rejected, found.rejected_rating)}</div>"
    )


def _pair_facts(found: BrowsedPair) -> list[tuple[str, str]]:
    items = [("pair", f"{found.index + 1:,} of {found.count:,}"), ("row", f"{found.line:,}")]
    items += [(name, f"{ef:.3f}") for name, ef in found.efs.items()]
    if found.reward_margin is not None:
        items.append(("target margin", f"{found.reward_margin:.3f} reward units"))
    if found.strength is not None:
        items.append(("judged strength", f"{found.strength:g}"))
    return [*items, ("", found.part)] if found.part else items


def _side(name: str, body: str, rating: float | None) -> str:
    rated = "" if rating is None else f" · rated {rating:g}"
    return (
        f'<div class="pair-side {name}"><h4>{name}{rated}</h4>'
        f'<div class="body" dir="auto">{body}</div></div>'
    )


def _problems(found: Any) -> str:
    if not found.num_problems:
        return ""
    rows = [(str(p.line), p.field or "–", p.reason) for p in found.problems]
    more = found.num_problems - len(rows)
    rest = views.subtle(f"… and {more:,} more.") if more else ""
    return (
        f'<details class="problems"><summary>{found.num_problems:,} rows cannot be used; the '
        f"others are.</summary>{views.table(('row', 'field', 'reason'), rows)}{rest}</details>"
    )


def _mean(ef: np.ndarray) -> str:
    return f"mean {np.nanmean(ef):.3f}" if np.isfinite(ef).any() else "not measured"
