"""Each lever of speed and memory against the reference that uses none: padded sequences, the
model's own full logits, float32.

Real pairs, and made of them: a prompt of one token, responses of one token, equal responses, and
pairs that fill `max_length`. The base in NF4, so that all compute with the same weights: a random
small one, on which bfloat16 is quick also without AVX-512, and SmolLM with every lever at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from forging import randomize_adapter
from tiny_models import save_llama

from gapo_lite import logps as head
from gapo_lite.batching import MicroBatchLimits, pack, pad, tokenize_pairs
from gapo_lite.model import (
    add_adapter,
    dequantize_base,
    forward_logps,
    load_base,
    load_tokenizer,
    set_recomputation,
    why_not_packed,
)
from gapo_lite.types import PreferencePair

SMOL = "embedded:smollm2-135m-instruct"
MAX_LENGTH = 192
SMALL_VOCABULARY = 4096


WHOLE = MicroBatchLimits()


@dataclass(frozen=True)
class Lever:
    """Which levers are on; none of them is the padded layout in one pass."""

    packed: bool = False
    limits: MicroBatchLimits = WHOLE
    recomputed: float = 0.0
    dequantized: bool = False
    tile_rows: int = 256


LEVERS = {
    "head of scored rows, in tiles": Lever(tile_rows=50),
    "head in one tile": Lever(tile_rows=4096),
    "packed": Lever(packed=True),
    "token budget": Lever(packed=True, limits=MicroBatchLimits(tokens=400)),
    "token budget, padded": Lever(limits=MicroBatchLimits(tokens=400)),
    "half recomputed": Lever(recomputed=0.5),
    "all recomputed": Lever(recomputed=1.0),
    "dequantised": Lever(dequantized=True),
    "every lever": Lever(True, MicroBatchLimits(tokens=400), 0.5, True, 50),
}

BFLOAT16 = 2.0**-8
"""bfloat16 keeps 8 bits: a rounding moves a number by at most that share of it."""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folder of a random four-layer Llama of 4,096 tokens."""
    folder = tmp_path_factory.mktemp("models") / "small"
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    return str(save_llama(folder, vocab_size=SMALL_VOCABULARY, **shape))


@pytest.fixture(scope="module")
def smol_pairs(real_rows):
    tokenizer = load_tokenizer(SMOL)
    rows = sorted(real_rows, key=lambda row: len(row["prompt"] + row["chosen"] + row["rejected"]))
    real = [
        PreferencePair([{"role": "user", "content": r["prompt"]}], r["chosen"], r["rejected"])
        for r in [*rows[60:62], rows[-1]]
    ]
    short, other, long = tokenize_pairs(real, tokenizer, max_length=MAX_LENGTH).pairs
    assert max(len(long.prompt_ids) + len(r) for r in (long.chosen_ids, long.rejected_ids)) == (
        MAX_LENGTH
    )
    return [
        short,
        replace(other, prompt_ids=other.prompt_ids[-1:]),
        replace(short, chosen_ids=short.chosen_ids[:1]),
        replace(other, rejected_ids=other.rejected_ids[:1], prompt_ids=other.prompt_ids[:1]),
        replace(other, rejected_ids=other.chosen_ids),
        long,
    ]


@pytest.fixture(scope="module")
def pairs(smol_pairs):
    def few(ids):
        return ids % SMALL_VOCABULARY

    return [
        replace(
            pair,
            prompt_ids=few(pair.prompt_ids),
            chosen_ids=few(pair.chosen_ids),
            rejected_ids=few(pair.rejected_ids),
        )
        for pair in smol_pairs
    ]


def policy_in(dtype, name):
    policy = add_adapter(load_base(name, quantization="nf4", dtype=dtype), rank=4, alpha=8)
    return randomize_adapter(policy, 0.05)


def weights_of(pairs):
    """What the loss weighs each pair's responses with: another number each, so that no gradient
    of one can stand in for another's, and equal responses leave some."""
    count = torch.arange(1.0, len(pairs) + 1)
    return 1 / count, -1 / (count + 0.5)


