"""What the rules of `verdict` look at: a run's numbers and answers, each found once.

Pure, as `verdict` is; what a fact means, and which ones matter, is said there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from app import curves
from app.curves import Drift, Ends, logged
from app.history import History
from gapo_lite.runs import ACTIVE_STATES

Samples = Sequence[Mapping[str, Any]]

EARLY_STEPS = 10
"""AdamW's averages span some 10 steps; before that a model has hardly moved."""


@dataclass(frozen=True, eq=False)
class Facts:
    """What `judge` was given, and what follows from it.

    Attributes:
        history, samples, beta, is_averaged, target_reward_margin, state, max_grad_norm, message:
            see `judge`.
    """

    history: History
    samples: Samples
    beta: float | None
    is_averaged: bool
    target_reward_margin: float | None
    state: str
    max_grad_norm: float
    message: str

    @property
    def is_active(self) -> bool:
        """Whether a process works on the run."""
        return self.state in ACTIVE_STATES

    @cached_property
    def step(self) -> int:
        """The newest that was logged."""
        training, evaluation = self.history.training["step"], self.history.evaluation["step"]
        return int(max([0.0, *training[-1:], *evaluation[-1:]]))

    @cached_property
    def accuracy(self) -> Ends | None:
        """At the beginning and now; None while that cannot be said. A model that is its own
        reference ranks no pair: that is guessing, not being wrong about all."""
        found, margin = curves.ends(self.history, "rewards/accuracies"), self.margin
        if found and margin and found.first == margin.first == 0.0:
            return replace(found, first=0.5)
        return found

    @cached_property
    def margin(self) -> Ends | None:
        """The reward margin, as `accuracy`."""
        return curves.ends(self.history, "rewards/margins")

    @cached_property
    def chosen(self) -> Ends | None:
        """The average log-probability of chosen answers, as `accuracy`."""
        return curves.ends(self.history, "logps/chosen")

    @cached_property
    def drift(self) -> Drift | None:
        """How the log-probabilities have moved."""
        return curves.drift(self.history)

    @cached_property
    def train_accuracy(self) -> float:
        """Mean of the newest training rows."""
        accuracies = logged(self.history.training, "rewards/accuracies")
        return _mean(accuracies[-max(1, min(20, len(accuracies) // 4)) :])

    @cached_property
    def norms(self) -> np.ndarray:
        """The gradient norms of the training rows."""
        return logged(self.history.training, "grad_norm")

    @cached_property
    def rates(self) -> np.ndarray:
        """The learning rates of the training rows."""
        return logged(self.history.training, "learning_rate")

    @property
    def pairs(self) -> str:
        """Which pairs accuracy and margin are of."""
        return "held-out" if self.accuracy and self.accuracy.heldout else "training"

    @cached_property
    def target(self) -> float | None:
        """Target reward margin of the pairs that `margin` is of. Held-out pairs have margins of
        their own, and so another average than the training pairs."""
        target = self.target_reward_margin
        if target is None or not self.margin or not self.margin.heldout:
            return target
        own = _mean(logged(self.history.training, "margin/mean"))
        held = self.history.evaluation.get("margin/mean", np.zeros(0))[-1:]
        if not own > 0 or not np.isfinite(held).any():
            return target
        return target * float(held[0]) / own

    @cached_property
    def base(self) -> dict[str, str]:
        """Prompt → answer before training."""
        return self._answers.get(0, {})

    @cached_property
    def tuned(self) -> dict[str, str]:
        """Prompt → answer at the newest evaluation after step 0."""
        newest = max(self._answers, default=0)
        return self._answers[newest] if newest > 0 else {}

    @cached_property
    def _answers(self) -> dict[int, dict[str, str]]:
        by_step: dict[int, dict[str, str]] = {}
        for row in self.samples:
            match row:
                case {"step": int(step), "prompt": str(prompt), "answer": str(answer)}:
                    by_step.setdefault(step, {})[prompt] = answer
        return by_step

    @property
    def is_early(self) -> bool:
        """Too few steps or rows for most rules."""
        return self.step < EARLY_STEPS or self.accuracy is None or self.margin is None

    @cached_property
    def is_warming(self) -> bool:
        """The learning rate still rises."""
        rates = self.rates
        return len(rates) > 1 and bool(rates[-1] == rates.max() > rates[-2])

    @cached_property
    def steps_since_peak(self) -> int:
        """From the learning rate's peak to when accuracy and margin were measured."""
        rates = self.history.training.get("learning_rate", np.zeros(0))
        if not np.isfinite(rates).any():
            return 0
        held, steps = self.history.evaluation["step"], self.history.training["step"]
        measured = held[-1] if len(held) > 1 else steps[-1]
        return int(measured - steps[np.nanargmax(rates)])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
