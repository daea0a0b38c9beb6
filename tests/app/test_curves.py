"""What the page reads of a run: a file that grows, is replaced, torn and asked for by many."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from checkout import ROOT

from app import history as history_module
from app.curves import FIGURES, curve, drift, ends, figure_curves, progress, smooth, summary
from app.history import History, config_of, read_history, to_csv, version
from gapo_lite.config import RunConfig, parse_config
from gapo_lite.errors import ConfigError, RunError
from gapo_lite.overview import overview
from gapo_lite.runs import Run, now


@pytest.fixture(autouse=True)
def no_memory_of_other_tests(monkeypatch):
    monkeypatch.setattr(history_module, "_cache", type(history_module._cache)())


def a_run(folder: Path, name: str = "run", **training) -> Run:
    run = Run(folder / name)
    run.path.mkdir()
    config = parse_config({"training": training})
    (run.path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return run


def add(run: Run, *rows: dict) -> None:
    for row in rows:
        run.append("metrics.jsonl", row)


def training_row(step: int, **more) -> dict:
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 1 / (step + 1),
        "margin/mean": 0.3,
        "pairs_per_second": 2.0,
        "elapsed_s": 4.0 * step,
        **more,
    }


def evaluation_row(step: int, **more) -> dict:
    row = {"loss": 2.0, "rewards/accuracies": 0.5, "margin/mean": 0.3, **more}
    return {"step": step, "epoch": step / 10, **{f"eval/{key}": row[key] for key in row}}


def as_rows(history: History) -> list[dict]:
    """The history as the file's rows, without what is missing; training rows first."""
    rows = []
    for columns, prefix in ((history.training, ""), (history.evaluation, "eval/")):
        for index in range(len(columns["step"])):
            values = {key: float(values[index]) for key, values in columns.items()}
            rows.append(
                {
                    key if key in ("step", "epoch") else prefix + key: value
                    for key, value in values.items()
                    if not math.isnan(value)
                }
            )
    return rows


def expected(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: "eval/loss" in row)


@pytest.fixture(scope="module")
def trained(tiny_settings, tmp_path_factory) -> Run:
    """12 real steps of the tiny model, with evaluations at 0, 4, 8 and 12."""
    from gapo_lite.training import train

    config = parse_config(tiny_settings, ["training.logging_steps=1"])
    return train(config, runs_dir=tmp_path_factory.mktemp("runs"), name="real", show_progress=False)


# -- a real run --


def test_the_history_of_a_real_run_is_its_file(trained):
    history = read_history(trained)
    assert as_rows(history) == expected(trained.metrics())
    assert list(history.training["step"]) == list(range(1, 13))
    assert list(history.evaluation["step"]) == [0, 4, 8, 12]
    assert history.problem == ""


def test_every_figure_of_the_page_has_its_curves_in_a_real_run(trained):
    history, scale = read_history(trained), trained.config().objective.reward_scale
    drawn = set()
    for figure in FIGURES:
        lines, target = figure_curves(history, figure, scale=scale, smoothing=0.5)
        for line in [*lines, *([target] if target else [])]:
            assert np.isfinite(line.raw).all(), line.key
            assert list(line.x) == list(range(1, 13))
            measured = line.key not in ("learning_rate", "grad_norm")
            assert list(line.heldout_x) == ([0, 4, 8, 12] if measured else [])
            drawn.add(line.key)
    status_line = {"step", "epoch", "tokens_per_second", "pairs_per_second", "memory_gib"}
    assert set(history.training) == drawn | status_line | {"elapsed_s"}


def test_the_summary_of_a_real_run_is_what_the_list_of_runs_says(trained):
    (row,) = overview(trained.path.parent)
    found, rows = summary(trained), trained.metrics()
    assert (found.accuracy, found.reward_margin) == (row.accuracy, row.reward_margin)
    assert found.target_reward_margin == row.target_reward_margin == pytest.approx(3.0)
    held = [row["eval/logps/chosen"] for row in rows if "eval/loss" in row]
    assert found.chosen_drift == held[-1] - held[0]
    assert found.duration_s == [row["elapsed_s"] for row in rows if "loss" in row][-1]


def test_progress_of_a_finished_run(trained):
    found = progress(trained)
    assert (found.eta_s, found.epoch) == (None, 2.0)
    assert found.pairs_per_second > 0
    assert found.memory_gib > 0


