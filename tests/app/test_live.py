"""The live view: what it shows of a run, when it is drawn anew, and what it costs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from app import live
from app.live import Feed, View, live_html, live_parts
from gapo_lite.config import RunConfig, parse_config
from gapo_lite.errors import ConfigError, RunError
from gapo_lite.runs import Run, now

HOSTILE = "<img src=x onerror=alert(1)>"


def training_row(step: int, steps_an_epoch: int = 100) -> dict:
    return {
        "step": step,
        "epoch": step / steps_an_epoch,
        "loss": 4.0 / (1 + step / 50),
        "rewards/chosen": -30.0,
        "rewards/rejected": -32.0,
        "rewards/margins": 2.0 + (step % 7) / 10,
        "rewards/accuracies": 0.7,
        "logps/chosen": -3.0,
        "logps/rejected": -3.2,
        "margin/mean": 0.3,
        "grad_norm": 1.0,
        "learning_rate": 1e-5,
        "tokens_per_second": 1000.0,
        "pairs_per_second": 3.0,
        "memory_gib": 2.5,
        "elapsed_s": 2.0 * step,
    }


def forged(runs_dir: Path, name: str, steps: int = 20, config: RunConfig | None = None) -> Run:
    """A run folder as a training of `steps` of 100 steps leaves it when it is killed."""
    run = Run(runs_dir / name)
    run.path.mkdir(parents=True)
    run.write_text("config.yaml", (config or parse_config({})).to_yaml())
    run.write("margins.json", {"mean_margin_in_reward_units": 3.0})
    rows = [training_row(step) for step in range(1, steps + 1)]
    run.write_text("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    status = {"state": "running", "pid": 1, "step": steps, "total": 100, "heartbeat": now()}
    run.write("status.json", status)
    run.write_text("train.log", f"step {steps} {HOSTILE}\n")
    return run


@pytest.fixture
def services(tmp_path) -> SimpleNamespace:
    return SimpleNamespace(runs_dir=tmp_path)


def test_the_view_shows_status_verdict_figures_and_log(services, tmp_path):
    forged(tmp_path, "one")
    html = live_html(services, View("one", 0.5, "epoch"))
    for title in ("Reward margin", "Loss", "Accuracy", "Rewards", "Gradient norm", "Learning rate"):
        assert title in html
    assert 'data-run-state="interrupted"' in html
    assert "step <b>20</b> of <b>100</b>" in html
    assert "target" in html
    assert "live?run=one&amp;smoothing=0.5&amp;axis=epoch" in html
    assert ">epoch<" in html


def test_the_target_margin_is_drawn_in_reward_units(services, tmp_path):
    forged(tmp_path, "one")
    assert "target</span><b>3</b>" in live_parts(services, View("one"))["figures"]


def test_texts_of_a_run_never_become_elements(services, tmp_path):
    run = forged(tmp_path, "one")
    for step in (0, 10):
        run.append("samples.jsonl", {"step": step, "prompt": HOSTILE, "answer": f"{HOSTILE}{step}"})
    html = live_html(services, View("one"))
    assert "<img" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") == 4


def test_base_and_newest_answer_stand_beside_each_prompt(services, tmp_path):
    run = forged(tmp_path, "one")
    for step, answer in ((0, "before"), (10, "between"), (20, "after")):
        run.append("samples.jsonl", {"step": step, "prompt": "Why?", "answer": answer})
    samples = live_parts(services, View("one"))["samples"]
    assert "base model (step 0)" in samples
    assert "tuned (step 20)" in samples
    assert "before" in samples
    assert "after" in samples
    assert "between" not in samples


def test_how_much_answers_repeat_themselves_stands_beside_them(services, tmp_path):
    run = forged(tmp_path, "one")
    for step, answer in ((0, "Water it weekly."), (10, "?"), (20, "abcdefghij" * 10)):
        run.append("samples.jsonl", {"step": step, "prompt": "Why?", "answer": answer})
    run.append("samples.jsonl", {"step": 20, "prompt": "How?", "answer": "Like this."})
    samples = live_parts(services, View("one"))["samples"]
    assert "repeats itself" in samples
    assert "0% → 88%" in samples  # 71 of 81 stretches
    assert ">0%<" in samples


def test_a_run_whose_settings_are_damaged_says_so_and_breaks_nothing(services, tmp_path):
    forged(tmp_path, "one").write_text("config.yaml", "model: [\n")
    assert "not readable as YAML" in live_html(services, View("one"))


def test_without_runs_the_view_says_what_to_do(services):
    assert "Press Start" in live_html(services, View(""))


@pytest.mark.parametrize(
    "view",
    [View("one", 1.0), View("one", -0.1), View("one", float("nan")), View("one", 0.0, "time")],  # type: ignore[arg-type]
)
def test_a_view_that_is_none_is_refused(view):
    with pytest.raises(ConfigError):
        view.checked()


@pytest.mark.parametrize("name", ["../one", "absent", ".jobs", "a/b", "\0", "x" * 300])
def test_a_name_that_is_no_run_is_refused(services, tmp_path, name):
    forged(tmp_path, "one")
    with pytest.raises(RunError):
        live_parts(services, View(name))


def test_the_feed_draws_only_what_is_new(services, tmp_path, monkeypatch):
    run, feed, view = forged(tmp_path, "one"), Feed(services), View("one")
    monkeypatch.setattr(live, "POLL_S", 0.0)
    monkeypatch.setattr(live, "REMIND_S", 1e9)
    first = feed.parts(view)
    assert feed.parts(view) is first
    run.append("metrics.jsonl", training_row(21))
    second = feed.parts(view)
    assert second["figures"] != first["figures"]
    assert second["log"] == first["log"]


def test_many_viewers_share_one_look(services, tmp_path, monkeypatch):
    forged(tmp_path, "one")
    feed, looks = Feed(services), []
    look = live._token
    monkeypatch.setattr(live, "_token", lambda *known: looks.append(1) or look(*known))
    for _ in range(1000):
        feed.parts(View("one"))
    assert len(looks) < 10


def test_a_curve_of_5000_steps_is_redrawn_in_a_third_of_a_second(services, tmp_path):
    run, view = forged(tmp_path, "one", steps=5000), View("one", 0.6)
    live_parts(services, view)
    run.append("metrics.jsonl", training_row(5001))
    start = time.perf_counter()
    figures = live_parts(services, view)["figures"]
    assert time.perf_counter() - start < 0.3
    assert len(figures) < 500_000


def test_what_a_damaged_sample_file_holds_is_left_out(services, tmp_path):
    run = forged(tmp_path, "one")
    run.write_text("samples.jsonl", '{"step": 0, "prompt": "a", "answer": "b"}\n{"st')
    assert ">a<" in live_parts(services, View("one"))["samples"]
