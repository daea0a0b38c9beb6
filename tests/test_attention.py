"""A packed row's one FlashAttention call, on the CPU: what it asks for against padded rows.

`varlen_attn` has no kernel for a CPU, nor for float32. Here its documented semantics stand in, so
that the gathered keys, the lengths and the alignment of the masks are compared to the last digits
of float32 and not to those of bfloat16.
"""

from __future__ import annotations

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from forging import randomize_adapter
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from gapo_lite import attention
from gapo_lite.batching import pack, pad
from gapo_lite.model import add_adapter, forward_logps, set_recomputation
from gapo_lite.types import TokenizedPair

EDGES = ((1, 1, 1), (7, 1, 30), (2, 30, 1))
"""Lengths of prompt, chosen and rejected beside the random ones."""


def reference_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False
):
    """(T, heads, D): each sequence by itself, its causal mask aligned to its last key."""
    assert query.dim() == key.dim() == value.dim() == 3
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max())) == (max_q, max_k)
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    assert type(max_q) is type(max_k) is int
    assert window_size == (-1, 0)
    assert query.shape[1] == key.shape[1] or enable_gqa
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = []
    for (a, b), (c, d) in zip(
        itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True
    ):
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[c:d]) * scale
        rows = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        scores = scores.masked_fill(torch.arange(d - c) > rows, -math.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[c:d]))
    return torch.cat(out)


@pytest.fixture
def one_call(monkeypatch):
    """Makes packed rows take the one call, of a torch with or without `enable_gqa`; its `.calls`
    are counted."""

    def take(*, knows_gqa):
        parameters = dict(inspect.signature(reference_varlen_attn).parameters)
        if not knows_gqa:
            del parameters["enable_gqa"]

        def counted(*args, **kwargs):
            take.calls += 1
            return reference_varlen_attn(*args, **kwargs)

        monkeypatch.setattr(attention, "varlen_attn", counted)
        monkeypatch.setattr(attention, "_VARLEN_TAKES", parameters)
        monkeypatch.setattr(attention, "_two_calls_a_pair", attention._one_call)

    take.calls = 0
    return take


def make_policy(kind, heads, kv_heads):
    config = kind(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        vocab_size=300,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    return randomize_adapter(add_adapter(model, rank=4), 0.1)


def random_pairs(seed):
    draw = np.random.default_rng(seed)
    shapes = [*draw.integers(1, 40, (3, 3)).tolist(), *EDGES]
    return [
        TokenizedPair(*(draw.integers(2, 300, n).astype(np.int32) for n in shape), 0.3)
        for shape in shapes
    ]


def logps_and_gradients(policy, batch, implementation, recomputed):
    """Summed log-probabilities (2B,) and the adapter's gradients, flattened."""
    policy.get_base_model().set_attn_implementation(implementation)
    set_recomputation(policy, recomputed)
    policy.zero_grad()
    logps = forward_logps(policy, batch)
    (logps.chosen - 2 * logps.rejected_avg).sum().backward()
    grads = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    return torch.cat((logps.chosen, logps.rejected)).detach(), grads


@pytest.mark.parametrize("knows_gqa", [True, False], ids=["enable_gqa", "without enable_gqa"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("heads", [4, 8])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_the_one_call_of_a_packed_row_gives_the_numbers_and_gradients_of_padded_rows(
    one_call, kind, heads, kv_heads, knows_gqa
):
    one_call(knows_gqa=knows_gqa)
    policy, pairs = make_policy(kind, heads, kv_heads), random_pairs(heads * kv_heads)
    expected, expected_grads = logps_and_gradients(policy, pad(pairs, 0), "sdpa", 0.0)
    assert one_call.calls == 0
    for recomputed in (0.0, 1.0):
        found, grads = logps_and_gradients(policy, pack(pairs), attention.SHARED_PREFIX, recomputed)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert (grads - expected_grads).norm() <= 1e-5 * expected_grads.norm()
    assert one_call.calls == 3 + 6  # three layers, and again where they are recomputed


def test_the_comparison_notices_keys_of_another_token(one_call):
    """Were the gathered keys wrong, the test above would say so."""
    one_call(knows_gqa=True)
    policy, pairs = make_policy(LlamaConfig, 4, 2), random_pairs(8)
    expected, _ = logps_and_gradients(policy, pad(pairs, 0), "sdpa", 0.0)
    batch = pack(pairs)
    batch.segments.kv_index.copy_(batch.segments.kv_index.roll(1))
    found, _ = logps_and_gradients(policy, batch, attention.SHARED_PREFIX, 0.0)
    assert (found - expected).abs().max() > 1e-2