def test_a_resumed_run_is_read_as_the_shorter_file_that_it_is_now(trained, tmp_path):
    run = a_run(tmp_path)
    rows = trained.metrics()
    add(run, *rows)
    assert read_history(run).training["step"][-1] == 12
    run.forget_after(6)
    assert as_rows(read_history(run)) == expected([row for row in rows if row["step"] <= 6])
    again = [{**row, "elapsed_s": 99.5} for row in rows if row["step"] > 6 and "loss" in row]
    add(run, *again)
    assert as_rows(read_history(run)) == expected(run.metrics())
    assert read_history(run).training["elapsed_s"][-1] == 99.5


# -- a file that grows --


def test_each_line_is_parsed_once_and_the_history_is_that_of_the_whole_file(tmp_path, monkeypatch):
    run, lines = a_run(tmp_path), Counter()
    loads = json.loads

    def counted(line):
        lines[line] += 1
        return loads(line)

    monkeypatch.setattr(history_module.json, "loads", counted)
    for step in range(30):
        add(run, evaluation_row(step) if step % 10 == 0 else training_row(step))
        assert len(as_rows(read_history(run))) == step + 1
    assert set(lines.values()) == {1}
    assert as_rows(read_history(run)) == expected(run.metrics())


def test_an_unchanged_file_is_not_opened(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    add(run, training_row(1))
    first = read_history(run)
    monkeypatch.setattr(history_module, "_read", lambda *args: pytest.fail("opened"))
    assert all(read_history(run) is first for _ in range(20))


def test_an_unterminated_last_line_is_left_out_until_it_is_whole(tmp_path):
    run = a_run(tmp_path)
    add(run, training_row(1))
    line = json.dumps(training_row(2)).encode() + b"\n"
    for cut in (1, 20, len(line) - 1):
        path = run.path / "metrics.jsonl"
        with path.open("ab") as file:
            file.write(line[:cut])
        assert list(read_history(run).training["step"]) == [1]
        assert read_history(run).problem == ""
        with path.open("ab") as file:
            file.write(line[cut:])
        assert list(read_history(run).training["step"]) == [1, 2]
        path.unlink()
        add(run, training_row(1))


def test_an_earlier_history_stays_as_it_was_and_cannot_be_written_to(tmp_path):
    run = a_run(tmp_path)
    add(run, training_row(1))
    before = read_history(run)
    add(run, training_row(2))
    assert list(read_history(run).training["step"]) == [1, 2]
    assert list(before.training["step"]) == [1]
    with pytest.raises(ValueError, match="read-only"):
        before.training["loss"][0] = 7
    with pytest.raises(TypeError):
        before.training["loss"] = np.zeros(1)


def test_a_longer_file_under_the_same_inode_is_not_taken_for_the_old_one(tmp_path):
    run = a_run(tmp_path)
    path = run.path / "metrics.jsonl"
    add(run, training_row(1), training_row(2))
    read_history(run)
    inode = path.stat().st_ino
    rows = [training_row(step, elapsed_s=1000.0 + step) for step in range(1, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert path.stat().st_ino == inode
    assert as_rows(read_history(run)) == rows


def test_a_shorter_file_under_the_same_inode_is_read_anew(tmp_path):
    run = a_run(tmp_path)
    add(run, *map(training_row, range(1, 6)))
    read_history(run)
    (run.path / "metrics.jsonl").write_text(json.dumps(training_row(9)) + "\n")
    assert list(read_history(run).training["step"]) == [9]


@pytest.mark.parametrize(
    "line",
    [
        *(b"{", b"1", b"[]", b'"step"', b"null", b"", b"\x00\x00\x00", b"\xff\xfe{}"),
        *(b'{"loss": 1}', b'{"step": "2"}', b'{"step": null}', b'{"step": NaN}'),
        pytest.param(b"[" * 99_999, id="deep"),
        pytest.param(b'{"step": ' + b"9" * 5000 + b"}", id="long number"),
    ],
)
def test_reading_ends_at_a_damaged_line_and_says_where(tmp_path, line):
    run = a_run(tmp_path)
    add(run, evaluation_row(0), training_row(1))
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    add(run, training_row(3))
    for _ in range(2):
        history = read_history(run)
        assert list(history.training["step"]) == [1]
        assert "line 3" in history.problem
        add(run, training_row(4))
    assert len(list(csv.reader(io.StringIO(to_csv(run))))) == 3
    run.write_text("metrics.jsonl", json.dumps(training_row(8)) + "\n")
    assert list(read_history(run).training["step"]) == [8]
    assert read_history(run).problem == ""


def test_unknown_keys_are_kept_and_what_is_no_number_is_missing(tmp_path):
    run = a_run(tmp_path)
    add(run, training_row(1))
    add(run, training_row(2, **{"β-ключ": 5, "text": "7", "flag": True, "none": None}))
    add(run, training_row(3, **{"β-ключ": 6.5, "list": [1], "huge": 10**400}))
    add(run, {"step": 4, "loss": math.nan, "x": -math.inf})
    columns = read_history(run).training
    assert np.array_equal(columns["β-ключ"], [np.nan, 5, 6.5, np.nan], equal_nan=True)
    for key in ("text", "flag", "none", "list"):
        assert np.isnan(columns[key]).all(), key
    assert list(columns["huge"][2:3]) == [np.inf]
    assert math.isnan(columns["loss"][3])
    assert columns["x"][3] == -np.inf
    assert np.isnan(columns["epoch"][3])


def test_no_file_is_an_empty_history_also_after_there_was_one(tmp_path):
    run = a_run(tmp_path)
    for _ in range(2):
        history = read_history(run)
        assert (len(history.training["step"]), len(history.evaluation["epoch"])) == (0, 0)
        add(run, training_row(1))
        assert len(read_history(run).training["step"]) == 1
        (run.path / "metrics.jsonl").unlink()
    assert to_csv(run) == "step\r\n"


def test_a_file_that_cannot_be_read_is_one_calm_sentence(tmp_path):
    run = a_run(tmp_path)
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"cannot read .*metrics\.jsonl: Is a directory"):
        read_history(run)


def test_threads_that_read_while_a_run_writes_see_a_beginning_of_it(tmp_path):
    run, failures = a_run(tmp_path), []
    done = threading.Event()

    def watch() -> None:
        seen = 0
        while not done.is_set() or seen < 200:
            steps = read_history(run).training["step"]
            if len(steps) < seen or list(steps) != list(range(len(steps))):
                failures.append(list(steps))
                return
            seen = len(steps)
            done.wait(0.001)

    threads = [threading.Thread(target=watch, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for step in range(200):
        add(run, training_row(step))
    done.set()
    for thread in threads:
        thread.join(timeout=30)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)


def test_threads_may_ask_for_more_runs_than_the_cache_holds(tmp_path, monkeypatch):
    runs, failures = [a_run(tmp_path, name) for name in "abc"], []
    for run in runs:
        add(run, training_row(1))
    monkeypatch.setattr(history_module, "_MAX_NUMBERS", 1)
    interval = sys.getswitchinterval()

    def ask(first: int) -> None:
        try:
            for index in range(1500):
                assert list(read_history(runs[(first + index) % 3]).training["step"]) == [1]
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(index,), daemon=True) for index in range(8)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)


def test_the_cache_forgets_what_was_not_asked_for_longest(tmp_path, monkeypatch):
    runs = [a_run(tmp_path, name) for name in "abc"]
    for run in runs:
        add(run, *map(training_row, range(10)))
    monkeypatch.setattr(history_module, "_MAX_NUMBERS", 2 * 10 * len(training_row(0)))
    a, b, c = (read_history(run) for run in runs)
    assert read_history(runs[2]) is c
    assert read_history(runs[1]) is b
    assert len(history_module._cache) == 2
    assert read_history(runs[0]) is not a
    assert runs[2].path / "metrics.jsonl" not in history_module._cache
    monkeypatch.setattr(history_module, "_MAX_NUMBERS", 1)
    assert len(read_history(runs[2]).training["step"]) == 10
    assert len(history_module._cache) == 1


def test_the_version_changes_with_each_file_and_only_then(tmp_path):
    run = a_run(tmp_path)
    seen = [version(run)]
    for name in ("metrics.jsonl", "samples.jsonl", "metrics.jsonl"):
        run.append(name, {"step": 1})
        seen.append(version(run))
    run.write("status.json", {"step": 1})
    seen.append(version(run))
    run.write("status.json", {"step": 2})  # as long as before
    seen.append(version(run))
    (run.path / "train.log").write_text("x\n")
    seen.append(version(run))
    assert len(set(seen)) == len(seen)
    (run.path / "notes.txt").write_text("x")
    assert version(run) == seen[-1]
    assert version(Run(tmp_path / "gone")) == version(Run(tmp_path / "gone too"))


# -- curves --


def naive_smooth(y, strength):
    """TensorBoard's, step by step."""
    result, last, count = [], 0.0, 0
    for value in y:
        if not math.isfinite(value):
            result.append(value)
            continue
        last = last * strength + (1 - strength) * value
        count += 1
        result.append(last / (1 - strength**count))
    return result


def test_smoothing_by_hand():
    # last: 0.5·1 = 0.5, then 0.25 + 1 = 1.25; debiased by 1 − 0.5 and by 1 − 0.25.
    assert smooth(np.array([1.0, 2.0]), 0.5).tolist() == pytest.approx([1.0, 1.25 / 0.75])


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_smoothing_equals_its_naive_equivalent_and_keeps_gaps(strength):
    y = np.random.default_rng(1).normal(size=500)
    y[[0, 7, 8, 250, 499]] = [np.nan, np.nan, np.inf, -np.inf, np.nan]
    before = y.copy()
    np.testing.assert_allclose(smooth(y, strength), naive_smooth(y, strength), rtol=1e-9)
    assert np.array_equal(y, before, equal_nan=True)


def test_smoothing_of_nothing_none_and_a_constant():
    assert len(smooth(np.zeros(0), 0.9)) == 0
    assert np.isnan(smooth(np.full(3, np.nan), 0.9)).all()
    assert smooth(np.array([1.0, 5.0]), 0).tolist() == [1.0, 5.0]
    np.testing.assert_allclose(smooth(np.full(5000, 3.0), 0.99), 3.0, rtol=1e-12)


@pytest.mark.parametrize("strength", [-0.1, 1.0, 0.991, math.nan, math.inf])
def test_smoothing_out_of_range_is_refused(tmp_path, strength):
    with pytest.raises(ConfigError, match=r"from 0 to 0\.99"):
        curve(read_history(a_run(tmp_path)), "loss", smoothing=strength)


def test_a_curve_over_steps_and_over_epochs(tmp_path):
    run = a_run(tmp_path)
    add(run, evaluation_row(0), training_row(5), training_row(10), evaluation_row(10, loss=1.0))
    add(run, {"step": 11, "loss": 0.5})  # of unknown epoch
    history = read_history(run)
    line = curve(history, "loss", smoothing=0.5)
    assert (line.x.tolist(), line.raw.tolist()) == ([5, 10, 11], [1 / 6, 1 / 11, 0.5])
    assert line.smoothed.tolist() == smooth(line.raw, 0.5).tolist()
    assert (line.heldout_x.tolist(), line.heldout_y.tolist()) == ([0, 10], [2.0, 1.0])
    assert curve(history, "loss", axis="epoch").x.tolist() == [0.5, 1.0]
    assert curve(history, "loss", axis="epoch").heldout_x.tolist() == [0.0, 1.0]
    nothing = curve(history, "no/such", label="x")
    assert [len(part) for part in (nothing.x, nothing.smoothed, nothing.heldout_y)] == [0, 0, 0]


def test_an_unknown_axis_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="step or epoch"):
        curve(read_history(a_run(tmp_path)), "loss", axis="__class__")


