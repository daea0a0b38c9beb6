"""Objectives at work in training: the reference, statistics of a step, and margins from ratings."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from forging import numbers, randomize_adapter, run_of, settings_with
from typer.testing import CliRunner

from gapo_lite import cli
from gapo_lite import loss as loss_module
from gapo_lite import reference as reference_module
from gapo_lite.batching import pack, pad
from gapo_lite.compare import compare
from gapo_lite.config import ModelConfig, ObjectiveConfig, parse_config
from gapo_lite.errors import DataError
from gapo_lite.loss import PairLoss
from gapo_lite.model import add_adapter, forward_logps, load_base, load_tokenizer, why_not_packed
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.preparation import prepare
from gapo_lite.reference import with_reference
from gapo_lite.run_callback import RunCallback

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """So that every test computes its own references."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("GAPO_LITE_CACHE", str(cache))
    return cache


@pytest.fixture(scope="module")
def policy(tiny_model):
    """An adapter that says something else than its base."""
    base = load_base(str(tiny_model), quantization="none", dtype=torch.float32)
    model = add_adapter(base, rank=4, dropout=0.5)
    randomize_adapter(model, 0.1)
    assert why_not_packed(model) == ""
    return model


@pytest.fixture(scope="module")
def pairs(tiny_settings, tiny_model):
    settings = settings_with(tiny_settings, objective={"name": "kto"})
    return prepare(parse_config(settings), load_tokenizer(str(tiny_model))).train.tokenized.pairs


def referenced(policy, pairs, model, **more):
    how = {"model": model, "batch_size": 5, "device": CPU} | more
    return with_reference(policy, pairs, pack, **how)


# -- the reference --


def test_the_reference_is_the_model_without_adapter_and_dropout(policy, pairs, tiny_model):
    found = referenced(policy, pairs, ModelConfig(name=str(tiny_model)))
    bare = load_base(str(tiny_model), quantization="none", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = forward_logps(bare, pad(pairs, pad_id=0))
        others = forward_logps(bare, pad([pair.mismatched for pair in pairs], pad_id=0))
    for logps, some in ((expected, found), (others, [pair.mismatched for pair in found])):
        sums = torch.tensor([pair.reference for pair in some])
        torch.testing.assert_close(sums[:, 0], logps.chosen, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sums[:, 1], logps.rejected, rtol=1e-5, atol=1e-4)
    assert policy.training
    tuned = forward_logps(policy.eval(), pack(found))
    policy.train()
    assert (tuned.chosen - expected.chosen).abs().min() > 1e-3
    torch.testing.assert_close(tuned.ref_chosen, expected.chosen, rtol=1e-5, atol=1e-4)


def test_the_reference_is_computed_once_for_the_same_tokens_and_model(
    policy, pairs, tiny_model, own_cache, monkeypatch
):
    model = ModelConfig(name=str(tiny_model))
    first = referenced(policy, pairs, model)

    def never(*args):
        raise AssertionError("it was computed again")

    monkeypatch.setattr(reference_module, "forward_pairs", never)
    again = referenced(policy, pairs, model, batch_size=2)
    assert [pair.reference for pair in again] == [pair.reference for pair in first]
    for changed in (pairs[:-1], [pairs[1], pairs[0], *pairs[2:]]):
        with pytest.raises(AssertionError, match="computed again"):
            referenced(policy, changed, model)
    with pytest.raises(AssertionError, match="computed again"):
        referenced(policy, pairs, model.model_copy(update={"quantization": "none"}))
    (kept,) = (own_cache / "reference").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="computed again"):
        referenced(policy, pairs, model)


def test_an_epoch_with_the_reference_in_the_cache_costs_as_many_forward_passes_as_one_without(
    tiny_settings, tmp_path, monkeypatch
):
    passes = []
    real = loss_module.forward_logps

    def counted(model, batch, **wanted):
        passes.append(len(batch))
        return real(model, batch, **wanted)

    monkeypatch.setattr(loss_module, "forward_logps", counted)
    counts = {}
    for name in ("simpo", "dpo", "on_the_fly"):
        objective = {"name": name} if name != "on_the_fly" else {"name": "dpo", "reference": name}
        run_of(settings_with(tiny_settings, objective=objective), tmp_path, name=name)
        counts[name] = len(passes)
        passes.clear()
    assert counts["dpo"] == counts["simpo"]
    first_evaluation = 2  # batches, which the others read from the cache
    assert counts["on_the_fly"] == 2 * (counts["simpo"] + first_evaluation)


