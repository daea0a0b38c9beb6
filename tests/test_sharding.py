"""A model whose layers lie in two processes says and learns what a whole one does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from forging import randomize_adapter
from torch import distributed, multiprocessing
from torch.distributed.tensor import DTensor

from gapo_lite.batching import pack
from gapo_lite.errors import ModelError
from gapo_lite.model import (
    add_adapter,
    causal_model,
    forward_logps,
    load_base,
    set_recomputation,
    why_not_packed,
)
from gapo_lite.reference import disabled_adapter
from gapo_lite.sharding import shard_base
from gapo_lite.types import PairBatch, TokenizedPair


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_two_processes_with_half_the_layers_each_equal_a_whole_model(
    tiny_model, tmp_path, quantization, checkpointing
):
    work = partial(check_half, tiny_model, tmp_path / "store", quantization, checkpointing)
    multiprocessing.spawn(work, nprocs=2)


def check_half(model: Path, store: Path, quantization: str, checkpointing: bool, rank: int) -> None:
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    base = load_base(str(model), quantization=quantization, dtype=torch.float32)
    policy = add_adapter(base, rank=4)
    set_recomputation(policy, float(checkpointing))
    randomize_adapter(policy, 0.1)
    assert not why_not_packed(policy)
    batches = [random_batch(seed) for seed in (rank, 1 - rank, 2)]  # others in each process
    expected = [reading(policy, batch) for batch in batches]
    whole = layer_bytes(policy)
    shard_base(policy)
    assert layer_bytes(policy) == whole // 2
    for batch, (reference, logps, gradients) in zip(batches, expected, strict=True):
        found = reading(policy, batch)
        assert torch.equal(found[0], reference)
        assert torch.equal(found[1], logps)
        assert all(map(torch.equal, found[2], gradients))
    assert layer_bytes(policy) == whole // 2
    distributed.destroy_process_group()


def random_batch(seed: int) -> PairBatch:
    draw = np.random.default_rng(seed)
    ids = [draw.integers(0, 1000, draw.integers(3, 20)).astype(np.int32) for _ in range(6)]
    return pack([TokenizedPair(*ids[:3], 0.0), TokenizedPair(*ids[3:], 0.0)])


def reading(policy, batch) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities without adapter, with it, and its gradients."""
    with torch.no_grad(), disabled_adapter(policy):
        reference = forward_logps(policy, batch).chosen
    policy.zero_grad()
    logps = forward_logps(policy, batch)
    (logps.chosen - logps.rejected).sum().backward()
    gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    assert len(gradients) == 2 * 2 * 7  # A and B of 7 linear layers in each of 2 layers
    return reference, logps.chosen.detach(), gradients


def layer_bytes(policy) -> int:
    """Of the frozen weights of the layers, in this process."""
    weights = [
        p for p in causal_model(policy).base_model.layers.parameters() if not p.requires_grad
    ]
    held = [p.to_local() if isinstance(p, DTensor) else p for p in weights]
    return sum(p.numel() * p.element_size() for p in held)


def test_a_model_without_known_layers_is_refused(tiny_model, monkeypatch):
    policy = add_adapter(load_base(str(tiny_model), quantization="none", dtype=torch.float32))
    monkeypatch.setattr(causal_model(policy), "_no_split_modules", None)
    with pytest.raises(ModelError, match="which of its modules are layers"):
        shard_base(policy)
