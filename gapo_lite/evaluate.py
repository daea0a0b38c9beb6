"""How well a policy tells chosen from rejected on held-out pairs, before and after training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gapo_lite.errors import RunError
from gapo_lite.model import Policy, forward_logps
from gapo_lite.types import LossOutput, PairBatch, PairLogps, TokenizedPair

logger = logging.getLogger(__name__)

LossFn = Callable[[PairLogps, torch.Tensor], LossOutput]
Collate = Callable[[Sequence[TokenizedPair]], PairBatch]


@dataclass(frozen=True, slots=True)
class PairScores:
    """Scores of N pairs, each (N,) float64.

    Attributes:
        losses: the objective's loss.
        chosen_rewards, rejected_rewards: rewards as the objective defines them.
        chosen_logps, rejected_logps: averages per scored token.
        margins: target margins, in the units of `logps_avg`.
    """

    losses: np.ndarray
    chosen_rewards: np.ndarray
    rejected_rewards: np.ndarray
    chosen_logps: np.ndarray
    rejected_logps: np.ndarray
    margins: np.ndarray


def pair_scores(
    logps: PairLogps, output: LossOutput, margin: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The columns of PairScores for one batch, each (B,)."""
    return (
        output.losses.detach(),
        output.chosen_rewards,
        output.rejected_rewards,
        logps.chosen_avg.detach(),
        logps.rejected_avg.detach(),
        margin,
    )


@torch.no_grad()
def score_heldout(
    model: Policy,
    pairs: Sequence[TokenizedPair],
    loss_fn: LossFn,
    collate: Collate,
    *,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> PairScores:
    """Scores each pair without dropout and without gradients; the model's mode is restored
    afterwards.

    Args:
        model: the policy; disable its adapter around the call for the base model's scores.
        pairs: N pairs.
        loss_fn: (logps, margin) → losses and rewards.
        collate: makes a batch of some pairs.
        batch_size: pairs a forward pass.
        device: where the model is.
        progress: called with (pairs done, N).
    """
    training = model.training
    model.eval()
    columns: list[torch.Tensor] = []
    start = 0
    while start < len(pairs):
        batch = collate(pairs[start : start + batch_size]).to(device)
        try:
            logps = forward_logps(model, batch)
        except torch.OutOfMemoryError as error:
            if batch_size == 1:
                raise RunError(
                    f"out of memory while scoring one held-out pair of {batch.num_tokens} tokens: "
                    f"lower data.max_length. ({str(error)[:200]})"
                ) from None
            batch_size = math.ceil(batch_size / 2)
            logger.warning("Out of memory: scoring %d pair(s) at a time from here on.", batch_size)
            continue
        start += len(batch)
        columns.append(
            torch.stack(pair_scores(logps, loss_fn(logps, batch.margin), batch.margin)).cpu()
        )
        if progress:
            progress(start, len(pairs))
    model.train(training)
    values = torch.cat(columns, dim=1).double().numpy()
    return PairScores(*values)


def summarize(scores: PairScores) -> dict[str, float]:
    """Means over the pairs, under the names of metrics.jsonl; a tie is no hit."""
    return {
        "loss": float(scores.losses.mean()),
        "rewards/chosen": float(scores.chosen_rewards.mean()),
        "rewards/rejected": float(scores.rejected_rewards.mean()),
        "rewards/margins": float((scores.chosen_rewards - scores.rejected_rewards).mean()),
        "rewards/accuracies": float((scores.chosen_rewards > scores.rejected_rewards).mean()),
        "logps/chosen": float(scores.chosen_logps.mean()),
        "logps/rejected": float(scores.rejected_logps.mean()),
        "margin/mean": float(scores.margins.mean()),
    }