def test_the_reference_on_the_fly_gives_the_same_training(tiny_settings, tmp_path):
    runs = [
        run_of(
            settings_with(tiny_settings, objective={"name": "dpo", "reference": how, "beta": 0.1}),
            tmp_path,
            name=how,
        )
        for how in ("cached", "on_the_fly")
    ]
    for ours, theirs in zip(*map(numbers, runs), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert numbers(runs[0])[0]["eval/rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert numbers(runs[0])[-1]["eval/rewards/margins"] > 0.05


def test_base_and_tuned_are_compared_with_the_reference(tiny_settings, tmp_path):
    settings = settings_with(tiny_settings, objective={"name": "dpo", "beta": 0.1})
    run = run_of(settings, tmp_path, name="dpo")
    found = compare(run)
    assert found.base["rewards/margins"] == pytest.approx(0, abs=1e-4)
    last = numbers(run)[-1]
    for key in ("loss", "rewards/margins", "logps/chosen"):
        assert found.tuned[key] == pytest.approx(last[f"eval/{key}"], rel=1e-3, abs=1e-4)
    assert found.by_ef == []


def test_a_run_without_a_margin_is_compared_listed_and_exported(
    tiny_settings, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    out = str(tmp_path / "out")
    run_of(settings_with(tiny_settings, objective={"name": "kto"}), tmp_path, name="kto")
    for command in (["evaluate", "kto"], ["runs"], ["export", "kto", "--adapter", "--out", out]):
        result = CliRunner().invoke(cli.app, [*command, "--runs-dir", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert "None" not in result.output
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| objective | kto |" in card
    assert "| objective.desirable_weight | 1 |" in card
    assert "None" not in card
    assert "γ" not in card


# -- statistics of a step --


def test_kto_estimates_its_divergence_on_other_pairs_responses(policy, pairs, tiny_model):
    for pair, following in pairwise(pairs):
        assert pair.mismatched is not None
        np.testing.assert_array_equal(pair.mismatched.prompt_ids, pair.prompt_ids)
        np.testing.assert_array_equal(pair.mismatched.chosen_ids, following.chosen_ids)
    np.testing.assert_array_equal(pairs[-1].mismatched.rejected_ids, pairs[0].rejected_ids)

    some = referenced(policy, pairs[:8], ModelConfig(name=str(tiny_model)))
    loss = PairLoss(ObjectiveConfig(name="kto", beta=0.1))
    loss.look_at(policy, some, pack, 3, CPU)
    with torch.no_grad():
        policy.eval()
        others = forward_logps(policy, pack([pair.mismatched for pair in some]))
        logps = forward_logps(policy, pack(some))
        policy.train()
    z = torch.cat((others.chosen_ratio, others.rejected_ratio)).mean().clamp(min=0)
    output = loss(logps, torch.zeros(8))
    expected = (1 - torch.sigmoid(0.1 * (logps.chosen_ratio - z))) + (
        1 - torch.sigmoid(0.1 * (z - logps.rejected_ratio))
    )
    torch.testing.assert_close(output.losses, expected, rtol=1e-4, atol=1e-5)


def test_kto_without_other_pairs_responses_is_refused(policy, pairs):
    bare = [replace(pair, mismatched=None) for pair in pairs]
    with pytest.raises(DataError, match="other pairs' responses"):
        PairLoss(ObjectiveConfig(name="kto")).look_at(policy, bare, pack, 4, CPU)


def test_mismatched_responses_are_cut_to_what_the_prompt_leaves_room_for(tiny_settings, tiny_model):
    settings = settings_with(
        tiny_settings, objective={"name": "kto"}, data={"max_length": 64, "max_prompt_length": 32}
    )
    prepared = prepare(parse_config(settings), load_tokenizer(str(tiny_model)))
    found = [pair.mismatched for pair in prepared.train.tokenized.pairs]
    lengths = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in found]
    assert max(lengths) == 64
    assert min(len(p.chosen_ids) for p in found) > 0


@pytest.mark.parametrize("name", ["kto", "beta_dpo"])
def test_a_steps_statistic_is_that_of_all_its_micro_batches(tiny_settings, tmp_path, name):
    runs = [
        run_of(
            settings_with(
                tiny_settings,
                objective={"name": name, "beta": 0.1},
                lora={"dropout": 0.0},
                training={"batch_size": 8, "micro_batch_size": size, "max_steps": 4},
            ),
            tmp_path,
            name=f"micro-{size}",
        )
        for size in (1, 8)
    ]
    for ours, theirs in zip(*map(numbers, runs), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)


def test_beta_dpo_follows_the_running_mean_of_the_gap(policy, pairs, tiny_model):
    some = referenced(policy, pairs, ModelConfig(name=str(tiny_model)))
    config = ObjectiveConfig(name="beta_dpo", beta=0.1, beta_gain=0.5, gap_momentum=0.8)
    loss = PairLoss(config)
    policy.eval()
    with torch.no_grad():
        logps = forward_logps(policy, pack(some))
    gap = 0.1 * float((logps.chosen_ratio - logps.rejected_ratio).mean())
    running = 0.0
    for _ in range(3):
        loss.look_at(policy, some, pack, 4, CPU)
        now = max(1e-3, 0.1 * (1 + 0.5 * (gap - running)))
        expected = -torch.nn.functional.logsigmoid(
            now * (logps.chosen_ratio - logps.rejected_ratio)
        )
        actual = loss(logps, torch.zeros(len(some))).losses
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        running = 0.8 * running + 0.2 * gap
        assert loss.running_gap == pytest.approx(running, rel=1e-4)
    before = loss.running_gap
    loss.look_at(policy, some, pack, 4, CPU, is_step=False)
    plain = -torch.nn.functional.logsigmoid(0.1 * (logps.chosen_ratio - logps.rejected_ratio))
    torch.testing.assert_close(loss(logps, torch.zeros(len(some))).losses, plain)
    assert loss.running_gap == before
    policy.train()


@pytest.mark.parametrize("name", ["beta_dpo", "kto", "wpo"])
def test_a_resumed_run_equals_the_uninterrupted_one(tiny_settings, tmp_path, monkeypatch, name):
    settings = settings_with(tiny_settings, objective={"name": name, "beta": 0.1})
    whole = run_of(settings, tmp_path, name="whole")
    real = RunCallback.on_step_end

    def stop(self, args, state, control, **kwargs):
        self.asked_to_stop = state.global_step == 5
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunCallback, "on_step_end", stop)
    cut = run_of(settings, tmp_path, name="cut")
    assert cut.state() == "stopped"
    monkeypatch.setattr(RunCallback, "on_step_end", real)
    run_of(settings, tmp_path, resume="cut")
    assert numbers(cut) == numbers(whole)


# -- every objective --


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_and_learns_the_pairs(tiny_settings, tmp_path, name):
    beta = {"beta": 0.1} if "beta" in OBJECTIVES[name].parameters else {}
    settings = settings_with(
        tiny_settings, objective={"name": name, **beta}, training={"epochs": 6, "eval_steps": 100}
    )
    rows = numbers(run_of(settings, tmp_path, name=name))
    steps = [row for row in rows if "loss" in row]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["rewards/accuracies"] > 0.6
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]


@pytest.mark.parametrize("name", [n for n, spec in OBJECTIVES.items() if "ef" in spec.margins])
def test_every_margin_is_the_pairs_own_and_a_larger_one_asks_for_more(
    tiny_settings, tiny_model, name
):
    objective = {"name": name}
    config = parse_config(
        settings_with(tiny_settings, objective=objective, margin={"source": "ef", "gamma": 2})
    )
    prepared = prepare(config, load_tokenizer(str(tiny_model)))
    margins = np.array([pair.margin for pair in prepared.train.tokenized.pairs])
    assert margins.mean() == pytest.approx(2)
    assert margins.std() > 0.1
    assert "average target margin 2" in prepared.notes[-1]


# -- ratings --


def rated(tmp_path, rows) -> Path:
    path = tmp_path / "rated.jsonl"
    texts = [
        {"prompt": f"Question {i}?", "chosen": f"Good answer {i}.", "rejected": f"Bad {i}."}
        for i in range(len(rows))
    ]
    lines = (json.dumps(text | row) for text, row in zip(texts, rows, strict=True))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def margins_of(tiny_settings, tiny_model, path, columns=(), **margin):
    settings = settings_with(
        tiny_settings,
        objective={"name": "simpo"},
        margin={"source": "rating", "gamma": 0.5, **margin},
        data={
            "source": str(path),
            "heldout_source": None,
            "heldout_fraction": 0,
            "rating_columns": list(columns),
        },
    )
    prepared = prepare(parse_config(settings), load_tokenizer(str(tiny_model)))
    return [pair.margin for pair in prepared.train.tokenized.pairs], prepared.notes[-1]


def test_margins_come_from_the_datas_own_scores(tiny_settings, tiny_model, tmp_path):
    rows = [
        {"chosen_rating": 3, "rejected_rating": 1},
        {"score_chosen": 0.5, "score_rejected": 0.0},
        {
            "all_generated_responses": ["Bad 2.", "Good answer 2."],
            "all_rm_scores": [0.125, 0.625],
        },
    ]  # gaps 2, 0.5, 0.5: mean 1
    found, note = margins_of(tiny_settings, tiny_model, rated(tmp_path, rows))
    assert found == pytest.approx([1.0, 0.25, 0.25])
    assert "differences of ratings" in note
    shifted, _ = margins_of(
        tiny_settings, tiny_model, tmp_path / "rated.jsonl", normalization="shift"
    )
    assert shifted == pytest.approx([1.5, 0.0, 0.0])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_margins_come_from_columns_that_one_names(tiny_settings, tiny_model, tmp_path, kind):
    rows = [{"a": 5, "b": 2, "how much": 1}, {"a": 2, "b": 1, "how much": 3}]
    path = rated(tmp_path, rows)
    if kind != "jsonl":
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(list(map(json.loads, path.read_text().splitlines())))
        path = tmp_path / f"rated.{kind}"
        if kind == "csv":
            pyarrow.csv.write_csv(table, path)
        else:
            pyarrow.parquet.write_table(table, path)
    two, _ = margins_of(tiny_settings, tiny_model, path, ["a", "b"])
    one, _ = margins_of(tiny_settings, tiny_model, path, ["how much"])
    assert two == pytest.approx([0.75, 0.25])
    assert one == pytest.approx([0.25, 0.75])


def test_a_judged_strength_serves_as_the_rating(tiny_settings, tiny_model, tmp_path):
    path = rated(tmp_path, [{"strength": 0.9}, {"strength": 0.3}, {"strength": 0.6}])
    found, note = margins_of(tiny_settings, tiny_model, path, ["strength"])
    assert found == pytest.approx([0.75, 0.25, 0.5])
    assert "differences of ratings" in note


def test_a_pair_without_ratings_has_the_average_margin_and_is_counted(
    tiny_settings, tiny_model, tmp_path
):
    rows = [{"chosen_rating": 4, "rejected_rating": 1}, {}, {"chosen_rating": 2}]
    found, note = margins_of(tiny_settings, tiny_model, rated(tmp_path, rows))
    assert found == pytest.approx([0.5, 0.5, 0.5])
    assert "2 pairs without ratings" in note


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{}, {}], "none of 2 pairs has ratings"),
        ([{"chosen_rating": 1, "rejected_rating": 2}] * 2, "the mean gap is -1"),
    ],
)
def test_ratings_that_give_no_margin_are_refused(tiny_settings, tiny_model, tmp_path, rows, says):
    with pytest.raises(DataError, match=says):
        margins_of(tiny_settings, tiny_model, rated(tmp_path, rows))