@pytest.mark.parametrize(("heldout", "is_drawn"), [(0.3, False), (0.303, False), (0.36, True)])
def test_the_target_is_in_reward_units_and_the_held_out_one_is_drawn_if_it_differs(
    tmp_path, heldout, is_drawn
):
    run = a_run(tmp_path)
    add(run, training_row(1, **{"margin/mean": 0.25}), training_row(2, **{"margin/mean": 0.35}))
    add(run, evaluation_row(2, **{"margin/mean": heldout}))
    assert FIGURES[0].key == "margin"
    _, target = figure_curves(read_history(run), FIGURES[0], scale=10.0)
    assert target.raw.tolist() == [2.5, 3.5]
    assert target.heldout_y.tolist() == ([heldout * 10.0] if is_drawn else [])
    assert len(target.heldout_x) == len(target.heldout_y)
    assert figure_curves(read_history(run), FIGURES[1], scale=10.0)[1] is None


def test_every_figure_is_told_apart_and_explained():
    assert [figure.key for figure in FIGURES] == [
        *("margin", "loss", "accuracy", "rewards", "logps", "learning_rate", "grad_norm")
    ]
    assert all(figure.title and figure.text.endswith(".") for figure in FIGURES)


@pytest.mark.parametrize("margin_scale", ["beta", "one"])
def test_margins_are_scaled_as_the_loss_scales_them(margin_scale):
    import torch

    from gapo_lite.objectives import gapo_loss

    objective = parse_config({"objective": {"beta": 2.5, "margin_scale": margin_scale}}).objective
    a, margin = torch.zeros(1), torch.tensor([0.3])
    (loss,) = gapo_loss(a, a, margin, beta=2.5, margin_scale=margin_scale).losses
    assert loss.item() == pytest.approx(np.log1p(np.exp(0.3 * objective.reward_scale)))


