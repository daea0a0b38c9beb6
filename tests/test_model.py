"""The policy's forward pass over pairs: layouts, adapters and 4-bit weights."""

from __future__ import annotations

import json
from dataclasses import replace

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from forging import randomize_adapter
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from gapo_lite.batching import pack, pad, tokenize_pairs
from gapo_lite.errors import ModelError
from gapo_lite.model import (
    add_adapter,
    causal_model,
    dequantize_base,
    forward_logps,
    load_adapter,
    load_base,
    resolve_model,
    set_recomputation,
    why_not_packed,
)
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.types import PreferencePair, TokenizedPair

SMOL = "embedded:smollm2-135m-instruct"


def random_pairs(*shapes, vocabulary=1000, seed=0):
    """Pairs of random tokens with the given (prompt, chosen, rejected) lengths."""
    draw = np.random.default_rng(seed)
    ids = [[draw.integers(3, vocabulary, n).astype(np.int32) for n in shape] for shape in shapes]
    return [TokenizedPair(*three, margin=float(draw.uniform(0, 0.6))) for three in ids]


SHAPES = ((5, 4, 7), (1, 1, 1), (9, 1, 12), (2, 8, 3))


def policy_of(base, seed=1):
    """A policy whose adapter already does something: B is random instead of 0."""
    policy = add_adapter(base, rank=4, alpha=8)
    randomize_adapter(policy, 0.05, seed)
    return policy


@pytest.fixture(scope="module")
def tiny(tiny_model):
    policy = policy_of(load_base(str(tiny_model), quantization="none", dtype=torch.float32))
    assert why_not_packed(policy) == ""
    return policy


def loss_and_gradients(policy, batches, num_pairs):
    policy.zero_grad()
    total = 0.0
    for batch in batches:
        out = OBJECTIVES["gapo"].fn(
            forward_logps(policy, batch), batch.margin, beta=10.0, margin_scale="beta"
        )
        loss = out.losses.sum() / num_pairs
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in policy.named_parameters() if p.requires_grad}


def padded(pairs):
    return pad(pairs, pad_id=0)