def naive(policy, pairs):
    """(2, B) log-probabilities a token, and the gradient of their weighted sum: all logits of all
    padded sequences, by the model's own forward pass."""
    sides = [(p.prompt_ids, r) for p in pairs for r in (p.chosen_ids, p.rejected_ids)]
    width = max(len(prompt) + len(response) for prompt, response in sides)
    ids = torch.zeros(len(sides), width, dtype=torch.long)
    mask, scored = torch.zeros_like(ids), torch.zeros(len(sides), width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(sides):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt.tolist(), *response.tolist()])
        mask[row, :end] = 1
        scored[row, len(prompt) : end] = True
    logits = policy(input_ids=ids, attention_mask=mask).logits.float()
    taken = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    scored = scored[:, 1:]
    means = (taken * scored).sum(1) / scored.sum(1)
    means = means.view(-1, 2).T
    weighted = sum((w * side).sum() for w, side in zip(weights_of(pairs), means, strict=True))
    return means.detach(), gradient(policy, weighted)


def with_levers(policy, pairs, lever):
    """The same by `forward_logps`, a backward pass a micro-batch."""
    means, grads = torch.zeros(2, len(pairs)), 0.0
    sizes = [
        p.num_tokens if lever.packed else 2 * max(len(p.prompt_ids) + len(r)
        for r in (p.chosen_ids, p.rejected_ids)) for p in pairs
    ]  # fmt: skip
    groups = lever.limits.micro_batches(sizes, packed=lever.packed)
    assert len(groups) > 1 or lever.limits == WHOLE
    for group in groups:
        chosen = [pairs[index] for index in group]
        batch = pack(chosen) if lever.packed else pad(chosen, pad_id=0)
        logps = forward_logps(policy, batch)
        sides = logps.chosen_avg, logps.rejected_avg
        weighted = sum(
            (w[group] * side).sum() for w, side in zip(weights_of(pairs), sides, strict=True)
        )
        grads = grads + gradient(policy, weighted)
        means[:, group] = torch.stack(sides).detach()
    return means, grads


def gradient(policy, value):
    learned = [p for p in policy.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, learned)]).double()


@pytest.fixture(scope="module")
def reference(small, pairs):
    return naive(policy_in(torch.float32, small), pairs)


def distances(policy, pairs, lever, reference, monkeypatch):
    """The largest difference of a mean log-probability, in nats a token, and of the whole gradient,
    as a share of its length."""
    if lever.packed:
        assert why_not_packed(policy) == ""
    set_recomputation(policy, lever.recomputed)
    if lever.dequantized:
        dequantize_base(policy)
    monkeypatch.setattr(head, "TILE_ROWS", lever.tile_rows)
    means, grads = with_levers(policy, pairs, lever)
    away = (grads - reference[1]).norm() / reference[1].norm()
    return (means - reference[0]).abs().max().item(), away.item()


@pytest.mark.parametrize("lever", LEVERS)
def test_float32_equals_the_reference(small, pairs, reference, lever, monkeypatch):
    policy = policy_in(torch.float32, small)
    logps, gradients = distances(policy, pairs, LEVERS[lever], reference, monkeypatch)
    assert logps < 1e-4
    assert gradients < 1e-4


@pytest.mark.slow
def test_all_levers_at_once_equal_the_reference_on_a_trained_model(smol_pairs, monkeypatch):
    reference = naive(policy_in(torch.float32, SMOL), smol_pairs)
    policy = policy_in(torch.float32, SMOL)
    logps, gradients = distances(policy, smol_pairs, LEVERS["every lever"], reference, monkeypatch)
    assert logps < 1e-4
    assert gradients < 1e-4


@pytest.mark.parametrize("lever", ["packed", "every lever"])
def test_bfloat16_is_as_near_as_its_rounding(small, pairs, reference, lever, monkeypatch):
    """And no further from float32 than the reference itself is in bfloat16, but for luck."""
    policy = policy_in(torch.bfloat16, small)
    means, grads = naive(policy, pairs)
    plain = (grads - reference[1]).norm() / reference[1].norm()
    logps, gradients = distances(policy, pairs, LEVERS[lever], reference, monkeypatch)
    largest = reference[0].abs().max().item()
    assert logps < 4 * BFLOAT16 * largest
    assert gradients < 1.5 * plain
    assert (means - reference[0]).abs().max() < 4 * BFLOAT16 * largest
