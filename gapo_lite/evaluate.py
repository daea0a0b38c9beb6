"""How well a policy tells chosen from rejected on held-out pairs, before and after training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from gapo_lite.errors import RunError
from gapo_lite.memory import is_out_of_memory
from gapo_lite.model import Policy, forward_logps
from gapo_lite.types import LossOutput, PairBatch, PairLogps, TokenizedPair

logger = logging.getLogger(__name__)

LossFn = Callable[[PairLogps, torch.Tensor], LossOutput]
Forward = Callable[[Policy, PairBatch], PairLogps]
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

    def columns(self) -> dict[str, list[float]]:
        """As plain data, for a file."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}


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


def score_heldout(
    model: Policy,
    pairs: Sequence[TokenizedPair],
    loss_fn: LossFn,
    collate: Collate,
    *,
    batch_size: int,
    device: torch.device,
    forward: Forward = forward_logps,
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
        forward: (model, batch) → logps.
        progress: called with (pairs done, N).

    Raises:
        RunError: out of memory with one pair.
    """
    columns: list[torch.Tensor] = []
    done = 0
    for batch, logps in forward_pairs(model, pairs, forward, collate, batch_size, device):
        output = loss_fn(logps, batch.margin)
        columns.append(torch.stack(pair_scores(logps, output, batch.margin)).cpu())
        done += len(batch)
        if progress:
            progress(done, len(pairs))
    values = torch.cat(columns, dim=1).double().numpy()
    return PairScores(*values)


@torch.no_grad()
def forward_pairs(
    model: Policy,
    pairs: Sequence[TokenizedPair],
    forward: Forward,
    collate: Collate,
    batch_size: int,
    device: torch.device,
) -> Iterator[tuple[PairBatch, PairLogps]]:
    """Batches of all pairs in order with their log-probabilities, without dropout and gradients; in
    smaller batches where memory runs out.

    Raises:
        RunError: out of memory with one pair.
    """
    training = model.training
    model.eval()
    try:
        start = 0
        while start < len(pairs):
            batch = collate(pairs[start : start + batch_size]).to(device)
            try:
                logps = forward(model, batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                batch_size = _smaller(batch_size, batch, error)
                continue
            start += len(batch)
            yield batch, logps
    finally:
        model.train(training)


def _smaller(batch_size: int, batch: PairBatch, error: RuntimeError) -> int:
    if batch_size == 1:
        raise RunError(
            f"out of memory while scoring one pair of {batch.num_tokens} tokens: lower "
            f"data.max_length. ({str(error)[:200]})"
        ) from None
    batch_size = math.ceil(batch_size / 2)
    logger.warning("Out of memory: scoring %d pair(s) at a time from here on.", batch_size)
    return batch_size


def summarize(scores: PairScores) -> dict[str, float]:
    """Means over the pairs, under the names of metrics.jsonl; a tie is no hit.

    `rewards/accuracies` is by the objective's own reward, `logps/accuracies` by the average
    log-probability, which is the same measure for all objectives.
    """
    return {
        "loss": float(scores.losses.mean()),
        "rewards/chosen": float(scores.chosen_rewards.mean()),
        "rewards/rejected": float(scores.rejected_rewards.mean()),
        "rewards/margins": float((scores.chosen_rewards - scores.rejected_rewards).mean()),
        "rewards/accuracies": float((scores.chosen_rewards > scores.rejected_rewards).mean()),
        "logps/chosen": float(scores.chosen_logps.mean()),
        "logps/rejected": float(scores.rejected_logps.mean()),
        "logps/accuracies": float((scores.chosen_logps > scores.rejected_logps).mean()),
        "margin/mean": float(scores.margins.mean()),
    }
