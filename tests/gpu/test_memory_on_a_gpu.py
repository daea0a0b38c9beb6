"""What lies in a GPU's memory, and when: weights, inputs of recomputed layers, other programs'.

Also the layers that keep less of it (fused.py) in a GPU's arithmetic.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
import yaml
from forging import randomize_adapter, run_of, settings_with
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from gapo_lite.batching import pack
from gapo_lite.cli import app
from gapo_lite.config import parse_config
from gapo_lite.forecast import forecast
from gapo_lite.fused import fuse_layers
from gapo_lite.model import (
    add_adapter,
    dequantize_base,
    forward_logps,
    load_base,
    set_recomputation,
    why_not_packed,
)
from gapo_lite.runs import Run
from gapo_lite.types import TokenizedPair

LAYERS = 8
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 300,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """Folder of a random model of several layers, whose weights and inputs outweigh the rest."""
    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    return folder


def make_policy(folder):
    base = load_base(str(folder), dtype=torch.bfloat16, device="cuda")
    policy = randomize_adapter(add_adapter(base, rank=4), 0.05)
    assert why_not_packed(policy) == ""
    return policy


def random_batch(scale=1):
    draw = np.random.default_rng(0)
    shapes = np.array([(60, 90, 40), (3, 120, 127), (1, 1, 1)]) * scale
    ids = [[draw.integers(3, 300, n).astype(np.int32) for n in shape] for shape in shapes]
    return pack([TokenizedPair(p, w, l, 0.3) for p, w, l in ids]).to("cuda")


def logps_and_gradients(policy, batch):
    policy.zero_grad()
    logps = forward_logps(policy, batch)
    (logps.chosen_avg - 2 * logps.rejected_avg).sum().backward()
    grads = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    return torch.cat((logps.chosen_avg, logps.rejected_avg)).detach(), grads


def test_dequantised_weights_take_the_place_of_the_4_bit_ones_at_once(deep_model, emulation):
    """Without the garbage collector, which may come by much later: 3 to 4 GiB of an 8B."""
    gc.collect()
    others = emulation.live()
    policy = make_policy(deep_model)
    gc.collect()
    before = emulation.live() - others
    gc.disable()
    try:
        dequantize_base(policy)
        after = emulation.live() - others
    finally:
        gc.enable()
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    assert before < weights
    assert after == pytest.approx(weights, rel=0.02)


def test_inputs_that_wait_on_the_host_leave_the_gpu_and_no_number_changes(deep_model, emulation):
    policy, batch = make_policy(deep_model), random_batch(scale=2)
    found = {}
    for offload in (False, True):
        set_recomputation(policy, 1.0, offload=offload)
        policy.zero_grad()
        gc.collect()
        before = emulation.live()
        emulation.reset_peak()
        logps, grads = logps_and_gradients(policy, batch)
        found[offload] = logps, grads, emulation.peak() - before
        del logps, grads
    (logps, grads, peak), (same_logps, same_grads, lower) = found.values()
    assert torch.equal(logps, same_logps)
    assert torch.equal(grads, same_grads)
    one_input = batch.input_ids.numel() * SHAPE["hidden_size"] * 2
    assert lower <= peak - (LAYERS - 3) * one_input


def test_fused_layers_round_as_peft_s_do_on_a_gpu(deep_model):
    policy, batch = make_policy(deep_model), random_batch()
    expected, expected_grads = logps_and_gradients(policy, batch)
    assert fuse_layers(policy) == LAYERS * (7 + 2 + 1) + 1
    logps, grads = logps_and_gradients(policy, batch)
    torch.testing.assert_close(logps, expected, rtol=0, atol=2e-2)
    assert torch.nn.functional.cosine_similarity(grads, expected_grads, dim=0) > 0.999
    set_recomputation(policy, 1.0)
    again, same_grads = logps_and_gradients(policy, batch)
    assert torch.equal(again, logps)
    assert torch.equal(same_grads, grads)


def test_a_run_warns_where_other_programs_hold_the_memory_that_it_plans_with_and_trains(
    small_settings, tmp_path, emulation
):
    plan = forecast(parse_config(small_settings)).plan
    needed = plan.peak - plan.parts["libraries and driver"]
    total = 24 * emulation.GIB
    emulation.become((8, 9), total, held=total - int(needed) - 1)
    assert forecast(parse_config(small_settings)).notes == []
    emulation.become((8, 9), total, held=total - int(0.95 * needed))
    warning = "Only 0.0 of this GPU's 24.0 GiB is free"
    (told,) = forecast(parse_config(small_settings)).notes
    assert told.startswith(warning)
    run = run_of(small_settings, tmp_path, "training.max_steps=1")
    assert run.state() == "finished"
    log = (run.path / "train.log").read_text(encoding="utf-8")
    assert f"WARNING {warning}" in log
    assert "nvidia-smi" in log


def test_a_run_that_has_the_card_for_itself_warns_of_nothing(small_settings, tmp_path):
    run = run_of(small_settings, tmp_path, "training.max_steps=1")
    assert "WARNING" not in (run.path / "train.log").read_text(encoding="utf-8")


def test_a_sweep_gives_each_run_s_memory_back_before_the_next_and_at_its_end(
    small_settings, tmp_path, emulation
):
    file = tmp_path / "sweep.yaml"
    base = settings_with(small_settings, training={"max_steps": 1, "logging_steps": 1})
    variants = [{"name": "a", "settings": {}}, {"name": "b", "settings": {"margin.gamma": 0.1}}]
    sweep = {"base": base, "variants": variants, "seeds": [1], "answers": None}
    file.write_text(yaml.safe_dump(sweep))
    gc.collect()
    before = emulation.live()
    done = CliRunner().invoke(app, ["sweep", str(file), "--runs-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "2 of 2 runs finished" in done.output
    assert emulation.live() - before < 2**16  # libraries keep tables of a few numbers
    peaks = [
        max(row.get("memory_gib", 0) for row in Run(tmp_path / f"sweep-{name}-s1").metrics())
        for name in ("a", "b")
    ]
    assert peaks[0] == pytest.approx(peaks[1], abs=1e-3)
