"""A run's base model against what it was trained to, on the run's held-out pairs.

    comparison = compare(open_run("demo", Path("runs")))
    comparison.base["rewards/accuracies"], comparison.tuned["rewards/accuracies"]

The base is the same model with its adapter disabled. The order of the pairs and of all sums is
fixed, so that a second call gives the same numbers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gapo_lite.batching import pack, pad
from gapo_lite.config import RunConfig
from gapo_lite.evaluate import Collate, PairScores, score_heldout, summarize
from gapo_lite.loss import PairLoss
from gapo_lite.model import (
    load_adapter,
    load_base,
    load_tokenizer,
    pick_device,
    pick_precision,
    why_not_packed,
)
from gapo_lite.preparation import PreparedData, heldout_of
from gapo_lite.reference import with_reference
from gapo_lite.runs import Run

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EfGroup:
    """Held-out pairs that are about equally alike.

    Attributes:
        low, high: the smallest and the largest evaluation factor among them.
        num_pairs: how many they are.
        base_accuracy, tuned_accuracy: share whose chosen response has the higher reward.
    """

    low: float
    high: float
    num_pairs: int
    base_accuracy: float
    tuned_accuracy: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found.

    Attributes:
        run: name of the run.
        step: optimizer steps that the adapter has seen.
        objective, metric: keys of OBJECTIVES and EVALUATION_FACTORS.
        gamma: γ, None for an objective without a margin.
        target_margin: mean target margin of the held-out pairs, in the units of `logps_avg`.
        target_reward_margin: the same in reward units, to compare with `rewards/margins`.
        num_pairs: held-out pairs scored.
        base, tuned: means over the pairs, under the names of metrics.jsonl.
        by_ef: the pairs by deciles of their evaluation factor, the least alike first; empty for an
            objective without.
    """

    run: str
    step: int
    objective: str
    metric: str
    gamma: float | None
    target_margin: float
    target_reward_margin: float
    num_pairs: int
    base: dict[str, float]
    tuned: dict[str, float]
    by_ef: list[EfGroup]


def compare(
    run: Run, *, batch_size: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Comparison:
    """Scores the run's held-out pairs without and with its adapter, on the model of training.

    Args:
        run: a run that has saved an adapter.
        batch_size: pairs a forward pass; None takes `training.eval_batch_size`.
        progress: called with (forward passes' pairs done, twice the number of pairs).

    Raises:
        GapoError: nothing is saved or held out, or model, adapter or data cannot be used.
    """
    config, adapter = run.config(), run.trained_adapter()
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    heldout = heldout_of(config, tokenizer)
    _warn_of_changed_data(run, heldout)
    policy = load_policy(
        config,
        adapter,
        config.model.quantization,
        pick_precision(config.model.precision, pick_device()),
        pick_device(),
    )
    collate, pairs = _collate(config, policy), heldout.tokenized.pairs
    size, device = batch_size or config.training.eval_batch_size, pick_device()
    loss = PairLoss(config.objective)
    if loss.spec.uses_reference:
        pairs = with_reference(
            policy, pairs, collate, model=config.model, batch_size=size, device=device
        )

    def score(before: int) -> PairScores:
        loss.look_at(policy, pairs, collate, size, device, is_step=False)
        return score_heldout(
            policy,
            pairs,
            loss,
            collate,
            batch_size=size,
            device=device,
            forward=loss.logps,
            progress=progress and (lambda done, total: progress(before + done, 2 * total)),
        )

    with policy.disable_adapter():
        base = score(0)
    tuned = score(len(pairs))
    return _comparison(run, config, adapter, heldout, base, tuned)


def load_policy(
    config: RunConfig, adapter: Path, quantization: str, dtype: torch.dtype, device: torch.device
) -> PeftModel:
    """The base model of a configuration with a saved adapter on it, for inference.

    Raises:
        ModelError: the base cannot be loaded, or the adapter was made for another one.
        RunError: the adapter is damaged.
    """
    base = load_base(
        config.model.name,
        revision=config.model.revision,
        quantization=quantization,
        dtype=dtype,
        device=device,
    )
    return load_adapter(base, adapter)


def adapter_step(run: Run, adapter: Path) -> int:
    """Optimizer steps that an adapter of `run.trained_adapter()` has seen."""
    if adapter == run.adapter:
        status = run.read("status.json")  # the drift guard takes an earlier one
        return int(status.get("adapter_step", status.get("step", 0)))
    return int(json.loads((adapter / "manifest.json").read_text())["step"])


def _collate(config: RunConfig, policy: PeftModel) -> Collate:
    """The layout of training; in the padded one the mask hides what the rows are filled with."""
    if config.training.layout == "padded" or why_not_packed(policy):
        return partial(pad, pad_id=0)
    return pack


def _warn_of_changed_data(run: Run, heldout: PreparedData) -> None:
    known = run.read("margins.json")
    if not known:
        return
    then = (known["mean_gap"], known["heldout"]["num_pairs"])
    now = (heldout.margins.mean_gap, len(heldout.pairs))
    if then != now:
        logger.warning(
            "The data of %s have changed since it was trained (mean gap and held-out pairs were "
            "%s, now %s): pairs that it was trained on may be among the held-out ones. Restore the "
            "data for numbers that count.",
            run.name,
            then,
            now,
        )


def _comparison(
    run: Run,
    config: RunConfig,
    adapter: Path,
    heldout: PreparedData,
    base: PairScores,
    tuned: PairScores,
) -> Comparison:
    margin = float(base.margins.mean())
    return Comparison(
        run=run.name,
        step=adapter_step(run, adapter),
        objective=config.objective.name,
        metric=config.ef.metric,
        gamma=config.margin.gamma,
        target_margin=margin,
        target_reward_margin=margin * config.objective.reward_scale,
        num_pairs=len(base.losses),
        base=summarize(base),
        tuned=summarize(tuned),
        by_ef=group_by_ef(heldout.ef, _hits(base), _hits(tuned)),
    )


def group_by_ef(ef: np.ndarray, base_hits: np.ndarray, tuned_hits: np.ndarray) -> list[EfGroup]:
    """Accuracies by decile of the evaluation factor; equal factors stay together.

    Args:
        ef: (N,) evaluation factors; NaN where the objective has none.
        base_hits, tuned_hits: (N,) whether the chosen response has the higher reward.
    """
    if np.isnan(ef).any():
        return []
    decile = np.searchsorted(np.quantile(ef, np.arange(1, 10) / 10), ef, side="left")
    groups = [decile == number for number in np.unique(decile)]
    return [
        EfGroup(
            low=float(ef[group].min()),
            high=float(ef[group].max()),
            num_pairs=int(group.sum()),
            base_accuracy=float(base_hits[group].mean()),
            tuned_accuracy=float(tuned_hits[group].mean()),
        )
        for group in groups
    ]


def _hits(scores: PairScores) -> np.ndarray:
    return scores.chosen_rewards > scores.rejected_rewards
