"""The benchmarks of the training step run, at a tiny size, and count what they say they count."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from checkout import ROOT
from sweeping import add_cell, forge_sweep, keep_hits
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaForCausalLM

from gapo_lite.batching import pack
from gapo_lite.model import add_adapter, forward_logps, load_base, set_recomputation
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.report import write_report
from gapo_lite.types import TokenizedPair

BENCHMARKS = ROOT / "benchmarks"


def run_benchmark(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(name):
    """A benchmark as a module, importing its neighbours as the script does."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def gpu_8b():
    return imported("gpu_8b")


def pair(prompt, chosen, rejected):
    ids = (np.arange(1, length + 1, dtype=np.int32) for length in (prompt, chosen, rejected))
    return TokenizedPair(*ids, margin=0.3)


@pytest.fixture(scope="module")
def tiny_options(tiny_model):
    """A step of two pairs, in float32."""
    return [
        *("--model", tiny_model, "--data", "embedded:everyday", "--rounds", 1, "--steps", 1),
        *("--micro-batch", 2, "--rank", 2, "--max-length", 48, "--precision", "float32"),
    ]


@pytest.fixture(scope="module")
def training_step_result(tiny_options, tmp_path_factory):
    """What the screen says and what the file holds."""
    file = tmp_path_factory.mktemp("results") / "result.json"
    screen = run_benchmark("training_step.py", *tiny_options, "--json", file)
    return screen, json.loads(file.read_text())


def test_the_training_step_is_measured_beside_trl_and_both_compute_the_same_losses(
    training_step_result,
):
    screen, result = training_step_result
    trl, packed, dequantized = result["measurements"]
    names = [row["contender"] for row in result["measurements"]]
    assert names == ["trl", "packed", "dequantized"]
    assert packed["tokens_per_pair"] == dequantized["tokens_per_pair"] < trl["tokens_per_pair"]
    assert packed["first_loss"] == dequantized["first_loss"]
    for row in (trl, packed, dequantized):
        assert row["pairs_per_second"] == pytest.approx(2 / sum(row["step_seconds"]))
        assert row["above_model_gib"] < row["peak_gib"]
    ratio, of_dequantized = result["ratios"]
    assert ratio["pairs_with_other_tokens"] == of_dequantized["pairs_with_other_tokens"] == 0
    assert abs(ratio["first_loss_difference"]) < 1e-3
    assert ratio["peak_gib"]["rounds"] == [packed["peak_gib"] / trl["peak_gib"]]
    assert result["machine"]["torch"] == torch.__version__
    assert "GaPO-Lite packed / TRL, 2 pairs a step" in screen


def test_the_padded_ablation_reads_as_many_tokens_as_trl_and_has_its_loss(
    training_step_result, tiny_options
):
    training_step = imported("training_step")
    options = training_step.parse_options([str(value) for value in tiny_options])
    padded = training_step.measure("padded", options)
    trl, *_ = training_step_result[1]["measurements"]
    assert padded["tokens_per_pair"] == trl["tokens_per_pair"]
    assert padded["first_loss"] == pytest.approx(trl["first_loss"], abs=1e-3)


def test_losses_that_disagree_on_the_same_tokens_end_the_benchmark(training_step_result):
    training_step = imported("training_step")
    ratio = {**training_step_result[1]["ratios"][0], "first_loss_difference": 0.01}
    with pytest.raises(SystemExit, match="do not compute the same"):
        training_step._check_losses([ratio], tolerance=1e-3)
    training_step._check_losses([{**ratio, "first_step_has_same_tokens": False}], tolerance=1e-3)