def test_a_configuration_is_read_again_when_it_has_changed(tmp_path):
    run = a_run(tmp_path)
    assert config_of(run) is config_of(run)
    run.write_text("config.yaml", parse_config({"objective": {"beta": 3}}).to_yaml())
    assert config_of(run).objective.beta == 3
    (run.path / "config.yaml").unlink()
    with pytest.raises(ConfigError):
        config_of(run)


# -- CSV --


def test_the_csv_holds_every_row_with_step_first(trained):
    rows = trained.metrics()
    text = to_csv(trained)
    assert text.count("\r\n") == len(rows) + 1
    header, *lines = csv.reader(io.StringIO(text, newline=""))
    assert header[0] == "step"
    assert set(header) == {key for row in rows for key in row}
    for row, line in zip(rows, lines, strict=True):
        cells = {key: float(cell) for key, cell in zip(header, line, strict=True) if cell}
        assert cells == row


def test_the_csv_quotes_odd_keys_and_marks_formulas_as_text(tmp_path):
    run = a_run(tmp_path)
    odd = {'a "b", c\nd': 1.5, "=1+1": "=cmd|' /C calc'!A0", "é": "-x", "loss": math.nan}
    add(run, {"loss": -0.5, "step": 1}, {"step": 2, **odd, "none": None, "list": [1, "ü"]})
    rows = list(csv.reader(io.StringIO(to_csv(run), newline="")))
    assert rows == [
        ["step", "loss", 'a "b", c\nd', "'=1+1", "é", "none", "list"],
        ["1", "-0.5", "", "", "", "", ""],
        ["2", "nan", "1.5", "'=cmd|' /C calc'!A0", "'-x", "null", '[1, "ü"]'],
    ]


