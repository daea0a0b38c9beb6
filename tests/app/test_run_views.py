"""The comparison of base and tuned, as the page shows it."""

from __future__ import annotations

import pytest

from app.run_views import comparison

FOUND = {
    "run": "demo",
    "step": 33,
    "metric": "rougeL",
    "target_reward_margin": 2.976,
    "num_pairs": 65,
    "base": {
        "rewards/accuracies": 0.554, "rewards/margins": 0.25, "logps/chosen": -3.7,
        "logps/rejected": -3.8, "loss": 3.64,
    },
    "tuned": {
        "rewards/accuracies": 0.815, "rewards/margins": 3.62, "logps/chosen": -3.6,
        "logps/rejected": -3.9, "loss": 1.42,
    },
    "by_ef": [
        {"low": 0.0, "high": 0.2, "num_pairs": 33, "base_accuracy": 0.6, "tuned_accuracy": 0.9},
        {"low": 0.2, "high": 1.0, "num_pairs": 32, "base_accuracy": 0.5, "tuned_accuracy": 0.7},
    ],
}  # fmt: skip


def test_base_and_tuned_stand_side_by_side():
    html = comparison(FOUND)
    assert "<td>accuracy</td><td>55.4%</td><td>81.5%</td>" in html
    assert "65 held-out pairs, adapter of step 33; target reward margin 2.976." in html


@pytest.mark.parametrize("target", [0.0, None])
def test_a_run_without_a_target_margin_says_so(target):
    html = comparison({**FOUND, "target_reward_margin": target})
    assert "adapter of step 33; no target margin." in html


def test_accuracy_is_drawn_by_decile_of_the_evaluation_factor():
    html = comparison(FOUND)
    assert "0.00–0.20" in html
    assert "rougeL, by decile" in html


def test_an_objective_without_evaluation_factors_has_no_deciles():
    assert "<svg" not in comparison({**FOUND, "by_ef": []})
