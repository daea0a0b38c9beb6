"""Each command of `gapo-lite` and the page's Start on a GPU, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
import yaml
from checkout import ROOT
from forging import settings_with

from app import forms, jobs
from app.services import Services
from gapo_lite.disk import file_lock
from gapo_lite.runs import Run

QUESTION = "What is rain?"


def environment(**more):
    paths = [str(ROOT / path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def gapo_lite(*arguments):
    return [sys.executable, "-m", "gapo_lite", *map(str, arguments)]


def call(*arguments, stdin="", code=0, **variables):
    """The finished command, which exited with `code`."""
    done = subprocess.run(
        gapo_lite(*arguments),
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment(**variables),
    )
    assert done.returncode == code, f"{arguments[0]} exited with {done.returncode}:\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not (outcome := condition()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
    return outcome


@pytest.fixture(scope="session")
def config_file(small_settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "small.yaml"
    path.write_text(yaml.safe_dump(small_settings))
    return path


@pytest.fixture(scope="session")
def stopped_and_resumed(config_file, tmp_path_factory):
    """A run that SIGTERM stopped and --resume finished, and what was seen of it on the way; made
    once for all of pytest's processes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    run, seen = Run(shared / "runs" / "small"), shared / "seen.json"
    with file_lock(shared / "seen.lock", patience=300.0):
        if not seen.exists():
            seen.write_text(json.dumps(_stop_and_resume(config_file, run)))
    return run, json.loads(seen.read_text())


def _stop_and_resume(config_file, run):
    command = gapo_lite("train", config_file, "--runs-dir", run.path.parent)
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE) as process:
        status = run.path / "status.json"
        wait_for(
            lambda: (
                process.poll() is not None
                or (status.exists() and json.loads(status.read_text())["step"] >= 1)
            )
        )
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
        errors = process.stderr.read().decode()
    seen = {"code": code, "stderr": errors, "status": run.read("status.json")}
    done = call("train", "--resume", run.path)
    return {**seen, "resumed": done.stdout}


@pytest.fixture
def run(stopped_and_resumed):
    return stopped_and_resumed[0]


def test_a_training_is_stopped_by_a_signal_and_resumed(stopped_and_resumed):
    run, seen = stopped_and_resumed
    assert seen["code"] == 130, seen["stderr"]
    assert (seen["status"]["state"], seen["status"]["total"]) == ("stopped", 6)
    assert 1 <= seen["status"]["step"] < 6
    assert "finished, 6 of 6 steps" in seen["resumed"]
    assert run.read("environment.json")["gpu"] == torch.cuda.get_device_name()
    assert [row["step"] for row in run.metrics() if "loss" in row] == [3, 6]


def test_evaluate_finds_what_the_training_found(run, tmp_path):
    call("evaluate", run.path, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    base, *_, tuned = (row for row in run.metrics() if "eval/loss" in row)
    for side, row in (("base", base), ("tuned", tuned)):
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert found[side][name] == pytest.approx(row[f"eval/{name}"], rel=1e-2, abs=1e-2)


def test_chat_and_generate_answer_the_same(run, tmp_path):
    lines = f"{QUESTION}\n/base\n/quit\n"
    said = call("chat", run.path, "--max-tokens", 8, stdin=lines).stdout
    out = tmp_path / "answers.json"
    call("generate", run.path, "--prompt", QUESTION, "--max-tokens", 8, "--out", out)
    row = json.loads(out.read_text())
    assert row["prompt"] == QUESTION
    assert said.splitlines() == [row["tuned"], row["base"]]
    assert row["tuned"] != row["base"]


def test_a_merged_export_holds_the_base_with_the_adapter_in_all_layers(run, small_model, tmp_path):
    call("export", run.path, "--merged", "--out", tmp_path / "merged")
    merged, base = (
        safetensors.torch.load_file(folder / "model.safetensors")
        for folder in (tmp_path / "merged", small_model)
    )
    assert merged.keys() == base.keys()
    for name, weight in merged.items():
        assert weight.dtype == torch.bfloat16
        difference = (weight.float() - base[name]).norm() / base[name].norm()
        assert (difference > 0.02) == ("proj" in name), f"{name}: {difference:.3f}"


def test_the_demo_trains_compares_and_answers(small_settings, tmp_path):
    """With the small model: the embedded one would take minutes here."""
    path = tmp_path / "demo.yaml"
    short = {"max_steps": 1, "sample_prompts": [QUESTION]}
    path.write_text(yaml.safe_dump(settings_with(small_settings, training=short)))
    said = call("demo", path, "--runs-dir", tmp_path / "runs").stdout
    assert "held-out accuracy" in said
    assert f"prompt: {QUESTION}" in said
    assert re.search(r"^base: .+\ntuned: .+", said, re.MULTILINE)
    assert "finished, 1 of 1 steps" in said


def test_plan_and_doctor_know_the_card_and_how_much_of_it_is_free(config_file, tmp_path, emulation):
    held = {"HOSTCUDA_HELD_GIB": "23.995"}
    planned = call("plan", config_file, "--runs-dir", tmp_path, **held)
    assert emulation.Card.name in planned.stdout
    assert "of 24 GiB" in planned.stdout
    assert "Only 0.0 of this GPU's 24.0 GiB is free" in planned.stderr
    lines = call("doctor", "--runs-dir", tmp_path, **held).stdout.splitlines()
    found = {line[6:36].strip(): (line[:5].strip(), line[37:]) for line in lines}
    card = f"{emulation.Card.name}, 24.0 GiB, 0.0 GiB free, bfloat16, CUDA 13.0 (emulated)"
    assert found["GPU"] == ("warn", card)
    assert found["4-bit layer"] == ("ok", "forward and backward on cuda:0 in bfloat16")
    flash = "FlashAttention, forward and backward, tried with heads of 128"
    assert found["attention"] == ("ok", flash)


def test_the_page_s_start_trains_on_the_gpu(small_settings, small_model, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    (tmp_path / "runs").mkdir()
    served = Services.over(
        runs_dir=tmp_path / "runs", data_dir=tmp_path / "data", models_dir=small_model.parent
    )
    values = forms.values_of(forms.preset(next(iter(forms.PRESETS))))
    values |= {
        "model.name": str(small_model),
        "data.max_pairs": 8,
        "training.max_steps": 1,
        "training.sample_prompts": "",
    }
    name = served.start(values)
    wait_for(lambda: jobs.report(served.runs_dir, name).state in ("finished", "failed"))
    report = jobs.report(served.runs_dir, name)
    assert report.state == "finished", jobs.tail(served.runs_dir, name)
    run = Run(served.runs_dir / name)
    assert run.read("environment.json")["gpu"] == torch.cuda.get_device_name()
    assert all(row["memory_gib"] > 0 for row in run.metrics() if "loss" in row)
