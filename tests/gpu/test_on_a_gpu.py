"""The training step and whole runs on a GPU, real or emulated (tests/hostcuda)."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from forging import numbers, randomize_adapter, run_of, settings_with
from liger_parity import measure
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gapo_lite import attention
from gapo_lite.batching import pack, pad
from gapo_lite.config import ObjectiveConfig
from gapo_lite.ef.semantic import bert_scores
from gapo_lite.embedded import embedded_path
from gapo_lite.errors import ModelError, RunError
from gapo_lite.fused import _RmsNorm, fuse_layers
from gapo_lite.loss import PairLoss
from gapo_lite.model import (
    add_adapter,
    dequantize_base,
    forward_logps,
    load_base,
    why_not_packed,
)
from gapo_lite.runs import device_lease
from gapo_lite.types import TokenizedPair

IS_EMULATED = "emulated" in (torch.version.cuda or "")
SHAPES = ((170, 300, 41), (1, 1, 1), (64, 5, 200), (3, 128, 127))


def random_pairs():
    draw = np.random.default_rng(0)
    ids = [[draw.integers(3, 1000, n).astype(np.int32) for n in shape] for shape in SHAPES]
    return [TokenizedPair(p, w, l, 0.3) for p, w, l in ids]


@pytest.fixture(scope="module")
def policy(small_model):
    base = load_base(str(small_model), quantization="nf4", dtype=torch.bfloat16, device="cuda")
    model = add_adapter(base, rank=8)
    randomize_adapter(model, 0.05)
    assert why_not_packed(model) == ""
    fuse_layers(model)
    return model


def logps_and_gradients(policy, batch):
    policy.zero_grad()
    logps = forward_logps(policy, batch.to("cuda"))
    (logps.chosen_avg - 2 * logps.rejected_avg).sum().backward()
    grads = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    return torch.cat((logps.chosen_avg, logps.rejected_avg)).detach(), grads


def test_values_narrower_than_keys_are_packed_pair_by_pair(tmp_path):
    """As in latent attention (DeepSeek, Youtu), for which no kernel of one call exists."""
    shape = AutoConfig.for_model(
        "youtu",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=300,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), quantization="nf4", dtype=torch.bfloat16, device="cuda")
    assert why_not_packed(base) == ""


def test_one_varlen_call_equals_two_calls_a_pair(policy, monkeypatch):
    logps, grads = logps_and_gradients(policy, pack(random_pairs()))
    monkeypatch.setattr(attention, "_one_call", attention._two_calls_a_pair)
    expected_logps, expected_grads = logps_and_gradients(policy, pack(random_pairs()))
    torch.testing.assert_close(logps, expected_logps, rtol=2e-2, atol=2e-2)
    assert torch.nn.functional.cosine_similarity(grads, expected_grads, dim=0) > 0.999


def test_packed_equals_padded_within_bfloat16_rounding(policy):
    logps, grads = logps_and_gradients(policy, pack(random_pairs()))
    expected_logps, expected_grads = logps_and_gradients(policy, pad(random_pairs(), pad_id=0))
    torch.testing.assert_close(logps, expected_logps, rtol=2e-2, atol=2e-2)
    assert torch.nn.functional.cosine_similarity(grads, expected_grads, dim=0) > 0.999


def test_dequantised_weights_give_the_same_numbers(policy, small_model):
    expected_logps, expected_grads = logps_and_gradients(policy, pack(random_pairs()))
    base = load_base(str(small_model), quantization="nf4", dtype=torch.bfloat16, device="cuda")
    other = add_adapter(base, rank=8)
    other.load_state_dict(policy.state_dict(), strict=False)
    dequantize_base(other)
    assert why_not_packed(other) == ""
    logps, grads = logps_and_gradients(other, pack(random_pairs()))
    torch.testing.assert_close(logps, expected_logps, rtol=2e-2, atol=2e-2)
    assert torch.nn.functional.cosine_similarity(grads, expected_grads, dim=0) > 0.999


def test_a_pass_never_waits_for_the_gpu(policy):
    """The host may run ahead: no synchronisation from the batch's way to the GPU to its gradient
    (the pairs' loss is left on the GPU, too)."""
    loss = PairLoss(ObjectiveConfig())
    logps_and_gradients(policy, pack(random_pairs()))  # kernels are loaded
    batch = pack(random_pairs())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = batch.to("cuda", non_blocking=True)
        loss(loss.logps(policy, on_gpu), on_gpu.margin).losses.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_fused_norm_equals_the_plain_one_whatever_the_strides_of_its_gradient():
    """Norms of attention heads get theirs transposed."""
    norm = LlamaRMSNorm(16).cuda()
    norm.weight.data.normal_(1, 0.3)
    norm.requires_grad_(False)
    x = torch.randn(1, 9, 4, 16, device="cuda", requires_grad=True)
    grad = torch.randn(1, 4, 9, 16, device="cuda").transpose(1, 2)
    assert not grad.is_contiguous()
    (expected,) = torch.autograd.grad(norm(x), x, grad)
    fused = _RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
    torch.testing.assert_close(fused, norm(x), rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(fused, x, grad)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


LEVERS = {
    "plain": {"model": {"dequantized_cache": "never"}, "training": {"micro_batch_size": 2}},
    "all": {
        "model": {"dequantized_cache": "always"},
        "lora": {"dropout": 0.0},  # with dropout no LoRA layer is fused
        "training": {
            "micro_batch_size": None,
            "micro_batch_tokens": 300,
            "gradient_checkpointing": 0.5,
            "offload": "always",
        },
    },
}


@pytest.mark.parametrize("levers", LEVERS)
def test_a_run_on_the_gpu_resumes_exactly(small_settings, tmp_path, levers):
    """As if it had been killed after step 4: the checkpoint of step 6 is gone."""
    settings = settings_with(small_settings, **LEVERS[levers])
    whole, run = (run_of(settings, tmp_path, name=name) for name in ("whole", "cut"))
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    run_of(settings, tmp_path, resume="cut")
    ours, theirs = (r.adapter / "adapter_model.safetensors" for r in (whole, run))
    if IS_EMULATED:
        assert ours.read_bytes() == theirs.read_bytes()
        assert numbers(run) == numbers(whole)
    else:  # FlashAttention's backward pass adds in no fixed order
        a, b = (safetensors.torch.load_file(path) for path in (ours, theirs))
        for name, weight in a.items():
            torch.testing.assert_close(weight, b[name], rtol=0.1, atol=5e-3)
    assert all(row["memory_gib"] > 0 for row in run.metrics() if "loss" in row)


def test_liger_s_kernels_equal_the_plain_layers(small_model):
    """As tests/test_liger.py asks of the interpreter; answers are left out, since on a GPU rounding
    may turn a close choice of a token."""
    for case, found in measure(small_model, "cuda").items():
        is_float32 = "float32" in case
        assert found["logps"] < (1e-4 if is_float32 else 2e-2), case
        assert found["gradients"] < (1e-4 if is_float32 else 5e-2), case
        assert found["cosine"] < (1e-7 if is_float32 else 1e-3), case
        assert found["plain is left alone"], case


def test_bertscores_on_a_gpu_are_the_cpu_s():
    encoder = "embedded:all-minilm-l6-v2"
    try:
        embedded_path(encoder)
    except ModelError as error:  # of 90 MB, which does not travel to every GPU
        pytest.skip(str(error))
    left, right = (["the cat sat", "rain falls down today", ""], ["a cat sat down", "sun", "x"])
    on_gpu, on_cpu = (
        bert_scores(left, right, model=encoder, device=device) for device in ("cuda", "cpu")
    )
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=1e-4)


def test_a_second_training_on_the_same_gpu_is_refused(small_settings, tmp_path):
    uuid = torch.cuda.get_device_properties(0).uuid
    with device_lease(f"cuda-{uuid}"), pytest.raises(RunError, match="another training"):
        run_of(small_settings, tmp_path)
    assert not list(tmp_path.iterdir())