@pytest.mark.parametrize("name", ["gapo", "simpo", "dpo", "kto", "wpo"])
def test_the_evaluation_before_any_step_is_that_of_a_forward_pass(
    tiny_settings, tmp_path, monkeypatch, name
):
    """It is read from the cached reference; without that it is computed."""
    settings = settings_with(tiny_settings, objective={"name": name}, training={"max_steps": 1})
    first = run_of(settings, tmp_path)
    monkeypatch.setattr(PairLoss, "untrained_logps", PairLoss.logps)
    second = run_of(settings, tmp_path)
    read, computed = (numbers(run) for run in (first, second))
    assert [row["step"] for row in read] == [row["step"] for row in computed]
    assert read[0]["step"] == 0
    for mine, other in zip(read, computed, strict=True):
        assert mine == pytest.approx(other, abs=1e-5)


def test_runs_of_the_same_pairs_look_at_their_base_once(tiny_settings, tmp_path, monkeypatch):
    counted = []
    inner = reference_module.forward_pairs

    def counting(policy, pairs, *others):
        counted.append(len(pairs))
        return inner(policy, pairs, *others)

    monkeypatch.setattr(reference_module, "forward_pairs", counting)
    monkeypatch.setenv("GAPO_LITE_CACHE", str(tmp_path / "cache"))
    for seed in (1, 2):
        run_of(settings_with(tiny_settings, training={"max_steps": 1, "seed": seed}), tmp_path)
    assert counted == [6]


def test_a_trainer_with_a_trained_adapter_is_evaluated_as_it_is(tiny_settings, tmp_path):
    """Even before its first step, and where pairs bring a reference along."""
    from gapo_lite.trainer import GapoTrainer

    fresh = object.__new__(GapoTrainer)
    config = parse_config(tiny_settings)
    base = load_base(config.model.name, quantization="none", dtype=torch.float32, device="cpu")
    fresh.policy = add_adapter(base, **config.lora.model_dump(), seed=1)
    assert fresh._is_untrained()
    randomize_adapter(fresh.policy, 0.1)
    assert not fresh._is_untrained()
