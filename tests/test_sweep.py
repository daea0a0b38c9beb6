"""Sweeps of the tiny model: cells, kills, budgets, halving."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from gapo_lite import answering
from gapo_lite.chat import Voice, base_voice
from gapo_lite.cli import app
from gapo_lite.config import ModelConfig
from gapo_lite.errors import ConfigError, DataError, RunError
from gapo_lite.report import write_report
from gapo_lite.runs import open_run
from gapo_lite.sweep import Budget, run_sweep
from gapo_lite.sweep_cells import measure_answers
from gapo_lite.sweep_config import Answers, parse_sweep
from gapo_lite.sweep_folder import SweepFolder, create_sweep, list_sweeps, open_sweep

VARIANTS = [
    {"name": "simpo", "settings": {"objective.name": "simpo"}},
    {"name": "gapo", "settings": {}},
]


@pytest.fixture
def given(tiny_settings: dict) -> dict:
    """A sweep of two contenders and two seeds, 4 steps each."""
    return {
        "base": tiny_settings,
        "settings": {"training.max_steps": 4, "training.eval_steps": 100},
        "variants": VARIANTS,
        "seeds": [1, 2],
        "baseline": "simpo",
        "answers": {"prompts": 2, "max_tokens": 6},
    }


def new(given: dict, folder: Path, name: str = "s") -> SweepFolder:
    return create_sweep(parse_sweep(given), folder, name, "sweep")


def told(folder: SweepFolder, **kwargs: object) -> tuple[str, list[str]]:
    lines: list[str] = []
    state = run_sweep(folder, show_progress=False, tell=lines.append, **kwargs)
    return state, lines


def test_a_sweep_trains_every_cell_as_an_ordinary_run(given: dict, tmp_path: Path) -> None:
    folder = new(given, tmp_path)
    state, lines = told(folder)
    assert state == folder.state() == "finished"
    runs = ["s-simpo-s1", "s-gapo-s1", "s-simpo-s2", "s-gapo-s2"]
    assert [cell.run for cell in folder.cells] == runs
    results = folder.results()
    assert sorted(results) == sorted(runs)
    for name, record in results.items():
        run = open_run(name, tmp_path)
        assert run.state() == record["state"] == "finished"
        assert record["step"] == record["total"] == 4
        assert record["stopped_by"] is None
        rows = [row for row in run.metrics() if "eval/loss" in row]
        assert [row["step"] for row in rows] == [0, 4]
        for side, row in (("base", rows[0]), ("tuned", rows[-1])):
            for key, value in record[side].items():
                assert value == pytest.approx(row[f"eval/{key}"], abs=1e-9), key
        assert sum(group["num_pairs"] for group in record["by_ef"]) == record["num_heldout"]
        assert record["answers"]["num_prompts"] == 2
        assert 1 <= record["answers"]["mean_tokens"] <= 6
        assert len((run.path / "answers.jsonl").read_text("utf-8").splitlines()) == 2
    assert folder.read("base.json")["answers"]["num_prompts"] == 2
    assert list_sweeps(tmp_path)[0].name == "s"
    assert any("cell 4 of 4: gapo, seed 2" in line and "left" in line for line in lines)
    assert told(folder)[1] == []  # nothing is trained again


def run_of(folder: SweepFolder, index: int = 0) -> Path:
    return folder.runs_dir / folder.cells[index].run


def adapter_bytes(folder: SweepFolder, index: int) -> bytes:
    return (run_of(folder, index) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def quick(given: dict) -> dict:
    """One seed and no answers."""
    return {**given, "seeds": [1], "answers": None}


def test_a_cell_is_what_the_same_configuration_trains_alone(quick: dict, tmp_path: Path) -> None:
    """Whatever was trained in the process before it."""
    from gapo_lite.training import train

    folder = new(quick, tmp_path)
    told(folder)
    alone = train(folder.cells[1].config, name="alone", runs_dir=tmp_path, show_progress=False)
    file = "adapter/adapter_model.safetensors"
    assert (alone.path / file).read_bytes() == adapter_bytes(folder, 1)


def test_cells_of_different_precision_follow_each_other(quick: dict, tmp_path: Path) -> None:
    quick |= {"variants": [], "grid": {"model.precision": ["float32", "bfloat16"]}}
    quick |= {"baseline": None}
    folder = new(quick, tmp_path)
    assert told(folder)[0] == "finished"
    assert [r["state"] for r in folder.results().values()] == ["finished", "finished"]


def test_a_source_that_cannot_be_read_fails_its_own_cells_alone(
    given: dict, tmp_path: Path
) -> None:
    sources = {"torn": str(tmp_path / "none.jsonl"), "whole": given["base"]["data"]["source"]}
    given["variants"] = [{"name": k, "settings": {"data.source": v}} for k, v in sources.items()]
    given |= {"baseline": None, "seeds": [1]}
    folder = new(given, tmp_path)
    assert told(folder)[0] == "finished"
    states = {record["contender"]: record["state"] for record in folder.results().values()}
    assert states == {"torn": "failed", "whole": "finished"}
    assert folder.read("base.json") == {"answers": None}  # there is no one set of prompts
    write_report(folder.path)


KILLED = """
import sys
from pathlib import Path
from gapo_lite import sweep, trainer
from gapo_lite.sweep_folder import open_sweep
import os, signal
stop_at = sys.argv[3]
steps = []
def kill(): os.kill(os.getpid(), signal.SIGKILL)
if stop_at.startswith("step"):
    inner = trainer.GapoTrainer.training_step
    def step(self, *args, **kwargs):
        steps.append(1)
        if len(steps) > int(stop_at[4:]): kill()
        return inner(self, *args, **kwargs)
    trainer.GapoTrainer.training_step = step
