"""Hidden states → log-probabilities of the scored tokens, without ever holding the full logits.

Only the rows that predict a scored token reach the vocabulary projection, tile by tile. Since d
logp_t / d h depends on nothing downstream, each tile's gradient row W[t] − softmax(h Wᵀ) W is made
in the forward pass while the tile's logits are there, and the backward pass only scales it: two
matrix products a tile instead of the three of recomputation, and memory for one tile of logits.

Naive equivalent (what the tests compare with):

    logits = hidden[predict_index].float() @ weight.float().T
    logps = logits.log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gapo_lite.types import PairBatch, PairLogps

TILE_ROWS = 256
"""Rows a tile. With its logits in half precision and float32 a tile takes rows × vocabulary × 6
bytes at its peak (Llama-3: 0.18 GiB). 256 rows are 256 operations for each byte of the head that
is read: about where GPUs become limited by arithmetic and not by memory (L4 200, 4090 160, H100
295). The head is 4 % of a step."""


def pair_logps(
    hidden: torch.Tensor, weight: torch.Tensor, batch: PairBatch, *, certainty: bool = False
) -> PairLogps:
    """Sums of the scored tokens' log-probabilities, response by response.

    Args:
        hidden: the last hidden states, after the final norm, in the batch's layout: (1, T, H) or
            (2B, L, H).
        weight: (V, H) the output head, frozen.
        batch: which rows predict which tokens of which response.
        certainty: whether `PairLogps.chosen_certainty` is wanted.
    """
    rows = hidden.flatten(0, 1).index_select(0, batch.predict_index)
    squares = torch.empty(len(rows), device=rows.device) if certainty else None
    token_logps = selected_logps(rows, weight, batch.target_ids, squares)
    # Not index_add, whose order of addition is random on CUDA; unsafe: lengths are not read back
    # from the GPU, only to be checked.
    sums = torch.segment_reduce(token_logps, "sum", lengths=batch.lengths, unsafe=True)
    chosen, rejected = sums.chunk(2)
    chosen_lengths, rejected_lengths = batch.lengths.chunk(2)
    logps = PairLogps(chosen, rejected, chosen_lengths, rejected_lengths)
    if batch.reference is not None:
        ref_chosen, ref_rejected = batch.reference.chunk(2)
        logps = replace(logps, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if squares is not None:
        means = torch.segment_reduce(squares, "mean", lengths=batch.lengths, unsafe=True).chunk(2)
        logps = replace(logps, chosen_certainty=means[0], rejected_certainty=means[1])
    return logps


def selected_logps(
    rows: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """(N,) float32 log-probabilities of `target_ids` (N,) under softmax(rows @ weight.T).

    Args:
        rows: (N, H) hidden states.
        weight: (V, H) output head; it gets no gradient.
        target_ids: (N,) tokens.
        squares: (N,) float32, is filled with the logarithm of each row's sum of squared
            probabilities.
    """
    return _SelectedLogps.apply(rows, weight.detach(), target_ids, squares, torch.is_grad_enabled())


class _SelectedLogps(torch.autograd.Function):
    """The tiles; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        target_ids: torch.Tensor,
        squares: torch.Tensor | None,
        needs_grad: bool,
    ) -> torch.Tensor:
        rows = rows.to(weight.dtype)
        logps = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        grad_rows = torch.empty_like(rows) if needs_grad else None
        for start in range(0, len(rows), TILE_ROWS):
            tile = slice(start, start + TILE_ROWS)
            logps[tile], exps, totals = _tile_logps(rows[tile], weight, target_ids[tile])
            if squares is not None:  # log Σp² = 2·(log‖e‖₂ − log Σe)
                squares[tile] = 2 * (torch.linalg.vector_norm(exps, dim=1).log() - totals.log())
            if grad_rows is not None:
                softmax = exps.div_(totals[:, None]).to(weight.dtype)
                torch.mm(softmax, weight, out=grad_rows[tile])
                del softmax
            del exps  # else it lives on while the next tile's logits are made
        if grad_rows is not None:
            ctx.save_for_backward(torch.sub(weight[target_ids], grad_rows, out=grad_rows))
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (grad_rows,) = ctx.saved_tensors
        return grad_rows * grads[0][:, None].to(grad_rows.dtype), None, None, None, None


def _tile_logps(
    rows: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities (n,), exponentials (n, V) in the logits' memory, and their sums (n,)."""
    # bfloat16 logits are rounded before they become float32, as in every trainer.
    logits = torch.mm(rows, weight.T).float()
    chosen = logits.gather(1, target_ids[:, None])[:, 0]
    maxima = logits.max(dim=1).values
    exps = logits.sub_(maxima[:, None]).exp_()
    totals = exps.sum(dim=1)
    return chosen - maxima - totals.log(), exps, totals
