"""Liger's kernels in the layers of the model: the plain layers' numbers, or a message."""

from __future__ import annotations

import sys

import pytest
import torch
from liger_parity import CASES, measure
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gapo_lite.config import parse_config
from gapo_lite.errors import ModelError
from gapo_lite.liger_backend import load_liger_base
from gapo_lite.training import train


@pytest.fixture(scope="module")
def measured(tiny_model):
    return measure(tiny_model, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_logps_and_gradients_equal_the_plain_layers(measured, case):
    """In float32 both agree within 1e-4. In bfloat16 the log-probabilities do too, since each
    kernel rounds where its layer does; gradients, which kernels keep in float32 for longer, differ
    by rounding (8 bits: 0.4 %) of each of the steps that they pass."""
    found = measured[case]
    is_float32 = "float32" in case
    assert found["logps"] < 1e-4
    assert found["gradients"] < (1e-4 if is_float32 else 3e-2)
    assert found["cosine"] < (1e-7 if is_float32 else 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_norm_mlp_and_attention_has_a_kernel_and_other_models_have_none(measured, case):
    kinds = {"Norm": 9 if case.startswith("qwen3") else 5, "MLP": 2, "Attention": 2}
    patched = measured[case]["patched"]
    for kind, count in kinds.items():
        assert [n for name, n in patched.items() if name.endswith(kind)] == [count]
    assert len(patched) == len(kinds)
    assert measured[case]["plain is left alone"]


@pytest.mark.slow
def test_generated_answers_are_the_same(measured):
    for found in measured.values():
        plain, liger = found["answers"]
        assert len(plain) > 0
        assert plain == liger


# -- messages --


@pytest.fixture
def interpreted(monkeypatch):
    """As far as the checks can see, kernels can run and Liger is there."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "liger_kernel", sys)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", sys)


def test_a_training_without_a_gpu_says_so_and_leaves_no_run(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = {**tiny_settings, "model": {**tiny_settings["model"], "backend": "liger"}}
    with pytest.raises(ModelError, match=r"need an NVIDIA GPU.*backend: transformers"):
        train(parse_config(settings), runs_dir=tmp_path, show_progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["liger_kernel", "liger_kernel.transformers"])
def test_a_missing_package_is_one_message_with_what_to_install(
    tiny_model, monkeypatch, interpreted, missing
):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModelError, match=r"pip install -r requirements-liger\.txt"):
        load_liger_base(str(tiny_model), device="cpu")


def test_an_architecture_that_was_not_checked_is_refused(tmp_path, interpreted):
    shape = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"it is a gpt2 model.*llama, .*backend: transformers"):
        load_liger_base(str(tmp_path), device="cpu", quantization="none")


def test_an_activation_that_the_kernel_does_not_compute_is_refused(
    tiny_model, tmp_path, interpreted
):
    config = AutoConfig.from_pretrained(tiny_model, hidden_act="gelu")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="its activation is gelu"):
        load_liger_base(str(tmp_path), device="cpu", quantization="none")
