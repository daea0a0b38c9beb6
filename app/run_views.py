"""The Runs tab's HTML: a run's base model against what it was trained to, on held-out pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from app import views
from gapo_lite import plots
from gapo_lite.plots import BarSeries

_ROWS = (
    ("rewards/accuracies", "accuracy", "{:.1%}"),
    ("rewards/margins", "reward margin", "{:.3f}"),
    ("logps/chosen", "chosen, log-probability per token", "{:.3f}"),
    ("logps/rejected", "rejected, log-probability per token", "{:.3f}"),
    ("loss", "loss", "{:.3f}"),
)


def comparison(found: dict[str, Any]) -> str:
    """What `gapo-lite evaluate --json` wrote: means, and accuracy by decile of the evaluation
    factor."""
    rows = [
        (name, form.format(found["base"][key]), form.format(found["tuned"][key]))
        for key, name, form in _ROWS
    ]
    about = f"{found['num_pairs']:,} held-out pairs, adapter of step {found['step']}"
    target = found["target_reward_margin"]
    about += f"; target reward margin {target:.3f}." if target else "; no target margin."
    table = views.table(("held-out pairs", "base model", "tuned"), rows)
    return f'{table}{views.subtle(about)}<div class="chart-grid">{_by_ef(found)}</div>'


def _by_ef(found: dict[str, Any]) -> str:
    groups = found["by_ef"]
    if not groups:
        return ""
    return plots.bars(
        "Accuracy by how alike the responses are",
        [f"{group['low']:.2f}–{group['high']:.2f}" for group in groups],
        [
            BarSeries(side, np.array([group[f"{side}_accuracy"] for group in groups]), tone)
            for side, tone in (("base", "heldout"), ("tuned", "train"))
        ],
        x_label=f"{found['metric']}, by decile",
        explanation="Pairs that differ little are hard, and GaPO asks less of them.",
        unit="share of pairs",
    )