def test_packed_shared_prefix_equals_padded_sequences(tiny):
    pairs = random_pairs(*SHAPES)
    ours, reference = (forward_logps(tiny, layout(pairs)) for layout in (pack, padded))
    torch.testing.assert_close(ours.chosen, reference.chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.rejected, reference.rejected, rtol=1e-5, atol=1e-5)
    grads = [loss_and_gradients(tiny, [layout(pairs)], 4)[1] for layout in (pack, padded)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_logps_equal_the_model_s_own_logits(tiny):
    pair = random_pairs((6, 3, 5))[0]
    ours = forward_logps(tiny, pack([pair]))
    row = torch.tensor([[*pair.prompt_ids, *pair.rejected_ids]], dtype=torch.long)
    logits = tiny(input_ids=row).logits[0].log_softmax(-1)
    expected = sum(logits[6 - 1 + i, token] for i, token in enumerate(pair.rejected_ids.tolist()))
    assert ours.rejected.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("layout", [pack, padded])
def test_scores_do_not_depend_on_what_else_is_in_the_batch(tiny, layout):
    pairs = random_pairs(*SHAPES)
    together = forward_logps(tiny, layout(pairs))
    alone = [forward_logps(tiny, layout([pair])) for pair in pairs]
    torch.testing.assert_close(
        together.chosen, torch.cat([a.chosen for a in alone]), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        together.rejected, torch.cat([a.rejected for a in alone]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("layout", [pack, padded])
def test_one_batch_of_four_equals_four_accumulated_batches_of_one(tiny, layout):
    pairs = random_pairs(*SHAPES)
    loss_4, grads_4 = loss_and_gradients(tiny, [layout(pairs)], 4)
    loss_1, grads_1 = loss_and_gradients(tiny, [layout([pair]) for pair in pairs], 4)
    assert loss_4 == pytest.approx(loss_1, abs=1e-5)
    torch.testing.assert_close(grads_4, grads_1, rtol=1e-4, atol=1e-6)


def test_the_rejected_response_never_sees_the_chosen_one(tiny):
    pair = random_pairs((4, 6, 5))[0]
    other = random_pairs((4, 6, 5), seed=9)[0]
    swapped = TokenizedPair(pair.prompt_ids, other.chosen_ids, pair.rejected_ids, 0.0)
    before, after = forward_logps(tiny, pack([pair])), forward_logps(tiny, pack([swapped]))
    assert before.chosen.item() != after.chosen.item()
    assert before.rejected.item() == pytest.approx(after.rejected.item(), abs=1e-5)


def test_equal_responses_score_equally(tiny):
    pair = random_pairs((4, 6, 6))[0]
    twin = TokenizedPair(pair.prompt_ids, pair.chosen_ids, pair.chosen_ids, 0.0)
    logps = forward_logps(tiny, pack([twin]))
    assert logps.chosen.item() == pytest.approx(logps.rejected.item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [SHAPES, ((1, 1, 1),), ((3, 5, 5), (1, 40, 1))])
def test_dequantised_weights_give_the_same_numbers(tiny_model, dtype, shapes):
    """To the last bit in training; nothing of the 4 bits is left, and the adapter is the same."""
    policies = [
        policy_of(load_base(str(tiny_model), quantization="nf4", dtype=dtype)) for _ in range(2)
    ]
    names = [name for name, _ in policies[0].named_parameters() if "lora_" in name]
    dequantize_base(policies[1])
    assert not any(isinstance(m, Linear4bit) for m in policies[1].modules())
    assert [name for name, _ in policies[1].named_parameters() if "lora_" in name] == names
    assert [p.requires_grad for p in policies[1].parameters()].count(True) == len(names)
    for policy in policies:
        assert why_not_packed(policy) == ""
    pairs = random_pairs(*shapes)
    (loss, gradients), (same_loss, same_gradients) = (
        loss_and_gradients(policy, [pack(pairs)], len(pairs)) for policy in policies
    )
    assert loss == same_loss
    torch.testing.assert_close(gradients, same_gradients, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("share", "recomputed_layers"),
    [(0.0, [False, False]), (0.5, [False, True]), (1.0, [True, True])],
)
def test_recomputed_activations_give_the_same_gradients(tiny_model, tiny, share, recomputed_layers):
    base = load_base(str(tiny_model), quantization="none", dtype=torch.float32)
    again = add_adapter(base, rank=4, alpha=8)
    again.load_state_dict(tiny.state_dict())
    assert why_not_packed(again) == ""
    set_recomputation(again, share)
    layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert [layer.gradient_checkpointing for layer in layers] == recomputed_layers
    pairs = random_pairs(*SHAPES)
    plain, recomputed = (loss_and_gradients(p, [pack(pairs)], 4)[1] for p in (tiny, again))
    torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_only_the_adapter_can_learn_and_starts_as_the_base(tiny_model):
    base = load_base(str(tiny_model), quantization="nf4", dtype=torch.float32)
    plain = forward_logps(base, padded(random_pairs(*SHAPES)))
    policy = add_adapter(base, rank=4)
    assert all(("lora_" in name) == p.requires_grad for name, p in policy.named_parameters())
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)
    assert not any("lm_head" in name for name, p in policy.named_parameters() if p.requires_grad)
    fresh = forward_logps(policy, padded(random_pairs(*SHAPES)))
    torch.testing.assert_close(fresh.chosen, plain.chosen, rtol=0, atol=0)


def test_every_linear_layer_but_the_head_gets_an_adapter(tiny):
    adapted = {
        n.rpartition(".lora_A")[0].rpartition(".")[2]
        for n, _ in tiny.named_parameters()
        if "lora_A" in n
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


# -- 4 bits --


def real_pairs_of(rows, tokenizer, count, **limits):
    pairs = [
        PreferencePair([{"role": "user", "content": row["prompt"]}], row["chosen"], row["rejected"])
        for row in rows[:count]
    ]
    return [replace(pair, margin=0.3) for pair in tokenize_pairs(pairs, tokenizer, **limits).pairs]


def dequantised_twin(policy, base):
    """The policy with every 4-bit layer replaced by the ordinary one that holds the same
    numbers."""
    twin = policy_of(base)
    twin.load_state_dict(
        {k: v for k, v in policy.state_dict().items() if "lora_" in k}, strict=False
    )
    quantised = dict(policy.named_modules())
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear) and name.endswith("base_layer"):
            weight = quantised[name].weight
            module.weight.data = bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    return twin


def test_gradients_through_4_bits_equal_the_dequantised_model_s_before_and_after_an_evaluation(
    everyday_pairs,
):
    policy = policy_of(load_base(SMOL, quantization="nf4", dtype=torch.float32))
    twin = dequantised_twin(policy, load_base(SMOL, quantization="none", dtype=torch.float32))
    assert why_not_packed(policy) == why_not_packed(twin) == ""
    batch = pack(everyday_pairs[:2])
    expected = loss_and_gradients(twin, [batch], 2)[1]
    before = loss_and_gradients(policy, [batch], 2)[1]
    policy.eval()
    with torch.no_grad():
        forward_logps(policy, batch)
        policy.generate(input_ids=batch.input_ids[:, :8], max_new_tokens=2, do_sample=False)
    policy.train()
    after = loss_and_gradients(policy, [batch], 2)[1]
    assert all(grad.abs().max() > 0 for name, grad in before.items() if "lora_A" in name)
    torch.testing.assert_close(before, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.fixture(scope="module")
def everyday_pairs():
    from gapo_lite.embedded import EMBEDDED_DATA

    rows = [
        json.loads(line) for line in EMBEDDED_DATA["embedded:everyday"].read_text().splitlines()
    ]
    return real_pairs_of(rows, AutoTokenizer.from_pretrained(resolve_model(SMOL)), 4)


def test_an_already_quantised_folder_is_taken_as_it_is(tiny_model, tmp_path):
    load_base(str(tiny_model), quantization="nf4", dtype=torch.float32).save_pretrained(
        tmp_path / "nf4"
    )
    again = load_base(str(tmp_path / "nf4"), quantization="nf4", dtype=torch.float32)
    kinds = {type(module).__name__ for module in again.modules()}
    assert "Linear4bit" in kinds


# -- loading --


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no/such-model", "Check the spelling and the network"),
        ("nowhere", "owner/name"),
        ("../etc", "owner/name"),
        ("https://example.com/m", "owner/name"),
        ("owner/name/extra", "owner/name"),
        ("embedded:gpt-5", "embedded:smollm2-135m-instruct"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_message(name, says):
    with pytest.raises(ModelError, match=says):
        load_base(name)


def test_an_incomplete_folder_is_one_message(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="complete transformers model"):
        load_base(str(tmp_path), quantization="none")


def test_an_adapter_made_for_another_base_is_refused(tiny_model, tmp_path):
    policy = add_adapter(load_base(SMOL, quantization="none"), rank=2)
    policy.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    base = load_base(str(tiny_model), quantization="none", dtype=torch.float32)
    with pytest.raises(ModelError, match="does not fit"):
        load_adapter(base, tmp_path / "adapter")
    with pytest.raises(ModelError, match="holds no adapter"):
        load_adapter(base, tmp_path)


def test_a_head_that_does_more_than_a_product_is_refused(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.final_logit_softcapping = 30.0
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        load_base(str(tmp_path), quantization="none")


def test_a_sliding_window_falls_back_to_the_padded_layout(tiny):
    causal = causal_model(tiny)
    causal.config.sliding_window = 16
    try:
        assert "sliding" in why_not_packed(tiny)
    finally:
        del causal.config.sliding_window


def test_the_packed_layout_is_refused_by_attention_that_does_not_know_it(tiny_model):
    model = load_base(str(tiny_model), quantization="none", dtype=torch.float32)
    ids = [np.arange(1, n, dtype=np.int32) for n in (5, 4, 7)]
    batch = pack([TokenizedPair(*ids, margin=0.0)])
    with pytest.raises(ModelError, match="why_not_packed"):
        forward_logps(model, batch)
    assert why_not_packed(model) == ""
    forward_logps(model, batch)