elif stop_at == "record":
    sweep.cell_record = lambda *a, **k: kill()
elif stop_at == "begun":
    from gapo_lite import training
    training.write_beginnings = lambda *a: kill()
sweep.run_sweep(open_sweep(sys.argv[1], Path(sys.argv[2])), show_progress=False)
"""


def killed(folder: SweepFolder, where: str) -> None:
    arguments = [folder.name, str(folder.runs_dir), where]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert folder.state() == "interrupted"


@pytest.mark.slow
def test_a_sweep_killed_anywhere_ends_as_if_it_never_was(quick: dict, tmp_path: Path) -> None:
    """In the middle of a run, before its first checkpoint, before it has its settings, and between
    its end and its record."""
    quick["settings"] |= {"training.save_steps": 2}
    whole = new(quick, tmp_path / "whole")
    told(whole)
    folder = new(quick, tmp_path / "killed")
    for where in ("begun", "step1", "step5", "record"):
        killed(folder, where)
    assert told(folder)[0] == "finished"
    for index, cell in enumerate(folder.cells):
        assert adapter_bytes(folder, index) == adapter_bytes(whole, index)
        one, other = folder.results()[cell.run], whole.results()[cell.run]
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    names = {path.name for path in folder.runs_dir.iterdir()}
    assert names == {"s", *(cell.run for cell in folder.cells)}


def test_finished_cells_are_never_trained_again(quick: dict, tmp_path: Path) -> None:
    folder = new(quick, tmp_path)
    assert told(folder, budget=Budget(max_runs=1))[0] == "stopped"
    assert folder.state() == "stopped"
    assert list(folder.results()) == ["s-simpo-s1"]
    before = (run_of(folder) / "metrics.jsonl").stat().st_mtime_ns
    state, lines = told(folder)
    assert state == "finished"
    assert [line.split(":")[0] for line in lines if line.startswith("cell")] == ["cell 2 of 2"]
    assert (run_of(folder) / "metrics.jsonl").stat().st_mtime_ns == before


def test_hours_stop_the_run_under_way_and_it_goes_on_later(quick: dict, tmp_path: Path) -> None:
    folder = new(quick, tmp_path)
    budget = Budget(hours=1.0)
    budget.began -= 3600  # they are over at the first look
    assert told(folder, budget=budget)[0] == "stopped"
    assert not folder.results()

    class Short(Budget):
        def spent(self) -> str:
            return Budget.spent(self) if self.used_runs else ""

    budget = Short(hours=1.0)
    budget.began -= 3600
    state, lines = told(folder, budget=budget)
    assert state == "stopped"
    assert "its 1 hours are over" in lines[-1]
    assert open_run("s-simpo-s1", tmp_path).state() == "stopped"
    assert told(folder)[0] == "finished"


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="POSIX")
def test_sigterm_saves_the_run_under_way_and_stops_the_sweep(quick: dict, tmp_path: Path) -> None:
    quick["settings"] |= {"training.max_steps": 2000}
    folder = new(quick, tmp_path)
    command = [sys.executable, "-m", "gapo_lite", "sweep", "--resume", str(folder.path)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        metrics = run_of(folder) / "metrics.jsonl"
        while not (metrics.exists() and '"loss"' in metrics.read_text()):
            assert time.monotonic() < deadline, "no step was logged"
            time.sleep(0.2)
        with pytest.raises(RunError, match="another process"):
            run_sweep(folder, show_progress=False)
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == 130, err
    assert "0 of 2 runs finished" in out
    assert "--resume" in err
    assert folder.state() == "stopped"
    assert open_run("s-simpo-s1", tmp_path).state() == "stopped"


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(quick: dict, tmp_path: Path) -> None:
    quick["variants"] = [{"name": "bad", "settings": {"model.name": "/nowhere"}}, VARIANTS[1]]
    quick["baseline"] = "gapo"
    folder = new(quick, tmp_path)
    assert told(folder)[0] == "finished"
    states = {name: record["state"] for name, record in folder.results().items()}
    assert states == {"s-bad-s1": "failed", "s-gapo-s1": "finished"}
    assert "/nowhere" in folder.results()["s-bad-s1"]["message"]
    assert not (tmp_path / "s-bad-s1").exists()
    assert [line for line in told(folder)[1] if line.startswith("cell")] != []  # tried anew


def test_three_failures_in_a_row_end_the_sweep(quick: dict, tmp_path: Path) -> None:
    quick |= {"seeds": [1, 2, 3, 4], "variants": [], "baseline": None}
    quick["settings"] |= {"model.name": "/nowhere"}
    folder = new(quick, tmp_path)
    with pytest.raises(RunError, match="3 cells in a row"):
        run_sweep(folder, show_progress=False)
    assert folder.state() == "failed"
    assert len(folder.results()) == 3


def test_halving_drops_the_worse_and_its_decision_survives_a_stop(
    given: dict, tmp_path: Path
) -> None:
    given |= {
        "variants": [
            {"name": "still", "settings": {"training.learning_rate": 1e-12}},
            {"name": "gapo", "settings": {}},
            {"name": "simpo", "settings": {"objective.name": "simpo"}},
        ],
        "halving": {"first_steps": 2, "keep": 0.34, "growth": 2, "metric": "rewards/margins"},
        "seeds": [1],
        "answers": None,
        "baseline": None,
    }
    given["settings"] |= {"training.max_steps": 6}
    folder = new(given, tmp_path)
    while told(folder, budget=Budget(max_runs=1))[0] != "finished":
        pass
    results = {record["contender"]: record for record in folder.results().values()}

    def margin(name: str, step: int) -> float:
        rows = open_run(f"s-{name}-s1", tmp_path).metrics()
        return next(
            row["eval/rewards/margins"]
            for row in rows
            if row["step"] == step and "eval/loss" in row
        )

    first = min(results, key=lambda name: margin(name, 2))
    second = min(set(results) - {first}, key=lambda name: margin(name, 4))
    ended = {name: (record["state"], record["step"]) for name, record in results.items()}
    (best,) = set(results) - {first, second}
    assert ended == {first: ("dropped", 2), second: ("dropped", 4), best: ("finished", 6)}
    assert results[first]["stopped_by"] == results[second]["stopped_by"] == "halving"
    assert results["still"]["tuned"]["rewards/margins"] == pytest.approx(
        results["still"]["base"]["rewards/margins"], abs=1e-6
    )


def test_a_run_that_drifts_is_recorded_as_such(quick: dict, tmp_path: Path) -> None:
    quick |= {"variants": [], "baseline": None}
    quick["settings"] |= {"training.eval_steps": 1, "training.learning_rate": 0.1}
    quick["settings"] |= {"training.max_chosen_fall": 1e-4, "training.on_drift": "stop"}
    folder = new(quick, tmp_path)
    assert told(folder)[0] == "finished"
    (record,) = folder.results().values()
    assert (record["state"], record["stopped_by"]) == ("dropped", "drift")
    assert record["step"] < 4
    assert "1 stopped by the drift guard" in write_report(folder.path)[1].read_text("utf-8")


def test_a_run_in_the_way_is_told_before_anything_is_trained(quick: dict, tmp_path: Path) -> None:
    (tmp_path / "s-gapo-s1").mkdir(parents=True)
    with pytest.raises(RunError, match="s-gapo-s1"):
        new(quick, tmp_path)
    assert not (tmp_path / "s").exists()


def test_data_that_change_between_cells_stop_the_sweep(quick: dict, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    rows = Path(quick["base"]["data"]["source"]).read_text("utf-8").splitlines()
    source.write_text("\n".join(rows), "utf-8")
    quick["settings"] |= {"data.source": str(source)}
    folder = new(quick, tmp_path)
    told(folder, budget=Budget(max_runs=1))
    changed = json.loads(rows[0]) | {"chosen": "Something else."}
    source.write_text("\n".join([json.dumps(changed), *rows[1:]]), "utf-8")
    with pytest.raises(RunError, match="have changed since s-simpo-s1"):
        told(folder)
    assert folder.state() == "failed"
    assert list(folder.results()) == ["s-simpo-s1"]


def test_judged_data_are_asked_about_their_gaps(quick: dict, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    rows = [
        json.loads(line)
        for line in Path(quick["base"]["data"]["source"]).read_text("utf-8").splitlines()
    ]
    rows = [{**row, "strength": index / 30} for index, row in enumerate(rows)]
    source.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    quick["settings"] |= {"data.source": str(source)}
    folder = new(quick, tmp_path)
    told(folder, budget=Budget(max_runs=1))
    agreement = folder.read("agree.json")
    assert agreement["judgement"] == "strength"
    assert [row["metric"] for row in agreement["metrics"]] == ["rougeL"]


def test_a_sweep_is_not_a_run_and_is_found_by_name_or_folder(quick: dict, tmp_path: Path) -> None:
    from gapo_lite.overview import overview

    folder = new(quick, tmp_path, "found")
    assert open_sweep("found", tmp_path).path == open_sweep(folder.path, Path("else")).path
    assert overview(tmp_path) == []
    assert folder.state() == "interrupted" or folder.state() == "starting"
    with pytest.raises(RunError, match=r"there is no sweep 'lost'\. Sweeps in .*: found"):
        open_sweep("lost", tmp_path)


def test_a_name_or_contender_too_long_for_a_run_is_refused(quick: dict, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="100 are the most"):
        new(quick, tmp_path, "s" * 95)


def test_several_processes_are_refused(
    quick: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new(quick, tmp_path)

    class Two:
        num_processes = 2

    monkeypatch.setattr("gapo_lite.sweep.PartialState", Two)
    with pytest.raises(ConfigError, match="single process"):
        run_sweep(folder)


# -- answers --

PROMPTS = [[{"role": "user", "content": "Say " + "more " * n}] for n in range(5)]
SYSTEM = [{"role": "system", "content": "Answer in French."}]
HISTORY = [{"role": "user", "content": "I am Ada."}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def voice(tiny_settings: dict) -> Voice:
    return base_voice(ModelConfig(**tiny_settings["model"]))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_answers_are_written_with_all_that_was_asked(voice: Voice, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    asked = [PROMPTS[0], [*SYSTEM, *HISTORY, *PROMPTS[1]]]
    measure_answers(voice, asked, Answers(max_tokens=4), out)
    assert [row["prompt"] for row in lines_of(out)] == [PROMPTS[0][0]["content"], asked[1]]
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_where_memory_runs_out_fewer_are_answered_at_once(
    voice: Voice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, whole, out = Answers(max_tokens=4), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    expected = measure_answers(voice, PROMPTS, how, whole)
    inner, sizes = answering.answer_batch, []

    def small(model: object, tokenizer: object, conversations: list, **options: object) -> list:
        sizes.append(len(conversations))
        if len(conversations) > 2:
            raise torch.OutOfMemoryError("no room")
        return inner(model, tokenizer, conversations, **options)

    monkeypatch.setattr(answering, "answer_batch", small)
    assert measure_answers(voice, PROMPTS, how, out) == expected
    assert sizes == [5, 2, 2, 1]
    assert out.read_bytes() == whole.read_bytes()


def test_prompts_beyond_the_model_s_context_are_no_part_of_the_means(
    voice: Voice, tmp_path: Path
) -> None:
    context = voice.context or 0
    long = [{"role": "user", "content": "word " * context}]
    found = measure_answers(voice, [long, PROMPTS[0]], Answers(max_tokens=4), tmp_path / "a.jsonl")
    assert found["num_prompts"] == 1
    assert f"reads {context} tokens at once" in lines_of(tmp_path / "a.jsonl")[0]["problem"]
    with pytest.raises(DataError, match="none of 1 held-out prompts could be answered"):
        measure_answers(voice, [long], Answers(max_tokens=4), tmp_path / "b.jsonl")


# -- the command --


@pytest.fixture
def file(quick: dict, tmp_path: Path) -> Path:
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(quick), encoding="utf-8")
    return path


def command(*arguments: object) -> tuple[str, str]:
    """What it says on stdout and on stderr."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_a_dry_run_of_a_begun_sweep_lists_what_is_to_come_and_trains_nothing(
    quick: dict, tmp_path: Path
) -> None:
    folder = new(quick, tmp_path)
    told(folder, budget=Budget(max_runs=1))
    out, err = command("sweep", "--resume", "s", "--runs-dir", tmp_path, "--dry-run")
    assert out.split() == ["s-gapo-s1"]
    assert "1 of 2 runs are to come. Nothing was trained." in err
    assert not (tmp_path / "s-gapo-s1").exists()


def test_the_end_of_a_sweep_names_the_command_of_its_report(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gapo_lite.sweep.run_sweep", lambda *_, **__: "finished")
    monkeypatch.chdir(tmp_path)
    assert "gapo-lite report file\n" in command("sweep", file)[1]
    assert "gapo-lite report file-2\n" in command("sweep", file)[1]
    elsewhere = tmp_path / "my runs"
    err = command("sweep", file, "--runs-dir", elsewhere)[1]
    assert f"gapo-lite report '{elsewhere}/file'\n" in err


def test_the_end_of_a_sweep_tells_drift_from_halving(
    quick: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gapo_lite.sweep.run_sweep", lambda *_, **__: "finished")
    folder = new(quick, tmp_path)
    for cell, by in zip(folder.cells, ("drift", "halving"), strict=True):
        folder.record({"run": cell.run, "state": "dropped", "stopped_by": by})
    out = command("sweep", "--resume", folder.path)[0]
    assert "0 of 2 runs finished, 1 stopped by the drift guard, 1 dropped" in out
