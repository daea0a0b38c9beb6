"""The command line: what it prints, what it leaves behind, and how it says no."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from checkout import ROOT
from commands import assert_refused, call, write_jsonl
from forging import forge_run, read_jsonl

from gapo_lite import ef, training
from gapo_lite.config import load_config
from gapo_lite.runs import Run
from gapo_lite.terminal import visible

PAIRS = [
    {"prompt": "q1", "chosen": "the cat sat", "rejected": "the cat ran"},
    {"prompt": "q2", "chosen": "yes", "rejected": "yes"},
    {"prompt": "q3", "chosen": "left", "rejected": "right"},
]


@pytest.fixture
def pairs_file(tmp_path):
    return write_jsonl(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture(scope="module")
def config_file(tiny_settings, tmp_path_factory):
    """A YAML of a two-step run of the tiny model."""
    short = {**tiny_settings["training"], "max_steps": 2, "eval_steps": 2, "logging_steps": 1}
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**tiny_settings, "training": short}))
    return path


@pytest.fixture(scope="module")
def trained(config_file, tmp_path_factory):
    """What `gapo-lite train` said, and the run that it left."""
    runs_dir = tmp_path_factory.mktemp("runs")
    result = call("train", config_file, "--set", "margin.gamma=0.5", "--runs-dir", runs_dir)
    return result, Run(runs_dir / "tiny")


# -- the program --


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from typer.testing import CliRunner; from gapo_lite.cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.perf_counter() - start < 1, time.perf_counter() - start"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "name", ["train", "demo", "score", "evaluate", "generate", "chat", "export", "runs", "doctor"]
)
def test_each_command_explains_itself(name):
    result = call(name, "--help")
    assert result.exit_code == 0
    assert f"gapo-lite {name}" in result.stdout or f"root {name}" in result.stdout


@pytest.mark.parametrize("arguments", [["nonsense"], ["score"], ["train", "--nonsense"]])
def test_misuse_exits_with_2(arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_the_module_is_the_program(tmp_path):
    arguments = [sys.executable, "-m", "gapo_lite", "train", str(tmp_path / "no.yaml")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: there is no configuration file {tmp_path / 'no.yaml'}. Recipes lie in configs/.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_bug_keeps_its_traceback(pairs_file, monkeypatch):
    monkeypatch.setattr("gapo_lite.data.load_pairs", lambda *args, **kwargs: 1 / 0)
    result = call("score", pairs_file, "--out", pairs_file.with_suffix(".csv"))
    assert isinstance(result.exception, ZeroDivisionError)


def test_only_the_first_of_several_processes_says_what_all_know(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = call("train", tmp_path / "no.yaml")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "")


def test_control_characters_in_an_error_are_shown():
    assert_refused(call("train", "no\x1b[2J.yaml"), "no␛[2J.yaml")
    assert visible("a\tb\nc\x9b\x7f") == "a\tb\nc�␡"


# -- train --


def test_training_says_where_the_run_is_and_what_comes_next(trained):
    result, run = trained
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"{run.path}: finished, 2 of 2 steps.",
        f"  chat with it             gapo-lite chat {run.path}",
        f"  compare with its base    gapo-lite evaluate {run.path}",
    ]
    assert run.state() == "finished"
    assert "step 2/2 held out: loss" in result.stderr
    assert "Loading" not in result.stderr  # no chatter of the libraries


def test_overrides_reach_the_run(trained, config_file):
    _, run = trained
    assert run.config() == load_config(config_file, ["margin.gamma=0.5"])


def test_evaluate_finds_the_numbers_that_training_logged(trained, tmp_path):
    _, run = trained
    arguments = ["evaluate", "tiny", "--runs-dir", run.path.parent]
    result = call(*arguments, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "e.json").read_text())
    first, last = (row for row in run.metrics() if "eval/loss" in row)
    for key, value in found["base"].items():
        assert value == pytest.approx(first[f"eval/{key}"], rel=1e-5, abs=1e-6)
    for key, value in found["tuned"].items():
        assert value == pytest.approx(last[f"eval/{key}"], rel=1e-5, abs=1e-6)
    assert found["base"]["loss"] != found["tuned"]["loss"]
    assert (found["num_pairs"], found["step"], found["gamma"]) == (6, 2, 0.5)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("tiny, step 2: gapo, γ 0.5")
    accuracy = next(line for line in lines if "held-out accuracy" in line).split()
    assert accuracy[2] == f"{found['base']['rewards/accuracies']:.1%}"
    assert accuracy[3] == f"{found['tuned']['rewards/accuracies']:.1%}"
    assert any("accuracy by rougeL" in line for line in lines)
    assert call(*arguments).stdout == result.stdout


def test_the_demo_trains_compares_and_lets_both_answer(tiny_settings, tmp_path):
    short = {
        **tiny_settings["training"],
        "max_steps": 1,
        "sample_prompts": ["Why is the sky blue?"],
    }
    (tmp_path / "d.yaml").write_text(yaml.safe_dump({**tiny_settings, "training": short}))
    result = call("demo", tmp_path / "d.yaml", "--runs-dir", tmp_path / "runs")
    assert result.exit_code == 0, result.stderr
    assert "held-out accuracy" in result.stdout
    assert "\nprompt: Why is the sky blue?\nbase:   " in result.stdout
    assert "\ntuned:  " in result.stdout
    assert f"gapo-lite chat {tmp_path / 'runs' / 'd'}\n" in result.stdout


def test_a_finished_run_has_nothing_to_go_on_with(trained, config_file):
    _, run = trained
    before = sorted(run.path.rglob("*"))
    assert_refused(call("train", "--resume", run.path), "nothing to go on with", "gapo-lite chat")
    same = ["train", config_file, "--set", "margin.gamma=0.5", "--resume", run.path]
    assert_refused(call(*same), "nothing to go on with")
    assert sorted(run.path.rglob("*")) == before


def test_resuming_with_other_settings_names_them_all(trained, config_file):
    _, run = trained
    result = call(
        *("train", config_file, "--resume", run.name, "--runs-dir", run.path.parent),
        *("--set", "objective.beta=2", "--set", "training.seed=7"),
    )
    assert_refused(
        result,
        "  margin.gamma: the run has 0.5, given is 0.3\n",
        "  objective.beta: the run has 10.0, given is 2.0\n",
        "  training.seed: the run has 42, given is 7\n",
        f"gapo-lite train --resume {run.path}",
    )
    assert result.stderr.count("the run has") == 3


def test_a_stopped_run_goes_on_with_its_own_settings_and_exits_as_interrupted(
    tiny_settings, tmp_path, monkeypatch
):
    run = forge_run(tmp_path / "part", tiny_settings)
    run.write("status.json", {**run.read("status.json"), "state": "stopped", "step": 2})
    given = {}

    def train(config, **kwargs):
        given.update(kwargs, config=config)
        return run

    monkeypatch.setattr(training, "train", train)
    result = call("train", "--resume", "part", "--runs-dir", tmp_path, "--set", "margin.gamma=0.3")
    assert given["config"] == run.config()
    assert (given["resume"], given["name"]) == ("part", None)
    assert result.exit_code == 130
    assert f"{run.path}: stopped, 2 of 4 steps." in result.stdout
    assert f"gapo-lite train --resume {run.path}\n" in result.stdout


def test_ctrl_c_outside_of_training_is_quiet(tiny_settings, config_file, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    result = call("train", config_file, "--runs-dir", tmp_path)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


# -- bad input to train --


def no_template(settings, folder):
    model = folder / "plain"
    shutil.copytree(settings["model"]["name"], model)
    (model / "chat_template.jinja").unlink()
    return [f"model.name={model}"]


def data(*rows, name="bad.jsonl"):
    """A source of such rows, each an object or the text of a line."""

    def prepare(settings, folder):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return [f"data.source={folder / name}"]

    return prepare


def settings(*overrides):
    return lambda settings, folder: list(overrides)


EQUAL = [{"prompt": f"q{n}", "chosen": "same", "rejected": "same"} for n in range(4)]

BAD_INPUT = {
    "unknown keys": (
        settings("margin.gama=1", "trainin.seed=1"),
        ["margin.gama: there is no such setting. Did you mean margin.gamma?", "trainin"],
    ),
    "out of range": (
        settings("objective.beta=-1", "lora.rank=0"),
        ["objective.beta: ", "greater than 0, but is -1", "lora.rank: "],
    ),
    "no value": (settings("margin.gamma"), ["write key=value"]),
    "missing data": (settings("data.source=no/pairs.jsonl"), ["no/pairs.jsonl", "neither a file"]),
    "empty data": (data(), ["bad.jsonl' is empty"]),
    "broken lines": (data("{"), ["bad.jsonl:1: the line is not valid JSON", "no usable row"]),
    "missing column": (data({"prompt": "q", "chosen": "a"}), ["no column 'rejected'"]),
    "empty response": (
        data({"prompt": "q", "chosen": "", "rejected": "b"}),
        ["bad.jsonl:1: chosen: ", "is empty"],
    ),
    "response of numbers": (
        data({"prompt": "q", "chosen": 1, "rejected": "b"}),
        ["bad.jsonl:1: chosen: is a number, not text"],
    ),
    "all gaps zero": (data(*EQUAL), ["every gap is 0", "normalization: shift"]),
    "no chat template": (no_template, ["has no chat template", "Choose a chat (instruct) model"]),
    "absent model": (
        settings("model.name=owner/absent"),
        ["the model owner/absent could not be loaded", "Check the spelling and the network"],
    ),
    "model that is no name": (settings("model.name=absent"), ["'absent' is neither an existing"]),
    "held-out data missing": (
        settings("data.heldout_source=no.jsonl"),
        ["'no.jsonl' is neither a file"],
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_and_leaves_no_run(case, tiny_settings, config_file, tmp_path):
    prepare, says = BAD_INPUT[case]
    overrides = [f"--set={text}" for text in prepare(tiny_settings, tmp_path)]
    runs_dir = tmp_path / "runs"
    result = call("train", config_file, "--name", "new", "--runs-dir", runs_dir, *overrides)
    assert_refused(result, *says)
    assert not runs_dir.exists() or list(runs_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "train needs a configuration: gapo-lite train configs/demo.yaml"),
        (["no.yaml"], "there is no configuration file no.yaml"),
        (["--resume", "none"], "there is no run 'none'"),
        (["--resume", "none", "--name", "x"], "a run keeps its name"),
    ],
)
def test_a_command_line_without_a_run_to_train_is_refused(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(call("train", *arguments), says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../out", "a/b", ".hidden", "", "x" * 101, "a b", "ü"])
def test_a_run_name_is_no_path(name, config_file, tmp_path):
    result = call("train", config_file, f"--name={name}", "--runs-dir", tmp_path / "runs")
    assert_refused(result, f"{name!r} cannot be a run's name")
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "runs"])


def test_a_run_name_in_use_is_refused_and_the_run_untouched(trained, config_file):
    _, run = trained
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    result = call("train", config_file, "--name", "tiny", "--runs-dir", run.path.parent)
    assert_refused(result, "the run name 'tiny' is in use", "--resume tiny")
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_damaged_checkpoints_are_named_when_resuming(trained, tmp_path):
    _, run = trained
    hurt = Run(tmp_path / "hurt")
    shutil.copytree(run.path, hurt.path)
    hurt.write("status.json", {**run.read("status.json"), "state": "failed"})
    for path in hurt.checkpoints.glob("*/adapter_model.safetensors"):
        path.write_bytes(path.read_bytes()[:-7])
    result = call("train", "--resume", hurt.path)
    assert result.exit_code == 2
    assert "checkpoint-2: adapter_model.safetensors is damaged" in result.stderr
    assert "Start the run again under a new name" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [["chat"], ["evaluate"], ["export", "--adapter"]])
def test_a_run_that_has_saved_nothing_is_refused(command, tiny_settings, tmp_path):
    forge_run(tmp_path / "none", tiny_settings, adapter=False)
    result = call(*command, "none", "--runs-dir", tmp_path)
    assert_refused(result, "the run none has saved no adapter yet (state: failed)")


# -- score --


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".npy"])
def test_score_writes_what_score_pairs_says(pairs_file, suffix):
    out = pairs_file.with_name("scores" + suffix)
    result = call("score", pairs_file, "--out", out, "--ef", "rouge1")
    assert result.exit_code == 0, result.stderr
    expected = ef.score_pairs(
        [p["chosen"] for p in PAIRS], [p["rejected"] for p in PAIRS], "rouge1"
    )
    assert expected.tolist() == [pytest.approx(2 / 3), 1.0, 0.0]
    if suffix == ".npy":
        assert np.array_equal(np.load(out), expected)
    elif suffix == ".csv":
        header, *rows = out.read_text().splitlines()
        assert header == "line,ef"
        assert [float(row.split(",")[1]) for row in rows] == expected.tolist()
    else:
        rows = read_jsonl(out)
        assert [row["ef"] for row in rows] == expected.tolist()
        assert [row["line"] for row in rows] == [1, 2, 3]


def test_score_sums_up(pairs_file):
    result = call("score", pairs_file, "--out", pairs_file.with_name("s.csv"))
    assert "3 pairs" in result.stdout
    assert "rougeL: mean 0.5556  least 0.0000" in result.stdout
    assert "median 0.6667" in result.stdout
    assert "EF = 0 (nothing in common): 1  EF = 1 (the same): 1" in result.stdout
    assert result.stderr == ""


def test_score_names_unusable_rows_and_keeps_the_lines_of_the_others(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [PAIRS[0], {"prompt": "q"}, PAIRS[2]])
    result = call("score", path, "--out", tmp_path / "s.jsonl")
    assert f"warning: {path}:2: chosen: the column is missing" in result.stderr
    assert "1 row unusable" in result.stdout
    assert [row["line"] for row in read_jsonl(tmp_path / "s.jsonl")] == [1, 3]


def test_score_warns_of_texts_that_rouge_cannot_see(tmp_path):
    chinese = {"prompt": "q", "chosen": "你好吗", "rejected": "你好"}
    path = write_jsonl(tmp_path / "p.jsonl", [*PAIRS, chinese])
    result = call("score", path, "--out", tmp_path / "s.csv")
    assert "warning: rougeL sees no word at all in a text of 1 of 4 pairs" in result.stderr
    assert "use --tokenizer unicode, or --ef bertscore_f1 with a multilingual" in result.stderr
    result = call("score", path, "--out", tmp_path / "s.csv", "--tokenizer", "unicode")
    assert result.stderr == ""
    assert (tmp_path / "s.csv").read_text().splitlines()[-1] == "4,0.8"


def test_score_takes_the_stemmer_and_the_encoder(tmp_path):
    pair = {"prompt": "q", "chosen": "cats running", "rejected": "cat runs"}
    path = write_jsonl(tmp_path / "p.jsonl", [pair])
    out = tmp_path / "s.npy"
    call("score", path, "--out", out, "--use-stemmer")
    assert np.load(out).tolist() == [1.0]
    encoder = ["--model", "embedded:all-minilm-l6-v2", "--layer", "3", "--batch-size", "2"]
    result = call("score", path, "--out", out, "--ef", "bertscore_f1", *encoder)
    assert result.exit_code == 0, result.stderr
    assert 0.3 < np.load(out).item() < 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "s.txt"], "must end with .jsonl, .csv, .npy"),
        (["--out", "no/s.csv"], "there is no folder"),
        (["--out", "pairs.jsonl"], "would be overwritten"),
        (["--out", "s.csv", "--ef", "rouge-l"], "Did you mean 'rougeL'?"),
        (["--out", "s.csv", "--model", "x"], "There is no option 'model' of rougeL"),
        (["--out", "s.csv", "--tokenizer", "bpe"], "has to be 'rouge' or 'unicode'"),
        (["--out", "s.csv", "--ef", "bertscore_p", "--tokenizer", "rouge"], "option 'tokenizer'"),
        (["--out", "s.csv", "--ef", "bertscore_p", "--use-stemmer"], "no option 'use_stemmer'"),
        (["--out", "s.csv", "--ef", "bertscore_p", "--layer", "-1"], "The option layer"),
    ],
)
def test_score_refuses_before_it_scores(arguments, says, pairs_file, monkeypatch):
    monkeypatch.chdir(pairs_file.parent)
    before = pairs_file.read_bytes()
    assert_refused(call("score", "pairs.jsonl", *arguments), says)
    assert [path.name for path in pairs_file.parent.iterdir()] == ["pairs.jsonl"]
    assert pairs_file.read_bytes() == before


def test_score_leaves_nothing_after_ctrl_c_or_on_a_full_disk(pairs_file, monkeypatch):
    out = pairs_file.with_name("s.csv")
    arguments = ("score", pairs_file, "--out", out)

    def interrupted(*args):
        raise KeyboardInterrupt

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gapo_lite.ef.cache.cached_scores", interrupted)
        result = call(*arguments)
        assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")
    call(*arguments[:2], "--out", out.with_suffix(".npy"))  # now the scores are in the cache
    out.with_suffix(".npy").unlink()
    monkeypatch.setattr(os, "fsync", full)
    assert_refused(call(*arguments), f"cannot write {out}: No space left on device")
    assert [path.name for path in out.parent.iterdir()] == ["pairs.jsonl"]


# -- export and runs --


def test_export_has_a_folder_of_its_own_and_says_what_is_missing(trained, tmp_path, monkeypatch):
    _, run = trained
    monkeypatch.chdir(tmp_path)
    assert_refused(call("export", run.path), "--merged", "--adapter")
    result = call("export", run.path, "--adapter")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("exports/tiny-adapter: ")
    card = (tmp_path / "exports" / "tiny-adapter" / "README.md").read_text()
    assert "| average target margin in reward units | 5 |" in card
    assert "24 training pairs" in card
    assert "Means over 6 pairs" in card
    assert_refused(call("export", run.path, "--adapter"), "is there already and not empty")


def test_runs_lists_whole_and_damaged_ones(trained, tiny_settings, tmp_path):
    _, run = trained
    shutil.copytree(run.path, tmp_path / "[bold]a")
    hurt = forge_run(tmp_path / "hurt", tiny_settings)
    (hurt.path / "status.json").write_text("{")
    result = call("runs", "--runs-dir", tmp_path)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    whole = next(line for line in lines if line[0] == "[bold]a")
    assert whole[1:8] == ["finished", "gapo", "rougeL", "0.5", "5", "10", "2/2"]
    assert next(line for line in lines if line[0] == "hurt")[1] == "damaged"
    assert f"{hurt.path} is damaged: " in result.stderr
    rows = json.loads(call("runs", "--runs-dir", tmp_path, "--json").stdout)
    assert {row["name"]: row["state"] for row in rows} == {"[bold]a": "finished", "hurt": "damaged"}
    last = [row for row in run.metrics() if "eval/loss" in row][-1]
    row = next(row for row in rows if row["name"] == "[bold]a")
    assert row["reward_margin"] == last["eval/rewards/margins"]


def test_no_runs_say_how_to_begin(tmp_path):
    result = call("runs", "--runs-dir", tmp_path / "none")
    assert "holds no runs yet: gapo-lite train configs/demo.yaml" in result.stdout
    assert call("runs", "--runs-dir", tmp_path / "none", "--json").stdout == "[]\n"