# -- progress --


def running(run: Run, step: int, total: int, age: float = 0.0) -> None:
    run.write(
        "status.json",
        {"state": "running", "pid": 1, "step": step, "total": total, "heartbeat": now() - age},
    )


def timeline(run: Run, steps: int, *, every: int, pause: float, evaluate: int = 10) -> float:
    """Rows of steps that take 4 s each, with pauses for evaluation; returns the time at the end."""
    add(run, evaluation_row(0))
    for step in range(1, steps + 1):
        pauses = 1 + (step - 1) // evaluate
        if step % every == 0:
            add(run, training_row(step, elapsed_s=4.0 * step + pause * pauses))
        if step % evaluate == 0:
            add(run, evaluation_row(step))
    return 4.0 * steps + pause * (1 + steps // evaluate)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("step", [3, 12, 20, 39])
def test_the_time_left_counts_steps_and_evaluations_to_come(tmp_path, every, step):
    run = a_run(tmp_path, batch_size=8, eval_steps=10)  # 2 pairs/s: 4 s a step
    at = timeline(run, step, every=every, pause=30.0)
    running(run, step, 45)
    with run.lock():
        found = progress(run)
    evaluations = {10, 20, 30, 40, 45}
    left = 4.0 * (45 - step) + 30.0 * sum(e > step for e in evaluations)
    assert found.eta_s == pytest.approx(left, abs=0.5)
    assert at + left == 4.0 * 45 + 30.0 * 6


def test_the_time_left_survives_a_resume_whose_first_row_is_far_too_fast(tmp_path):
    run = a_run(tmp_path, batch_size=8, eval_steps=1000)
    add(run, *map(training_row, range(1, 9)))
    run.forget_after(6)
    # its window holds pairs from before the stop, and not their time; elapsed_s goes on
    add(run, training_row(7, pairs_per_second=900.0, elapsed_s=33.0), training_row(8))
    running(run, 8, 20)
    with run.lock():
        assert progress(run).eta_s == pytest.approx(48.0, abs=0.1)


def test_the_time_left_counts_down_between_steps_but_by_a_step_at_most(tmp_path):
    run = a_run(tmp_path, batch_size=8)
    add(run, *map(training_row, range(1, 6)))
    with run.lock():
        for age, left in ((0.0, 20.0), (1.5, 18.5), (60.0, 16.0)):
            running(run, 5, 10, age)
            assert progress(run).eta_s == pytest.approx(left, abs=0.3)


def test_the_time_left_is_unknown_before_the_first_row_and_when_nothing_runs(tmp_path):
    run = a_run(tmp_path)
    running(run, 0, 20)
    with run.lock():
        assert progress(run).eta_s is None
        add(run, {"step": 1, "pairs_per_second": 2.0})
        assert progress(run).eta_s is not None
    assert run.state() == "interrupted"
    assert progress(run).eta_s is None


def test_progress_of_a_run_that_starts_and_of_one_that_starts_again(tmp_path):
    run = a_run(tmp_path)
    found = progress(run)
    assert set(map(found.__getattribute__, found.__slots__)) == {None}
    add(run, *map(training_row, range(1, 6)))
    run.write("status.json", {"state": "starting", "step": 0, "total": 0, "heartbeat": now()})
    with run.lock():
        found = progress(run)
    assert (found.epoch, found.pairs_per_second, found.eta_s) == (0.5, 2.0, None)


@pytest.mark.parametrize("content", ["[]", "1", "{", "\x00"])
def test_a_damaged_status_is_one_calm_sentence(tmp_path, content):
    run = a_run(tmp_path)
    (run.path / "status.json").write_text(content)
    with pytest.raises(RunError, match=r"status\.json is damaged"):
        progress(run)


def test_a_status_of_odd_values_is_read_as_unknown(tmp_path):
    run = a_run(tmp_path, batch_size=8)
    add(run, *map(training_row, range(1, 6)))
    odd = {"state": "running", "pid": 1, "step": "x", "heartbeat": [1]}
    with run.lock():
        run.write("status.json", {**odd, "total": None})
        assert progress(run).eta_s is None
        run.write("status.json", {**odd, "total": 10})
        assert progress(run).eta_s == 20.0  # from the rows' own step, 4 s each


# -- drift --


def test_drift_is_against_the_base_model_where_pairs_are_held_out(tmp_path):
    run = a_run(tmp_path)
    for step, chosen, rejected in ((0, -1.0, -1.1), (5, -9.0, -9.0), (10, -0.75, -1.6)):
        add(run, evaluation_row(step, **{"logps/chosen": chosen, "logps/rejected": rejected}))
        if step == 0:
            assert drift(read_history(run)) is None
    found = drift(read_history(run))
    assert (found.chosen, found.rejected) == pytest.approx((0.25, -0.5))
    assert found.heldout


@pytest.mark.parametrize(("rows", "is_known"), [(7, False), (8, True)])
def test_drift_of_training_pairs_needs_rows_enough(tmp_path, rows, is_known):
    run = a_run(tmp_path)
    add(run, evaluation_row(0, **{"logps/chosen": -1.0, "logps/rejected": -1.0}))
    for step in range(rows):
        add(run, training_row(step, **{"logps/chosen": -1 - step, "logps/rejected": -2.0 * step}))
    found = drift(read_history(run))
    assert (found is not None) == is_known
    if found:  # means of the first two and the last two rows
        assert (found.chosen, found.rejected, found.heldout) == (-6.0, -12.0, False)
        assert ends(read_history(run), "logps/chosen").first == -1.5


def test_a_summary_of_a_run_with_nothing_measured_knows_nothing(tmp_path):
    found = summary(a_run(tmp_path))
    assert set(map(found.__getattribute__, found.__slots__)) == {None}


def test_curves_and_verdict_bring_neither_torch_nor_gradio_into_the_server():
    code = (
        "import sys, app.curves, app.verdict\n"
        "heavy = {'torch', 'transformers', 'gradio', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_default_configuration_is_what_these_tests_think(tmp_path):
    assert config_of(a_run(tmp_path)) == RunConfig()
