"""Base against tuned on held-out pairs, from the saved run alone."""

from __future__ import annotations

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from forging import forge_run
from transformers import AutoConfig, AutoModelForCausalLM

from gapo_lite import compare as compare_module
from gapo_lite.compare import EfGroup, compare, group_by_ef, load_policy
from gapo_lite.errors import ConfigError, ModelError, RunError


@pytest.fixture(scope="module")
def run(tiny_settings, tmp_path_factory):
    return forge_run(tmp_path_factory.mktemp("runs") / "kind", tiny_settings)


@pytest.fixture(scope="module")
def comparison(run):
    return compare(run)


def test_a_comparison_is_the_same_every_time_and_for_every_batch_size(run, comparison):
    assert compare(run) == comparison
    for size in (1, 6):
        other = compare(run, batch_size=size)
        for side in ("base", "tuned"):
            expected = getattr(comparison, side)
            assert getattr(other, side) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_base_is_the_model_without_the_adapter(run, comparison, monkeypatch):
    """A policy whose adapter is 0 gives the same numbers on both sides: the base's."""
    real = compare_module.load_policy

    def without_adapter(*args):
        policy = real(*args)
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.data.zero_()
        return policy

    monkeypatch.setattr(compare_module, "load_policy", without_adapter)
    plain = compare(run)
    assert plain.base == plain.tuned == comparison.base
    assert comparison.tuned["logps/chosen"] != pytest.approx(plain.base["logps/chosen"], abs=1e-2)


def test_a_comparison_says_what_it_is_of(comparison):
    assert (comparison.run, comparison.step, comparison.num_pairs) == ("kind", 4, 6)
    assert (comparison.objective, comparison.metric, comparison.gamma) == ("gapo", "rougeL", 0.3)
    assert comparison.target_reward_margin == pytest.approx(10 * comparison.target_margin)
    for side in (comparison.base, comparison.tuned):
        assert side["margin/mean"] == comparison.target_margin
        assert side["rewards/chosen"] == pytest.approx(10 * side["logps/chosen"], rel=1e-5)


def test_deciles_add_up_to_the_whole(comparison):
    groups = comparison.by_ef
    assert sum(group.num_pairs for group in groups) == comparison.num_pairs
    mean = sum(group.num_pairs * group.tuned_accuracy for group in groups) / comparison.num_pairs
    assert mean == pytest.approx(comparison.tuned["rewards/accuracies"])
    assert all(group.low <= group.high for group in groups)
    assert all(a.high < b.low for a, b in pairwise(groups))


def test_the_padded_layout_gives_the_same_numbers(tiny_settings, comparison, tmp_path):
    run = forge_run(tmp_path / "padded", tiny_settings, "training.layout=padded")
    assert compare(run).tuned == pytest.approx(comparison.tuned, rel=1e-3, abs=1e-3)


def test_progress_counts_both_passes(run):
    seen = []
    compare(run, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 12), (6, 12), (10, 12), (12, 12)]


def test_changed_data_are_pointed_out(tiny_settings, comparison, tmp_path, caplog):
    run = forge_run(tmp_path / "old", tiny_settings)
    run.write("margins.json", {"mean_gap": 0.5, "heldout": {"num_pairs": 6}})
    with caplog.at_level(logging.WARNING, "gapo_lite"):
        assert compare(run).tuned == comparison.tuned
    assert "The data of old have changed since it was trained" in caplog.text


def test_twenty_pairs_make_ten_groups_of_two():
    ef = np.arange(20)[::-1] / 20
    base, tuned = np.zeros(20, bool), np.ones(20, bool)
    tuned[-1] = False  # the pair with EF 0
    groups = group_by_ef(ef, base, tuned)
    assert [group.num_pairs for group in groups] == [2] * 10
    assert groups[0] == EfGroup(0.0, 0.05, 2, 0.0, 0.5)
    assert groups[9] == EfGroup(0.9, 0.95, 2, 0.0, 1.0)


def test_equal_factors_are_never_torn_apart():
    hits = np.array([True, False, True, False])
    assert group_by_ef(np.array([0.5] * 4), hits, ~hits) == [EfGroup(0.5, 0.5, 4, 0.5, 0.5)]
    groups = group_by_ef(np.array([0.0, 0.0, 1.0, 1.0]), hits, hits)
    assert [(group.low, group.num_pairs) for group in groups] == [(0.0, 2), (1.0, 2)]


def test_an_objective_without_evaluation_factor_has_no_deciles(tiny_settings, tmp_path):
    run = forge_run(tmp_path / "simpo", tiny_settings, "objective.name=simpo")
    found = compare(run)
    assert found.by_ef == []
    assert found.target_margin == pytest.approx(0.3)


def test_a_run_that_holds_nothing_out_says_so(tiny_settings, tmp_path):
    overrides = ("data.heldout_source=null", "data.heldout_fraction=0")
    run = forge_run(tmp_path / "all", tiny_settings, *overrides)
    with pytest.raises(ConfigError, match="holds no pairs out"):
        compare(run)


def test_a_run_that_has_saved_nothing_says_so(tiny_settings, tmp_path):
    run = forge_run(tmp_path / "none", tiny_settings, adapter=False)
    with pytest.raises(RunError, match="no adapter"):
        compare(run)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 32}, r"does not fit .*it was made for .*tiny"),
        ({"num_hidden_layers": 1}, r"another base than .*no place for 14 of its 28 weights"),
    ],
    ids=["half as wide", "half as deep"],
)
def test_an_adapter_for_another_base_is_refused(run, tiny_model, tmp_path, change, says):
    shape = AutoConfig.from_pretrained(tiny_model, **change)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    config = run.config()
    model = config.model.model_copy(update={"name": str(tmp_path)})
    config = config.model_copy(update={"model": model})
    with pytest.raises(ModelError, match=says):
        load_policy(config, run.adapter, "none", torch.float32, torch.device("cpu"))
