"""The reference: what the model says without its adapter, computed once and kept.

A reference log-probability depends on the tokens and the base model alone, so it is kept in the
cache under a digest of both, and attached to the pairs before training: an epoch then costs no more
than one without a reference. There is never a second copy of the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel

from gapo_lite.config import ModelConfig
from gapo_lite.ef.cache import read_scores, write_scores
from gapo_lite.embedded import cache_dir, model_state
from gapo_lite.evaluate import Collate, forward_pairs
from gapo_lite.model import Policy, causal_model, forward_logps
from gapo_lite.types import TokenizedPair

FORMAT_VERSION = 1  # raise it when the numbers of the same tokens and model change


@contextlib.contextmanager
def disabled_adapter(policy: Policy) -> Iterator[None]:
    """The model without its adapter, and without dropout."""
    training = policy.training
    policy.eval()
    with policy.disable_adapter() if isinstance(policy, PeftModel) else contextlib.nullcontext():
        yield
    policy.train(training)


def with_reference(
    policy: Policy,
    pairs: Sequence[TokenizedPair],
    collate: Collate,
    *,
    model: ModelConfig,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> list[TokenizedPair]:
    """The pairs, and the mismatched ones in them, with their reference log-probabilities.

    Args:
        policy: the model with its adapter, whatever that has learned.
        pairs: N pairs.
        collate: makes a batch of some pairs.
        model: the base model's settings, which its numbers depend on.
        batch_size: pairs a forward pass.
        device: where the policy is.
        progress: called with (pairs done, all).

    Raises:
        RunError: out of memory with one pair, or there is no folder for the cache.
    """
    mismatched = [pair.mismatched for pair in pairs if pair.mismatched is not None]
    everything = [*pairs, *mismatched]
    path = _path(everything, policy, model)
    kept = read_scores(path, 2 * len(everything))
    if kept is None:
        kept = _computed(policy, everything, collate, batch_size, device, progress)
        write_scores(path, kept)
    sums = [(float(chosen), float(rejected)) for chosen, rejected in kept.reshape(-1, 2)]
    others = iter(
        replace(pair, reference=both)
        for pair, both in zip(mismatched, sums[len(pairs) :], strict=True)
    )
    return [
        replace(pair, reference=both, mismatched=None if pair.mismatched is None else next(others))
        for pair, both in zip(pairs, sums, strict=False)
    ]


def _computed(
    policy: Policy,
    pairs: Sequence[TokenizedPair],
    collate: Collate,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None,
) -> NDArray[np.float64]:
    """(2N,): chosen and rejected of each pair in turn."""
    rows: list[torch.Tensor] = []
    with disabled_adapter(policy):
        for _, logps in forward_pairs(policy, pairs, forward_logps, collate, batch_size, device):
            rows.append(torch.stack((logps.chosen, logps.rejected), dim=1).cpu())
            if progress:
                progress(sum(map(len, rows)), len(pairs))
    return torch.cat(rows).double().numpy().reshape(-1)


def _path(pairs: Sequence[TokenizedPair], policy: Policy, model: ModelConfig) -> Path:
    causal = causal_model(policy)
    weight: Any = causal.get_input_embeddings().weight
    about = {
        **model.model_dump(exclude={"precision"}),
        "version": FORMAT_VERSION,
        "dtype": str(weight.dtype),
        "device": weight.device.type,
        "commit": getattr(causal.config, "_commit_hash", None),
        "files": model_state(model.name),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for pair in pairs:
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(len(ids).to_bytes(8))
            digest.update(np.ascontiguousarray(ids, dtype=np.int32).tobytes())
    return cache_dir() / "reference" / f"{digest.hexdigest()}.npy"
