"""The objectives: pure functions from log-probabilities and target margins to losses.

All share one loss line, `-log σ(Δr − margin_in_reward_units)`; they differ in how they make
rewards and margins (METHOD.md, section 3). Symbols: a = `logps_avg`, w/l = chosen/rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from gapo_lite.errors import ConfigError
from gapo_lite.types import LossOutput, PairLogps

MarginScale = Literal["beta", "one"]


def gapo_loss(
    chosen_logps_avg: torch.Tensor,
    rejected_logps_avg: torch.Tensor,
    margin: torch.Tensor,
    *,
    beta: float = 10.0,
    margin_scale: MarginScale = "beta",
) -> LossOutput:
    """Gap-Aware Preference Optimization on SimPO's length-normalised reward.

    Paper: *Gap-Aware Preference Optimization*, eqs. 5 and 9; with a constant margin it is SimPO
        (arXiv 2405.14734).
    Formula: −log σ(β·a_w − β·a_l − s·margin), with s = β for `margin_scale="beta"` (eq. 5: γ = 0.3
        and β = 10 are an
    average target margin of 3 reward units, as in SimPO's recipe) and s = 1 for `"one"` (eq. 9 to
    the letter).
    Usual ranges: β 2 to 10; γ (the mean margin) 0.1 to 0.5.

    Args:
        chosen_logps_avg: (B,) average log-probability per scored token of the chosen responses.
        rejected_logps_avg: (B,) the same of the rejected responses.
        margin: (B,) target margins in the units of `logps_avg`; it carries no gradient.
        beta: β, the reward's scale.
        margin_scale: which equation, see above.

    Raises:
        ConfigError: an unknown `margin_scale`.
    """
    if margin_scale not in ("beta", "one"):
        raise ConfigError(
            f"unknown margin_scale {margin_scale!r}: choose `beta` (eq. 5) or `one` (eq. 9)."
        )
    chosen_rewards = beta * chosen_logps_avg
    rejected_rewards = beta * rejected_logps_avg
    target = margin.detach() * (beta if margin_scale == "beta" else 1.0)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards - target)  # eq. 5
    return LossOutput(losses, chosen_rewards.detach(), rejected_rewards.detach())


def _on_average_logps(
    logps: PairLogps, margin: torch.Tensor, *, beta: float, margin_scale: MarginScale
) -> LossOutput:
    return gapo_loss(
        logps.chosen_avg, logps.rejected_avg, margin, beta=beta, margin_scale=margin_scale
    )


@dataclass(frozen=True, slots=True)
class ObjectiveSpec:
    """One objective.

    Attributes:
        fn: (logps: PairLogps, margin (B,), beta=…, margin_scale=…) → LossOutput.
        uses_reference: whether it compares with the model without its adapter.
        length_normalized: whether its reward is an average per token.
        takes_margin: "ef" for the pair's own margin, "constant" for γ.
    """

    fn: Callable[..., LossOutput]
    uses_reference: bool
    length_normalized: bool
    takes_margin: Literal["ef", "constant"]


OBJECTIVES = {
    "gapo": ObjectiveSpec(_on_average_logps, False, True, "ef"),
    "simpo": ObjectiveSpec(_on_average_logps, False, True, "constant"),
}
"""Name → objective. SimPO is GaPO with γ for every pair: they share the function, not only the
idea."""
