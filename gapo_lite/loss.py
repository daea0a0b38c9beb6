"""An objective at work: the forward pass that it needs, what it must know of a step, its loss.

    loss = PairLoss(config.objective)
    loss.look_at(policy, pairs_of_the_step, collate, 2, device)     # for most objectives nothing
    output = loss(loss.logps(policy, batch), batch.margin)

Nothing of what is computed here for a whole step depends on how it is cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import distributed

from gapo_lite.config import ObjectiveConfig
from gapo_lite.errors import DataError
from gapo_lite.evaluate import Collate, forward_pairs
from gapo_lite.model import Policy, forward_logps
from gapo_lite.objectives import OBJECTIVES, loss_function
from gapo_lite.reference import disabled_adapter
from gapo_lite.types import LossOutput, PairBatch, PairLogps, TokenizedPair


class PairLoss:
    """The loss of an objective with its hyper-parameters.

    Args:
        config: the objective.

    Attributes:
        running_gap: M₀ of β-DPO, the running mean over steps of the reward margin.
    """

    def __init__(self, config: ObjectiveConfig):
        self.spec = OBJECTIVES[config.name]
        self.running_gap = 0.0
        self._config = config
        self._fn: Callable[..., LossOutput] = loss_function(config.name, config.model_dump())
        self._known: dict[str, torch.Tensor] = {}

    def __call__(self, logps: PairLogps, margin: torch.Tensor) -> LossOutput:
        """Losses and rewards of B pairs; margin is (B,)."""
        return self._fn(logps, margin, **self._known)

    def logps(self, policy: Policy, batch: PairBatch) -> PairLogps:
        """What the loss is made of. The reference's part is computed where the batch has none."""
        if self.spec.uses_reference and batch.reference is None:
            with torch.no_grad(), disabled_adapter(policy):
                sums = forward_logps(policy, batch)
            batch = replace(batch, reference=torch.cat((sums.chosen, sums.rejected)))
        return forward_logps(policy, batch, certainty=self.spec.uses_certainty)

    def untrained_logps(self, policy: Policy, batch: PairBatch) -> PairLogps:
        """The same as `logps` of a policy whose adapter has learned nothing: what the batch says of
        the reference, without a forward pass."""
        if batch.reference is None or self.spec.uses_certainty:
            return self.logps(policy, batch)
        chosen, rejected = batch.reference.chunk(2)
        lengths = batch.lengths.chunk(2)
        return PairLogps(chosen, rejected, lengths[0], lengths[1], chosen, rejected)

    def look_at(
        self,
        policy: Policy,
        pairs: Sequence[TokenizedPair],
        collate: Collate,
        batch_size: int,
        device: torch.device,
        *,
        is_step: bool = True,
    ) -> None:
        """Computes what the objective wants to know of all pairs together, without gradient.

        Args:
            policy: as it is now.
            pairs: of an optimizer step (of this process; the others' are counted too), or the
                held-out ones.
            collate: makes a batch of some pairs.
            batch_size: pairs a forward pass.
            device: where the policy is.
            is_step: whether the pairs are a step's, which count for running means.

        Raises:
            DataError: the pairs lack the mismatched responses that a divergence is estimated on.
        """
        if not self.spec.statistic:
            return
        if self.spec.statistic == "kl":
            pairs = [_mismatched(pair) for pair in pairs]
        elif not is_step:  # held-out pairs are judged with β as it is set
            self._known = {"surplus": torch.zeros((), device=device)}
            return
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for _, logps in forward_pairs(policy, pairs, self.logps, collate, batch_size, device):
            chosen, rejected = logps.chosen_ratio.double(), logps.rejected_ratio.double()
            sums += torch.stack((chosen.sum(), rejected.sum(), sums.new_tensor(len(chosen))))
        if is_step and distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        chosen_mean, rejected_mean = (sums[:2] / sums[2]).float()
        if self.spec.statistic == "kl":
            self._known = {"kl": (chosen_mean + rejected_mean) / 2}
            return
        assert self._config.beta is not None
        assert self._config.gap_momentum is not None
        gap = self._config.beta * (chosen_mean - rejected_mean)
        self._known = {"surplus": gap - self.running_gap}
        momentum = self._config.gap_momentum
        self.running_gap = momentum * self.running_gap + (1 - momentum) * float(gap)


def _mismatched(pair: TokenizedPair) -> TokenizedPair:
    if pair.mismatched is None:
        raise DataError(
            "this objective estimates a divergence on other pairs' responses, which these pairs "
            "have not been given: preparation.prepare() does it where the configuration says kto."
        )
    return pair.mismatched
