"""Cards before Ampere: no bfloat16, so float16 with loss scaling; no FlashAttention."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch
from forging import numbers, run_of, settings_with
from transformers import LlamaConfig, LlamaForCausalLM

from gapo_lite import training
from gapo_lite.doctor import examine
from gapo_lite.errors import RunError
from gapo_lite.model import load_base, pick_device, pick_precision, why_not_packed


@pytest.fixture
def t4(emulation, monkeypatch):
    """Makes the GPU a T4."""
    emulation.become((7, 5), 15 * emulation.GIB)
    monkeypatch.setattr(emulation.Card, "name", "Tesla T4")


@pytest.fixture
def loss_scale(monkeypatch):
    """Sets with what scale of the loss a float16 run begins."""
    start = torch.amp.GradScaler.__init__

    def begin_with(scale):
        def start_so(self, device="cuda", **options):
            start(self, device, **{**options, "init_scale": scale})

        monkeypatch.setattr(torch.amp.GradScaler, "__init__", start_so)

    return begin_with


@pytest.fixture
def plain(small_settings):
    """Without dropout, a logged row a step."""
    return settings_with(
        small_settings, lora={"dropout": 0.0}, training={"logging_steps": 1, "max_steps": 4}
    )


def steps(run):
    return [row for row in run.metrics() if "loss" in row]


def losses(run):
    return [row["loss"] for row in steps(run)]


def log_of(run):
    return (run.path / "train.log").read_text(encoding="utf-8")


def adapter_at(run, step):
    folder = run.checkpoints / f"checkpoint-{step}"
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


@pytest.mark.usefixtures("t4")
def test_training_takes_float16_whose_losses_are_float32_s_but_for_the_rounding(
    plain, tmp_path, loss_scale
):
    assert pick_precision("auto", pick_device()) == torch.float16
    loss_scale(256.0)
    ours, exact = (
        run_of(plain, tmp_path, f"model.precision={precision}", name=precision)
        for precision in ("auto", "float32")
    )
    assert ours.state() == "finished"
    for column, rounding in (("loss", 2e-2), ("logps/chosen", 1e-3), ("logps/rejected", 1e-3)):
        found, expected = ([row[column] for row in steps(run)] for run in (ours, exact))
        assert found == pytest.approx(expected, rel=rounding), column
    assert [row["skipped_steps"] for row in steps(ours)] == [0, 0, 0, 0]
    assert not any("skipped_steps" in row for row in steps(exact))


@pytest.mark.usefixtures("t4")
def test_a_float16_run_resumes_exactly_with_its_loss_scale(small_settings, tmp_path):
    whole, run = (run_of(small_settings, tmp_path, name=name) for name in ("whole", "cut"))
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    saved = json.loads((run.checkpoints / "checkpoint-4" / "gapo.json").read_text())
    assert saved["scaler"]["scale"] == 65536 / 2 ** saved["skipped_steps"]
    assert saved["skipped_steps"] > 0  # or the resumed run could begin with the usual scale
    run_of(small_settings, tmp_path, resume="cut")
    ours, theirs = (r.adapter / "adapter_model.safetensors" for r in (whole, run))
    assert ours.read_bytes() == theirs.read_bytes()
    assert numbers(run) == numbers(whole)


@pytest.mark.usefixtures("t4")
def test_steps_whose_gradients_overflow_are_skipped_and_counted_and_the_run_goes_on(
    plain, tmp_path, loss_scale
):
    loss_scale(2.0**21)
    settings = settings_with(
        plain, training={"max_steps": 6, "keep_checkpoints": 6, "warmup_ratio": 0.0}
    )
    run = run_of(settings, tmp_path)
    assert run.state() == "finished"
    skipped = [row["skipped_steps"] for row in steps(run)]
    assert skipped[:2] == [1, 2]
    assert skipped[-1] < 6
    for name, weight in adapter_at(run, 2).items():
        assert weight.isfinite().all()
        assert "lora_B" not in name or not weight.any(), f"{name} changed in a skipped step"
    assert any(weight.any() for name, weight in adapter_at(run, 6).items() if "lora_B" in name)
    saved = json.loads((run.checkpoints / "checkpoint-6" / "gapo.json").read_text())
    assert saved["scaler"]["scale"] == 2.0 ** (21 - skipped[-1])


@pytest.mark.usefixtures("t4")
def test_nan_weights_stop_a_float16_run_before_its_first_step(plain, tmp_path, monkeypatch):
    add_adapter = training.add_adapter

    def broken(base, **settings):
        policy = add_adapter(base, **settings)
        next(p for n, p in policy.named_parameters() if "lora_B" in n).data[0, 0] = torch.nan
        return policy

    monkeypatch.setattr(training, "add_adapter", broken)
    with pytest.raises(RunError, match=r"gradient norm is nan at step 1;.*learning_rate"):
        run_of(plain, tmp_path)


@pytest.mark.usefixtures("t4")
@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_without_flash_attention_rows_are_padded_or_packed_pair_by_pair_and_the_log_says_why(
    plain, tmp_path, precision
):
    settings = settings_with(
        plain, model={"precision": precision}, training={"max_steps": 2, "warmup_ratio": 0.0}
    )
    by_itself, packed = (
        run_of(settings, tmp_path, f"training.layout={layout}", name=layout)
        for layout in ("auto", "packed")
    )
    assert (by_itself.state(), packed.state()) == ("finished", "finished")
    assert "Using the padded layout, which is slower: FlashAttention does not compute with it" in (
        log_of(by_itself)
    )
    assert "FlashAttention only supports Ampere GPUs or newer" in log_of(by_itself)
    assert "attention pair by pair (no FlashAttention)" in log_of(packed)
    assert losses(packed) == pytest.approx(losses(by_itself), rel=1e-3)


@pytest.mark.usefixtures("t4")
def test_doctor_says_what_such_a_card_lacks(tmp_path):
    found = {check.name: (check.mark, check.text) for check in examine(tmp_path)}
    assert found["GPU"][0] == "ok"
    assert "Tesla T4, 15.0 GiB" in found["GPU"][1]
    assert "no bfloat16: float16 is used" in found["GPU"][1]
    assert found["4-bit layer"] == ("ok", "forward and backward on cuda:0 in float16")
    assert found["attention"][0] == "warn"
    assert (
        "FlashAttention does not run here (FlashAttention only supports Ampere GPUs"
        in (found["attention"][1])
    )


@pytest.mark.parametrize(
    ("size", "reason"), [(20, "multiple of 8"), (264, "at most 256"), (256, "")]
)
def test_head_sizes_that_flash_attention_refuses_give_a_reason_and_no_exception(
    tmp_path, size, reason
):
    shape = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=size,
        vocab_size=300,
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path)
    model = load_base(str(tmp_path), dtype=torch.bfloat16, device="cuda")
    found = why_not_packed(model)
    assert reason in found
    assert bool(found) == bool(reason)
    assert why_not_packed(model, without_flash=True) == ""
