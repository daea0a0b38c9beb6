"""Sweeps at odd moments: stops, failures and kills that fall between two runs, folders that were
moved. What trains is replaced by what a training leaves, so that nothing here takes long."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gapo_lite import sweep, sweep_cells
from gapo_lite.errors import RunError
from gapo_lite.preparation import Shared
from gapo_lite.runs import Run, now, remove_run
from gapo_lite.sweep import Budget
from gapo_lite.sweep_config import Cell, parse_sweep
from gapo_lite.sweep_folder import SweepFolder, create_sweep, open_sweep

NAMES = ("a", "b", "c", "d")
Train = Callable[[Cell, Path, Any], None]


@pytest.fixture
def given() -> dict:
    """Four contenders and one seed."""
    return {
        "base": {"model": {"name": "x/y"}, "data": {"source": "x.jsonl"}},
        "variants": [
            {"name": name, "settings": {"training.max_steps": 100 + i}}
            for i, name in enumerate(NAMES)
        ],
        "seeds": [1],
        "answers": None,
    }


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[[SweepFolder, Train], str]:
    """Runs a sweep whose cells are trained by a function of the test."""

    def work(folder: SweepFolder, train: Train, max_runs: int | None = None) -> str:
        def train_cell(cell: Cell, runs_dir: Path, shared: object, pause: Any, **_: Any) -> Run:
            train(cell, runs_dir, pause)
            return Run(runs_dir / cell.run)

        def record(cell: Cell, run: Run, *_: Any, state: str, seconds: float) -> dict[str, Any]:
            return {
                **{"run": cell.run, "contender": cell.contender, "seed": cell.seed},
                **{"state": state, "step": run.read("status.json")["step"], "seconds": seconds},
                "data_fingerprint": "f",
            }

        monkeypatch.setattr(sweep, "train_cell", train_cell)
        monkeypatch.setattr(sweep, "cell_record", record)
        monkeypatch.setattr(sweep._Sweep, "_ask_the_data", lambda self: None)
        return sweep.run_sweep(folder, budget=Budget(None, max_runs), show_progress=False)

    return work


def leave(run: Path, state: str, step: int, accuracy: float, **more: Any) -> None:
    """What a training that came to `step` leaves."""
    run.mkdir(exist_ok=True)
    row = json.dumps({"step": step, "eval/logps/accuracies": accuracy})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{row}\n")
    status = {"state": state, "step": step, "total": 100, "heartbeat": now(), **more}
    Run(run).write("status.json", status)


def step_by_step(score: Callable[[str, int], float], steps: int = 100) -> Train:
    """A training that pauses where it is told to."""

    def train(cell: Cell, runs_dir: Path, pause: Any) -> None:
        step = next((n for n in range(1, steps) if pause(n)), steps)
        state = "finished" if step == steps else "stopped"
        leave(runs_dir / cell.run, state, step, score(cell.contender, step))

    return train


def states(folder: SweepFolder) -> dict[str, tuple[str, int]]:
    found = folder.results().values()
    return {one["contender"]: (one["state"], one.get("step", 0)) for one in found}


def test_rounds_are_judged_by_their_own_end_whatever_the_growth(
    given: dict, tmp_path: Path, work: Any
) -> None:
    """Growth 1.5 makes rounds of 4.5 steps, which end at step 5."""
    given["halving"] = {"first_steps": 3, "growth": 1.5}

    def score(name: str, step: int) -> float:
        first = {"a": 0.9, "b": 0.8, "c": 0.1, "d": 0.2}
        return first[name] if step < 5 else {"a": 0.3, "b": 0.7}[name]

    folder = create_sweep(parse_sweep(given), tmp_path, "s", "s")
    assert work(folder, step_by_step(score)) == "finished"
    assert states(folder)["b"] == ("finished", 100)
    assert states(folder)["a"] == ("dropped", 5)


def test_a_contender_that_failed_is_not_tried_again_in_each_round(
    given: dict, tmp_path: Path, work: Any
) -> None:
    given |= {"halving": {"first_steps": 3}, "baseline": "d"}  # which is never dropped
    inner, tries = step_by_step(lambda name, step: ord(name) / 200), []

    def train(cell: Cell, runs_dir: Path, pause: Any) -> None:
        if cell.contender == "d":
            tries.append(cell)
            raise RunError("it diverged")
        inner(cell, runs_dir, pause)

    folder = create_sweep(parse_sweep(given), tmp_path, "s", "s")
    assert work(folder, train) == "finished"
    assert len(tries) == 1
    assert states(folder) == {
        **{"a": ("dropped", 3), "b": ("dropped", 6), "c": ("finished", 100), "d": ("failed", 0)}
    }


def test_a_run_whose_status_is_damaged_between_rounds_does_not_end_the_sweep(
    given: dict, tmp_path: Path, work: Any
) -> None:
    given["halving"] = {"first_steps": 4}
    inner = step_by_step(lambda name, step: {"a": 0.9, "b": 0.8, "c": 0.6, "d": 0.5}[name])

    def train(cell: Cell, runs_dir: Path, pause: Any) -> None:
        inner(cell, runs_dir, pause)
        if cell.contender == "d":
            for other in "ac":
                (runs_dir / f"s-{other}-s1" / "status.json").write_text("{")

    folder = create_sweep(parse_sweep(given), tmp_path, "s", "s")
    assert work(folder, train) == "finished"
    assert states(folder) == {"a": ("finished", 100), "b": ("dropped", 8), "d": ("dropped", 4)}


def test_contenders_that_cannot_go_on_do_not_take_a_place_of_the_next_round(
    given: dict, tmp_path: Path, work: Any
) -> None:
    given["halving"] = {"first_steps": 4}
    inner = step_by_step(lambda name, step: {"c": 0.6, "d": 0.5}[name])

    def train(cell: Cell, runs_dir: Path, pause: Any) -> None:
        run = runs_dir / cell.run
        if cell.contender == "a":
            leave(run, "stopped", 2, 0.9, stopped_by="drift", message="it drifted")
        elif cell.contender == "b":
            leave(run, "failed", 0, 0.8)
            raise RunError("it diverged")
        else:
            inner(cell, runs_dir, pause)

    folder = create_sweep(parse_sweep(given), tmp_path, "s", "s")
    assert work(folder, train) == "finished"
    found = states(folder)
    assert found["a"] == ("dropped", 2)
    assert found["b"][0] == "failed"
    assert found["c"] == ("finished", 100)
    assert found["d"] == ("dropped", 8)


def test_the_baseline_goes_on_whatever_its_rank_and_takes_nobody_s_place(
    given: dict, tmp_path: Path, work: Any
) -> None:
    given |= {"halving": {"first_steps": 4}, "baseline": "a"}
    score = {"a": 0.5, "b": 0.6, "c": 0.8, "d": 0.7}
    folder = create_sweep(parse_sweep(given), tmp_path, "s", "s")
    assert work(folder, step_by_step(lambda name, step: score[name])) == "finished"
    assert states(folder) == {
        **{"a": ("finished", 100), "b": ("dropped", 4), "c": ("finished", 100)},
        "d": ("dropped", 8),
    }


def test_more_seeds_at_the_end_of_a_round_count_more_than_a_better_mean_of_fewer(
    given: dict, tmp_path: Path, work: Any
) -> None:
    """Two seeds of `a` drift, and the third is better than any of `b`."""
    given |= {"halving": {"first_steps": 4}, "seeds": [1, 2, 3]}
    given["variants"] = given["variants"][:2]
    inner = step_by_step(lambda name, step: {"a": 0.82, "b": 0.80}[name])

    def train(cell: Cell, runs_dir: Path, pause: Any) -> None:
        if cell.contender == "a" and cell.seed > 1:
            leave(runs_dir / cell.run, "stopped", 2, 0.3, stopped_by="drift", message="it drifted")
        else:
            inner(cell, runs_dir, pause)

    folder = create_sweep(parse_sweep(given), tmp_path, "s", "s")
    assert work(folder, train) == "finished"
    found = {name: (one["state"], one["step"]) for name, one in folder.results().items()}
    assert found["s-a-s1"] == ("dropped", 4)
    assert {found[f"s-b-s{seed}"] for seed in (1, 2, 3)} == {("finished", 100)}


@pytest.mark.parametrize("kill", [False, True])
def test_a_round_is_decided_once_though_a_seed_that_failed_then_succeeds_later(
    given: dict, tmp_path: Path, work: Any, monkeypatch: pytest.MonkeyPatch, kill: bool
) -> None:
    given |= {"halving": {"first_steps": 4}, "seeds": [1, 2], "baseline": "a"}
    given["variants"] = given["variants"][:3]
    inner = step_by_step(lambda name, step: {"a": 0.4, "b": 0.5, "c": 0.9}[name])

    def fails(cell: Cell, runs_dir: Path, pause: Any) -> None:
        if cell.run == "s-c-s2":
            raise RuntimeError("the GPU fell off the bus")
        inner(cell, runs_dir, pause)

    folder = create_sweep(parse_sweep(given), tmp_path, "s", "s")
    if kill:  # the decision is there, nothing that follows from it
        with monkeypatch.context() as patched:
            patched.setattr(sweep._Sweep, "_drop", lambda *_: {}["killed"])
            with pytest.raises(KeyError):
                work(folder, fails)
    else:
        assert work(folder, fails, max_runs=7) == "stopped"
    assert work(open_sweep("s", tmp_path), inner) == "finished"
    found = {name: (one["state"], one.get("step")) for name, one in folder.results().items()}
    assert found == {
        **{f"s-{name}-s{seed}": ("finished", 100) for name in "ab" for seed in (1, 2)},
        **{"s-c-s1": ("dropped", 4), "s-c-s2": ("failed", None)},
    }


def test_a_run_that_lacks_its_record_alone_is_none_of_max_runs(
    given: dict, tmp_path: Path, work: Any
) -> None:
    folder = create_sweep(parse_sweep(given), tmp_path, "s", "s")
    leave(tmp_path / "s-a-s1", "finished", 100, 0.5)
    leave(tmp_path / "s-b-s1", "stopped", 2, 0.5, stopped_by="drift", message="it drifted")
    trained = []

    def train(cell: Cell, runs_dir: Path, pause: Any) -> None:
        if cell.contender in "cd":
            trained.append(cell.contender)
            leave(runs_dir / cell.run, "finished", 100, 0.5)

    assert work(folder, train, max_runs=1) == "stopped"
    assert trained == ["c"]
    assert {name: state for name, (state, _) in states(folder).items()} == {
        **{"a": "finished", "b": "dropped", "c": "finished"},
    }


def test_a_stop_asked_for_in_a_run_s_last_moments_stops_the_sweep(
    given: dict, tmp_path: Path, work: Any
) -> None:
    def train(cell: Cell, runs_dir: Path, pause: Any) -> None:
        leave(runs_dir / cell.run, "finished", 100, 0.5, stop_asked=True)

    folder = create_sweep(parse_sweep(given), tmp_path, "s", "s")
    assert work(folder, train) == "stopped"
    assert states(folder) == {"a": ("finished", 100)}


def test_sigterm_where_no_run_is_trained_stops_the_sweep_in_good_order(
    given: dict, tmp_path: Path, work: Any
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def train(cell: Cell, runs_dir: Path, pause: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    folder = create_sweep(parse_sweep(given), tmp_path, "s", "s")
    assert work(folder, train) == "stopped"
    assert folder.state() == "stopped"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_cell_that_fails_in_any_way_is_recorded(given: dict, tmp_path: Path, work: Any) -> None:
    inner = step_by_step(lambda name, step: 0.5)

    def train(cell: Cell, runs_dir: Path, pause: Any) -> None:
        if cell.contender == "a":
            raise ValueError("a template that cannot be rendered")
        inner(cell, runs_dir, pause)

    folder = create_sweep(parse_sweep(given), tmp_path, "s", "s")
    assert work(folder, train) == "finished"
    assert folder.results()["s-a-s1"]["message"].startswith("ValueError: a template")
    assert states(folder)["d"] == ("finished", 100)


def test_a_renamed_sweep_says_so_instead_of_training_all_again(
    given: dict, tmp_path: Path, work: Any
) -> None:
    folder = create_sweep(parse_sweep(given), tmp_path, "s", "s")
    work(folder, step_by_step(lambda name, step: 0.5))
    shutil.copytree(folder.path, tmp_path / "t")
    with pytest.raises(RunError, match="renamed or copied"):
        work(open_sweep("t", tmp_path), step_by_step(lambda name, step: 0.5))


def test_a_sweep_is_opened_from_within_its_folder(
    given: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = create_sweep(parse_sweep(given), tmp_path, "s", "s")
    monkeypatch.chdir(folder.path)
    assert open_sweep(".", Path("runs")).cells[0].run == "s-a-s1"
    assert open_sweep(".", Path("runs")).runs_dir == tmp_path.resolve()


def test_a_sweep_that_cannot_be_written_leaves_its_name_free(
    given: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        path.with_name(f".{path.name}.1.part").touch()
        raise RunError("no room")

    monkeypatch.setattr("gapo_lite.sweep_folder.replace_text", full)
    with pytest.raises(RunError, match="no room"):
        create_sweep(parse_sweep(given), tmp_path, "s", "s")
    assert not (tmp_path / "s").exists()


def test_what_a_kill_leaves_before_a_run_has_its_settings_is_no_run_in_the_way(
    given: dict, tmp_path: Path
) -> None:
    (cell, *_) = create_sweep(parse_sweep(given), tmp_path, "s", "s").cells
    run = Run(tmp_path / cell.run)
    run.path.mkdir()
    for name in (".lock", "train.log", ".config.yaml.77.part"):
        (run.path / name).touch()
    assert not sweep_cells._is_begun(run, cell)
    assert not run.path.exists()


def test_a_run_whose_removal_was_killed_is_removed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "r")
    (run.path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "train.log", ".lock"):
        (run.path / name).touch()
    inner = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda p, **k: None if p == run.path else inner(p, **k))
    remove_run(run)
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]
    monkeypatch.undo()
    remove_run(run)
    assert not run.path.exists()


def test_a_run_that_the_guard_stopped_is_not_trained_on_for_want_of_its_record(
    given: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell, *_) = create_sweep(parse_sweep(given), tmp_path, "s", "s").cells
    run = tmp_path / cell.run
    leave(run, "stopped", 2, 0.9, stopped_by="drift")
    monkeypatch.setattr(sweep_cells, "_is_begun", lambda *_: True)
    monkeypatch.setattr(sweep_cells, "train", lambda *_, **__: pytest.fail("trained on"))
    found = sweep_cells.train_cell(cell, tmp_path, Shared(), lambda _: False, show_progress=False)
    assert found.path == run


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"run": "s-a-s1"}', '{"run": "s-a-s1", "state": 1}', "\0"]
)
def test_a_damaged_record_is_none(given: dict, tmp_path: Path, text: str) -> None:
    folder = create_sweep(parse_sweep(given), tmp_path, "s", "s")
    (folder.path / "cells").mkdir()
    (folder.path / "cells" / "s-a-s1.json").write_text(text)
    assert folder.results() == {}
    assert folder.seconds_left() is None
