"""Fused training layers against the layers that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from forging import randomize_adapter
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from gapo_lite.batching import pack
from gapo_lite.fused import fuse_layers
from gapo_lite.model import (
    add_adapter,
    forward_logps,
    load_base,
    set_recomputation,
    why_not_packed,
)
from gapo_lite.types import TokenizedPair

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def random_pairs(number=3):
    draw = np.random.default_rng(3)
    shapes = [(9, 30, 4), (1, 1, 1), (17, 5, 20), *draw.integers(5, 40, (number - 3, 3)).tolist()]
    return [
        TokenizedPair(*(draw.integers(2, 300, n).astype(np.int32) for n in shape), 0.3)
        for shape in shapes
    ]


def two_policies(tmp_path, config, dtype, quantization, **adapter):
    """The same model and adapter twice: as PEFT makes it, and with fused layers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
    model.save_pretrained(tmp_path)
    policies = []
    for fuse in (False, True):
        base = load_base(str(tmp_path), quantization=quantization, dtype=dtype)
        policy = add_adapter(base, rank=4, alpha=12, **adapter)
        randomize_adapter(policy, 0.05)
        assert why_not_packed(policy) == ""
        if fuse:
            assert fuse_layers(policy) > 0
        policies.append(policy)
    return policies


def logps_and_gradients(policy, number=3):
    policy.zero_grad()
    logps = forward_logps(policy, pack(random_pairs(number)))
    (logps.chosen_avg - 2 * logps.rejected_avg).sum().backward()
    grads = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads.values())
    return torch.cat((logps.chosen_avg, logps.rejected_avg)).detach(), grads


CONFIGS = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen3": Qwen3Config(**SHAPE),  # norms within attention
}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_layers_give_the_numbers_and_gradients_of_the_plain_ones(
    tmp_path, name, quantization
):
    plain, fused = two_policies(tmp_path, CONFIGS[name], torch.float32, quantization)
    for share in (0.0, 1.0):
        set_recomputation(fused, share)
        expected, expected_grads = logps_and_gradients(plain)
        found, grads = logps_and_gradients(fused)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        for key, grad in grads.items():
            assert (grad - expected_grads[key]).norm() <= 1e-4 * expected_grads[key].norm(), key


def test_fused_layers_round_like_the_plain_ones_in_bfloat16(tmp_path):
    """Both differ from float32 by the rounding of bfloat16; the fused ones no more."""
    exact, _ = two_policies(tmp_path, CONFIGS["llama"], torch.float32, "none")
    plain, fused = two_policies(tmp_path, CONFIGS["llama"], torch.bfloat16, "none")
    truth, true_grads = logps_and_gradients(exact, 30)
    errors, grad_errors = [], []
    for policy in (plain, fused):
        logps, grads = logps_and_gradients(policy, 30)
        errors.append(float((logps - truth).abs().mean()))
        both = [torch.cat([g[k].flatten() for k in true_grads]) for g in (grads, true_grads)]
        grad_errors.append(float((both[0] - both[1]).norm() / both[1].norm()))
    assert errors[1] < 1.25 * errors[0]
    assert grad_errors[1] < 1.25 * grad_errors[0]


def test_a_changed_adapter_counts_in_the_next_pass(tmp_path):
    """Fused layers keep rounded copies of A and B, which follow every change."""
    plain, fused = two_policies(tmp_path, CONFIGS["llama"], torch.float32, "none")
    logps_and_gradients(fused)
    for policy in (plain, fused):
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.data.mul_(1.5)  # raises no version counter
    torch.testing.assert_close(
        logps_and_gradients(fused)[0], logps_and_gradients(plain)[0], rtol=0, atol=2e-5
    )


def test_without_the_adapter_it_is_the_base_model(tmp_path):
    plain, fused = two_policies(tmp_path, CONFIGS["llama"], torch.float32, "none")
    batch = pack(random_pairs())
    with plain.disable_adapter(), fused.disable_adapter():
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                expected = forward_logps(plain, batch).chosen
                assert torch.allclose(forward_logps(fused, batch).chosen, expected, atol=2e-4)


def test_other_layers_stay_as_they_are(tmp_path):
    """Dropout on the adapter's input, and norms that multiply by 1 + w."""
    torch.manual_seed(0)
    policy = add_adapter(AutoModelForCausalLM.from_config(CONFIGS["llama"]), dropout=0.1)
    fuse_layers(policy)
    fused = [name for name, module in policy.named_modules() if "forward" in vars(module)]
    assert fused
    assert not any("_proj" in name for name in fused)
    gemma = Gemma2Config(**SHAPE, sliding_window=None)
    policy = add_adapter(AutoModelForCausalLM.from_config(gemma))
    fuse_layers(policy)
    assert not any("norm" in n for n, m in policy.named_modules() if "forward" in vars(m))