def test_the_growth_of_cost_is_measured_on_the_same_tokens_and_drawn(
    tiny_model, tmp_path, monkeypatch
):
    step_cost = imported("step_cost")
    monkeypatch.setattr(step_cost, "_in_subprocess", step_cost.measure)
    file, figure = tmp_path / "result.json", tmp_path / "figure.png"
    step_cost.main(
        [
            *("--model", str(tiny_model), "--data", "embedded:everyday", "--longest", "64"),
            *("--steps", "1", "--json", str(file), "--figure", str(figure)),
        ]
    )
    rows = json.loads(file.read_text())["measurements"]
    assert len(rows) == 2 * 11  # 13 points, of which one is in all three
    for trl, ours in zip(rows[::2], rows[1::2], strict=True):
        assert (trl["contender"], ours["contender"]) == ("trl", "packed")
        assert trl["first_loss"] == pytest.approx(ours["first_loss"], abs=0.05)  # bfloat16
    assert len({row["first_loss"] for row in rows[1::2]}) == 11
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_pairs_are_cut_to_exactly_the_lengths_of_a_point(tiny_model):
    step_cost = imported("step_cost")
    options = step_cost._options(["--model", str(tiny_model), "--data", "embedded:everyday"])
    pairs = step_cost.cut_pairs(options, step_cost.Point(2, 30, 34), 3, 0.3)
    assert [pair.lengths for pair in pairs] == [(30, 34, 34)] * 3
    assert len({pair.chosen_ids.tobytes() for pair in pairs}) == 3
    axes = step_cost.points(1024)
    assert len(set(axes["pairs a batch"]) & set(axes["prompt share"])) == 1
    for axis, of_axis in axes.items():
        places = [step_cost.position(axis, point) for point in of_axis]
        assert places == sorted(set(places))


@pytest.fixture
def in_this_process(gpu_8b, monkeypatch):
    """A turn's cases without a process of its own."""
    monkeypatch.setattr(gpu_8b, "run_turn", lambda turn, options, _: gpu_8b.work(turn, options))
    monkeypatch.setattr(gpu_8b, "BUDGETS", (64, 128, 256))


SMALL_8B = ("--tiny", "--steps", "2", "--warmup", "1", "--micro-batch", "2", "--batch", "4")


def test_the_8b_benchmark_measures_all_contenders_on_one_tiny_model(tmp_path):
    """Each in a process of its own, and Unsloth, which is not here, with the reason."""
    file = tmp_path / "result.json"
    screen = run_benchmark("gpu_8b.py", *SMALL_8B, "--parts", "trl", "--rounds", 1, "--json", file)
    result = json.loads(file.read_text())["trl"]
    *others, absent, same = sorted(result["measurements"], key=lambda row: "failed" in row)
    cases = [(row["contender"], row["recomputed"]) for row in others]
    assert cases == [("trl", 1), ("trl", 0), ("gapo-lite", 1), ("gapo-lite", 0)]
    assert all(len(row["step_seconds"]) == 2 for row in others)
    assert all(0 < row["useful"] <= row["busy"] for row in others)
    assert len({row["first_loss"] for row in others}) <= 2  # the adapter starts anew
    for row in (absent, same):  # with and without recomputation
        assert row["contender"] == "unsloth"
        assert "not installed" in row["failed"]
    beside_trl = [ratio for ratio in result["ratios"] if ratio["other"] == "trl"]
    assert all(abs(ratio["first_loss_difference"]) < 1e-3 for ratio in beside_trl)
    assert len(beside_trl) == 2
    assert "times the pairs/s" in screen


def test_a_line_for_each_lever_with_what_was_predicted(gpu_8b, in_this_process, tmp_path, capsys):
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"caps": "of an earlier call"}))
    gpu_8b.main([*SMALL_8B, "--parts", "levers", "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["caps"] == "of an earlier call"
    rows = {row["lever"]: row for row in result["levers"]["measurements"]}
    assert list(rows) == [
        *("none", "packed", "8,192 tokens a pass", "half recomputed", "nothing recomputed"),
        *("tiles of 4,096 rows", "offloaded", "dequantised", "fused layers"),
        *("all that is faster", "Liger's kernels"),
    ]
    assert "GPU" in rows.pop("Liger's kernels")["failed"]
    none = rows["none"]
    for row in rows.values():
        assert row["predicted_pairs_per_second"] > 0
        assert row["predicted_peak_gib"] > 0
        assert row["first_loss"] == pytest.approx(none["first_loss"], abs=0.05)  # bfloat16
    assert none["step_passes"] == [2, 2]
    assert rows["8,192 tokens a pass"]["step_passes"] == [1, 1]
    assert rows["packed"]["tokens_per_pair"] < none["tokens_per_pair"]
    assert rows["nothing recomputed"]["step_flops"] < rows["half recomputed"]["step_flops"]
    assert rows["half recomputed"]["step_flops"] < none["step_flops"]
    screen = capsys.readouterr().out
    assert "not measured" in screen
    assert "predicted peak" in screen


def test_a_card_s_budgets_end_with_the_first_that_does_not_fit(
    gpu_8b, in_this_process, monkeypatch, tmp_path
):
    """As if memory ran out above 128 tokens a pass: the trainer goes on in halves, the cap ends."""
    trainer = gpu_8b.common.RecordedGapoTrainer
    collate = trainer.training_step

    def with_little_memory(self, model, inputs, *args, **kwargs):
        if (self.limits.tokens or 0) > 128:
            self.limits = self.limits.halved([64, 64])
        return collate(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", with_little_memory)
    file = tmp_path / "result.json"
    gpu_8b.main([*SMALL_8B, "--parts", "caps", "--caps-gib", "12", "16", "--json", str(file)])
    rows = json.loads(file.read_text())["caps"]["measurements"]
    found = [(row["cap_gib"], row["tokens"], bool(row["cut_to"])) for row in rows]
    assert found == [
        *((12, 64, False), (12, 128, False), (12, 256, True)),
        *((16, 64, False), (16, 128, False), (16, 256, True)),
    ]
    assert all(row["recomputed"] == 1 for row in rows)


def test_a_contender_that_runs_out_of_memory_is_recorded_and_the_others_are_measured(
    gpu_8b, in_this_process, monkeypatch, tmp_path, capsys
):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr(gpu_8b.common.CPOTrainer, "concatenated_forward", no_memory)
    file = tmp_path / "result.json"
    gpu_8b.main(
        [
            *("--tiny", "--parts", "trl", "--contenders", "trl", "gapo-lite", "--rounds", "2"),
            *("--checkpointing", "off", "--micro-batch", "1", "--json", str(file)),
            *("--steps", "4", "--warmup", "1", "--seconds-per-case", "0"),
        ]
    )
    result = json.loads(file.read_text())["trl"]
    ours = [row for row in result["measurements"] if row["contender"] == "gapo-lite"]
    assert [len(row["step_seconds"]) for row in ours] == [1, 1]  # its time was up
    assert [row.get("out_of_memory") for row in result["measurements"]] == [
        *("CUDA out of memory. Tried to allocate 9.00 GiB.", None),
        *("CUDA out of memory. Tried to allocate 9.00 GiB.", None),
    ]
    assert result["ratios"] == [{"pairs": 1, "recomputed": 0.0, "other": "trl"}]
    assert "not both of them ran" in capsys.readouterr().out


@pytest.fixture
def forged_turn(gpu_8b, monkeypatch, tmp_path):
    """Rows of a levers' turn whose process runs these lines at every case, all but its end forged;
    with the number of processes that it took."""

    def rows(lines, *, before="", minutes=1.0):
        script = tmp_path / "gpu_8b.py"
        starts = tmp_path / "starts"
        script.write_text(
            "import json, os, sys, time\n"
            f"open({str(starts)!r}, 'a').write('x')\n"
            f"print('a library greets')\n{before}\nprint({gpu_8b.READY!r}, flush=True)\n"
            "for case in json.loads(sys.argv[2])['cases']:\n"
            f"    {lines}\n"
            "    print(json.dumps(case), flush=True)\n"
        )
        monkeypatch.setattr(gpu_8b, "__file__", str(script))
        options = gpu_8b._options(["--tiny"])
        turn = next(gpu_8b.lever_turns(options))
        deadline = time.monotonic() + minutes * 60
        return list(gpu_8b.run_turn(turn, options, deadline)), len(starts.read_text())

    return rows


def test_a_case_whose_process_dies_is_a_line_with_its_last_words_and_the_others_go_on(forged_turn):
    rows, processes = forged_turn(
        "if case['lever'] == 'packed': raise RuntimeError('no kernel\\nSet X to learn more')\n"
        "    if case['lever'] == 'dequantised': os.kill(os.getpid(), 9)"
    )
    failed = {row["lever"]: row["failed"] for row in rows if "failed" in row}
    assert failed == {"packed": "RuntimeError: no kernel", "dequantised": "killed by SIGKILL"}
    assert len(rows) == 8
    assert processes == 2


def test_a_model_that_cannot_be_built_fails_all_cases_of_its_turn_at_once(forged_turn):
    rows, processes = forged_turn("", before="sys.exit('no such kernel')")
    assert [row["failed"] for row in rows] == ["no such kernel"] * 8
    assert processes == 1


def test_a_turn_is_stopped_when_the_minutes_are_over(gpu_8b, forged_turn):
    began = time.monotonic()
    rows, _ = forged_turn("if case['lever'] == 'packed': time.sleep(60)", minutes=1 / 60)
    assert time.monotonic() - began < 10
    assert [row.get("failed") for row in rows] == [None, *[gpu_8b.LEFT_OUT] * 7]
    rows, _ = forged_turn("", minutes=0)
    assert [row["failed"] for row in rows] == [gpu_8b.LEFT_OUT] * 8


def test_liger_is_asked_for_before_a_model_is_built(gpu_8b, monkeypatch):
    monkeypatch.setattr(gpu_8b, "find_spec", lambda name: None)
    options = gpu_8b._options(["--tiny"])
    *_, turn = gpu_8b.lever_turns(options)
    (row,) = gpu_8b.run_turn(turn, options, deadline=0.0)
    assert row["failed"] == "not installed: requirements-liger.txt"


def test_what_was_left_out_does_not_replace_what_an_earlier_call_measured(gpu_8b, tmp_path):
    path = tmp_path / "new" / "result.json"
    case = {"contender": "gapo-lite", "pairs": 2, "recomputed": 1.0, "lever": "", "round": 1}
    measured, left_out = case | {"failed": "crashed"}, case | {"failed": gpu_8b.LEFT_OUT}
    gpu_8b.ResultFile(path, {}, {}).write("trl", [left_out, left_out], ended=True)
    assert len(json.loads(path.read_text())["trl"]["measurements"]) == 2
    for rows, complete in (([measured, left_out], False), ([measured], True), ([left_out], True)):
        file = gpu_8b.ResultFile(path, {}, {})
        file.write("trl", rows, ended=False)
        file.write("trl", rows, ended=True)
        assert json.loads(path.read_text())["trl"]["complete"] is complete
    assert json.loads(path.read_text())["trl"]["measurements"] == [measured]


def test_the_random_model_is_one_that_others_load(gpu_8b, tmp_path):
    """As Unsloth gets it: the same 4 bits from a folder."""
    model = gpu_8b.gpu_model
    base = model.random_base(model.TINY, torch.device("cpu"), torch.float32, seed=0)
    model.save_base(base, tmp_path, torch.float32)
    loaded = load_base(str(tmp_path), quantization="nf4", dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(loaded(ids).logits, base(ids).logits, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == "<pad>"


def test_the_work_of_a_pair_is_counted_from_its_lengths(gpu_8b):
    batch = [pair(3, 2, 1), pair(1, 1, 1)]
    # packed: 6 + 3 tokens; 3 + 2 scored; keys 15 + 3 + 1 and 3 + 1 + 1
    assert gpu_8b.processed(batch, "packed") == (9, 5, 24)
    # padded: 4 rows of 5; 15 keys a row; all of them through the head, or those that count
    assert gpu_8b.processed(batch, "full logits") == (20, 20, 60)
    assert gpu_8b.processed(batch, "padded") == (20, 5, 60)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_counted_operations_are_those_that_pytorch_counts(gpu_8b, checkpointing):
    batch = [pair(5, 8, 6), pair(7, 3, 9)]
    quantised = gpu_8b.gpu_model.random_base(
        gpu_8b.gpu_model.TINY, torch.device("cpu"), torch.float32, seed=0
    )
    base = LlamaForCausalLM(quantised.config).requires_grad_(False)  # 4-bit products are not seen
    base.set_attn_implementation(gpu_8b.SHARED_PREFIX)
    policy = add_adapter(base, rank=gpu_8b.RANK)
    set_recomputation(policy, float(checkpointing))
    policy.enable_input_require_grads()  # else the first layer spares itself a part
    with FlopCounterMode(display=False) as counter:
        logps = forward_logps(policy, pack(batch))
        (logps.chosen_avg - logps.rejected_avg).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    attention = gpu_8b.gpu_model.attention_flops(base.config, batch, "packed", checkpointing)
    total = gpu_8b.executed_flops(base.config, batch, "packed", checkpointing)
    # recomputation stops before the last product of a block, B of down_proj's adapter
    spared = 2 * 38 * gpu_8b.RANK * 64 * 2 if checkpointing else 0  # 38 tokens, 64 wide, 2 layers
    assert products == total - attention - spared


def test_the_synthetic_pairs_have_the_lengths_that_are_asked_for(gpu_8b):
    pairs = gpu_8b.gpu_model.synthetic_pairs(gpu_8b.gpu_model.LLAMA_3_8B, 500, seed=0)
    prompts = np.array([len(p.prompt_ids) for p in pairs])
    chosen = np.array([len(p.chosen_ids) for p in pairs])
    rejected = np.array([len(p.rejected_ids) for p in pairs])
    assert prompts.mean() == pytest.approx(170, rel=0.1)
    assert chosen.mean() == pytest.approx(400, rel=0.1)
    assert np.corrcoef(np.log(chosen), np.log(rejected))[0, 1] == pytest.approx(0.8, abs=0.05)
    assert (prompts + np.maximum(chosen, rejected)).max() <= 2048


# -- objectives --


def test_the_documentation_of_the_objectives_is_what_code_and_measurements_say():
    objectives = imported("objectives")
    result = json.loads(objectives.RESULTS.read_text())
    assert list(result["objectives"]) == list(OBJECTIVES)
    written = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert written == objectives.document(result)
    for name, spec in OBJECTIVES.items():
        assert f"| `{name}` | {spec.formula.replace('|', chr(92) + '|')} |" in written


def test_every_objective_has_been_seen_to_learn():
    result = json.loads(imported("objectives").RESULTS.read_text())
    assert result["steps"] == 30
    assert all(record["rose"] for record in result["objectives"].values())
    assert result["dpo_against_simpo"]["median"] <= 1.1


def test_the_table_of_objectives_is_measured(tiny_model, tmp_path):
    out = run_benchmark(
        "objectives.py",
        *("--only", "kto", "--steps", 8, "--rounds", 1),
        *("--set", f"model.name={tiny_model}", "--set", "model.precision=float32"),
        *("--set", "data.max_pairs=8", "--set", "training.learning_rate=0.01"),
        *("--json", tmp_path / "out.json"),
    )
    assert "kto" in out
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["objectives"].keys() == {"kto"}
    for record in result["objectives"].values():
        assert record["seconds_a_pair"] > 0
        assert record["memory_gib"] > 0.1
    assert len(result["dpo_against_simpo"]["ratios"]) == 1


def test_a_sweep_s_kept_numbers_make_the_same_report_without_local_paths(tmp_path, monkeypatch):
    results, folder = imported("results"), forge_sweep(tmp_path / "runs", settings={})
    for seed in (1, 2, 3):
        for contender in ("simpo", "gapo"):
            add_cell(folder, contender, seed)
            keep_hits(folder, contender, seed, [True, False, seed > 1])
    kept = results.kept(folder, tmp_path / "kills.jsonl")
    assert str(tmp_path) not in json.dumps(kept)
    report = write_report(folder)[1].read_text(encoding="utf-8")
    assert results.report_of(kept) in report
    assert "gapo" in results.report_of(kept)


def test_the_pages_of_results_are_what_was_measured():
    results = imported("results")
    pages = results.documents()
    assert list(pages) == ["results.md", "tuning.md"]
    for name, text in pages.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text


def test_contenders_of_two_sweeps_stand_in_one_table(tmp_path):
    """And the baseline may come from the other one."""
    results, kept = imported("results"), {}
    contenders = {"first": {"simpo": 0.5, "gapo": 0.6}, "second": {"linear": 0.7, "slow": 0.8}}
    rate = {"training.learning_rate": 1e-3}
    own = {"simpo": {"objective.name": "simpo"}, "linear": {"margin.mapping": "linear"}}
    own["slow"] = {"training.learning_rate": 1e-5}
    for name, accuracies in contenders.items():
        settings = rate if name == "first" else {}
        variants = {key: ({} if settings else rate) | own.get(key, {}) for key in accuracies}
        baseline = next(iter(accuracies))
        folder = forge_sweep(
            tmp_path, name, contenders=variants, baseline=baseline, settings=settings
        )
        for contender, accuracy in accuracies.items():
            for seed in (1, 2, 3):
                add_cell(folder, contender, seed, accuracy=accuracy + seed / 100)
                keep_hits(folder, contender, seed, [True, False, seed > 1])
        kept[name] = results.kept(folder, tmp_path / "none")
    records = [kept["first"], kept["second"]]
    both = results.chosen(records, ("simpo", "gapo", "linear"))
    settings = both["sweep"]["sweep.yaml"]
    assert settings["settings"] == rate  # all three have it
    assert settings["variants"][-1] == {"name": "linear", "settings": {"margin.mapping": "linear"}}
    assert settings["baseline"] == "simpo"
    report = results.report_of(both)
    assert "3 contenders on 3 seeds" in report
    assert re.search(r"\*\*linear\*\* \|.* 72\.0", report)
    assert "slow" not in report
    moved = results.chosen(records, ("gapo", "linear", "slow"))
    settings = moved["sweep"]["sweep.yaml"]
    assert settings["baseline"] == "gapo"
    assert settings["settings"] == {}  # the rates differ
    assert settings["variants"][0] == {"name": "gapo", "settings": rate}
    report = results.report_of(moved)
    assert re.search(r"\*\*gapo\*\* \(baseline\) \|.* 62\.0", report)
    assert "simpo" not in report
    results.write_kept(both, tmp_path / "kept.json")
    assert json.loads((tmp_path / "kept.json").read_text()) == both


def test_the_numbers_of_the_pages_are_of_kills_and_seeds_and_name_nothing_local():
    results = imported("results")
    for name, contenders in (("results", 9), ("tuning", 11)):
        record = json.loads((results.KEPT / f"sweep_{name}.json").read_text())
        cells = [run["cell"] for run in record["runs"]]
        assert all(cell["state"] == "finished" for cell in cells)
        seeds = Counter(cell["contender"] for cell in cells)
        assert len(seeds) == contenders
        assert set(seeds.values()) == {3}
        assert len(record["kills"]) >= 2
        assert all(kill["done"] < len(cells) for kill in record["kills"])
        assert record["wall_s"] < 4 * 3600
        assert not re.search(r"/(var|tmp|work|home|root)/", json.dumps(record))
