"""The drift guard: what it makes of evaluations, and what it does to a run."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from commands import call
from forging import numbers, run_of, settings_with

from gapo_lite.checkpoints import commit_checkpoint, list_checkpoints, stage_path
from gapo_lite.compare import adapter_step
from gapo_lite.config import parse_config
from gapo_lite.drift import FALL, LOGPS, falls_of, last_good_step, look, with_fall
from gapo_lite.errors import ConfigError
from gapo_lite.run_callback import RunCallback
from gapo_lite.runs import Run


def evaluations(*logps, every=4):
    return [{"step": every * i, LOGPS: value} for i, value in enumerate(logps)]


def logged(folder, *logps) -> Run:
    """A run with these evaluations, at steps 0, 4, 8 …, and a training row between them."""
    run = Run(folder)
    folder.mkdir(exist_ok=True)
    for row in evaluations(*logps):
        run.append("metrics.jsonl", row)
        run.append("metrics.jsonl", {"step": row["step"] + 1, "logps/chosen": -9.0})
    return run


def saved(run: Run, step: int, keep: int = 100, good: int | None = None) -> None:
    stage = stage_path(run.checkpoints, step)
    stage.mkdir(parents=True)
    (stage / "adapter_model.safetensors").write_text(str(step))
    commit_checkpoint(run.checkpoints, step, keep, good)


def steps_of(run: Run) -> list[int]:
    return [step for step, _ in list_checkpoints(run.checkpoints)]


# -- what evaluations say --


def test_a_fall_is_counted_from_the_base_model(tmp_path):
    falls = falls_of(logged(tmp_path, -1.0, -1.25, -0.5).metrics())
    assert [(fall.step, fall.nats) for fall in falls] == [(0, 0.0), (4, 0.25), (8, -0.5)]


def test_without_the_base_models_evaluation_there_is_nothing_to_count_from(tmp_path):
    assert falls_of(evaluations(-1.0, -9.0)[1:]) == falls_of([]) == falls_of([{"step": 0}]) == []
    assert falls_of(evaluations(math.nan, -9.0)) == []
    assert last_good_step([], 0.5) is None
    assert look(Run(tmp_path), 0.5) is None


def test_a_fall_of_just_the_limit_is_within_it(tmp_path):
    assert look(logged(tmp_path / "at", -1.0, -1.5), 0.5) is None
    found = look(logged(tmp_path / "beyond", -1.0, -1.5, -1.75), 0.5)
    assert found is not None
    assert (found.fall.step, found.fall.nats, found.good_step) == (8, 0.75, 4)


def test_it_is_new_once_and_again_after_a_recovery(tmp_path):
    news = []
    for count in range(1, 8):
        run = logged(tmp_path / str(count), *(-1.0, -2.0, -2.0, -1.1, -1.2, -2.0, -2.5)[:count])
        found = look(run, 0.5)
        news.append(found and found.is_new)
    assert news == [None, True, False, None, None, True, False]


def test_what_is_not_a_number_is_beyond_the_limit(tmp_path):
    run = logged(tmp_path, -1.0, -1.1, math.nan)
    found = look(run, 0.5)
    assert found is not None
    assert found.good_step == 4
    assert last_good_step(run.metrics(), 0.5) == 4
    assert look(run, None) is None


def test_the_fall_stands_in_the_metrics_of_the_evaluation():
    assert with_fall({LOGPS: -2.0}, 0, []) == {LOGPS: -2.0, FALL: 0.0}
    assert with_fall({LOGPS: -2.5, "eval/loss": 1.0}, 4, evaluations(-2.0))[FALL] == 0.5
    assert with_fall({LOGPS: -2.5}, 4, []) == {LOGPS: -2.5}


def test_the_message_names_step_numbers_checkpoint_and_remedy(tmp_path):
    run = logged(tmp_path, -1.0, -1.2, -1.75)
    found = look(run, 0.5)
    assert "No checkpoint was saved by step 4" in found.farewell()
    assert "that of step 8: lower training.save_steps" in found.farewell()
    for step in (2, 6):
        saved(run, step)
    found = look(run, 0.5)
    assert found.good == run.checkpoints / "checkpoint-2"
    for text in (found.warning(), found.farewell()):
        for part in ("step 8", "0.75", "-1.00 → -1.75", "max_chosen_fall is 0.5", "checkpoint-2"):
            assert part in text
        assert "training.learning_rate" in text
    assert "stopped it" not in found.warning()


# -- which checkpoints are kept --


def test_the_last_checkpoint_within_the_limit_outlives_the_rotation(tmp_path):
    run = Run(tmp_path)
    for step, good in ((2, 0), (4, 4), (6, 4), (8, 4), (10, 4)):
        saved(run, step, keep=2, good=good)
    assert steps_of(run) == [4, 8, 10]
    saved(run, 12, keep=2, good=12)
    assert steps_of(run) == [10, 12]
    saved(run, 14, keep=1)
    assert steps_of(run) == [14]


def test_a_damaged_checkpoint_is_not_taken_for_good(tmp_path):
    run = logged(tmp_path, -1.0, -1.0, -1.0, -9.0)
    for step in (4, 8):
        saved(run, step)
    assert look(run, 0.5).good.name == "checkpoint-8"
    (run.checkpoints / "checkpoint-8" / "adapter_model.safetensors").write_text("?")
    assert look(run, 0.5).good.name == "checkpoint-4"


# -- runs --


@pytest.fixture(scope="module")
def falling(tiny_settings, tmp_path_factory):
    """Settings of a run, the run without a guard, and a limit that the evaluations at steps 4 and 6
    lie beyond and all others within."""
    settings = settings_with(
        tiny_settings,
        margin={"gamma": 3},
        training={
            "learning_rate": 3e-2,
            "schedule": "constant",
            "eval_steps": 2,
            "save_steps": 1,
            "keep_checkpoints": 1,
            "sample_prompts": ["Why is the sky blue?"],
            "sample_max_tokens": 4,
            "max_chosen_fall": None,
        },
    )
    run = run_of(settings, tmp_path_factory.mktemp("falling"), name="free")
    falls = {fall.step: fall.nats for fall in falls_of(run.metrics())}
    beyond = min(falls.pop(4), falls.pop(6))
    assert beyond > max(falls.values())
    return settings, run, (beyond + max(falls.values())) / 2


def guarded(falling, on_drift):
    settings, _, limit = falling
    return settings_with(settings, training={"max_chosen_fall": limit, "on_drift": on_drift})


def warnings_of(run: Run) -> list[str]:
    lines = (run.path / "train.log").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if "max_chosen_fall" in line]


def test_it_warns_once_and_changes_nothing(falling, tmp_path):
    run = run_of(guarded(falling, "warn"), tmp_path, name="warned")
    assert numbers(run) == numbers(falling[1])
    (warning,) = warnings_of(run)
    assert "WARNING At step 4 " in warning
    assert "checkpoint-2" in warning
    assert run.state() == "finished"
    assert "message" not in run.read("status.json")  # it has recovered
    rows = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert {row["repetition"] for row in rows} == {0.0}
    falls = [row[FALL] for row in run.metrics() if LOGPS in row]
    assert falls == [fall.nats for fall in falls_of(run.metrics())]


def test_it_stops_with_the_last_good_adapter_and_says_which(falling, tmp_path):
    settings = guarded(falling, "stop")
    config = tmp_path / "falling.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    result = call("train", config, "--runs-dir", tmp_path)
    run = Run(tmp_path / "falling")
    assert result.exit_code == 130, result.stderr
    check_stopped(run, step=4)
    assert run.read("status.json")["message"] in result.stdout
    assert len(warnings_of(run)) == 1
    assert len(numbers(run)) < len(numbers(falling[1]))

    run_of(settings, tmp_path, resume="falling")  # who goes on regardless is stopped again
    check_stopped(run, step=6)


def check_stopped(run: Run, step: int) -> None:
    status = run.read("status.json")
    assert (run.state(), status["step"], status["total"]) == ("stopped", step, 12)
    assert (status["last_good_checkpoint"], status["adapter_step"]) == ("checkpoint-2", 2)
    assert status["stopped_by"] == "drift"
    assert f"At step {step} " in status["message"]
    assert "adapter/ is that of checkpoint-2" in status["message"]
    assert steps_of(run) == [2, step]
    weights = "adapter_model.safetensors"
    good, newest = (run.checkpoints / f"checkpoint-{at}" / weights for at in (2, step))
    assert (run.adapter / weights).read_bytes() == good.read_bytes() != newest.read_bytes()
    assert (run.adapter / "adapter_config.json").is_file()
    assert not list(run.adapter.glob("optimizer*"))
    assert adapter_step(run, run.trained_adapter()) == 2


def test_a_run_killed_beyond_the_limit_forgets_nothing_and_warns_once(
    falling, tmp_path, monkeypatch
):
    on_step_end, seen = RunCallback.on_step_end, {}

    def dying(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        seen[state.global_step] = self.run.read("status.json")
        if state.global_step == 6 and 7 not in seen and "killed" not in seen:
            seen["killed"] = {}
            raise MemoryError  # no one writes anything after it, as after kill -9

    monkeypatch.setattr(RunCallback, "on_step_end", dying)
    settings = guarded(falling, "warn")
    with pytest.raises(MemoryError):
        run_of(settings, tmp_path, name="killed")
    run = Run(tmp_path / "killed")
    assert (run.state(), steps_of(run)) == ("interrupted", [2, 5])
    del seen[6]
    run_of(settings, tmp_path, resume="killed")
    for step in (5, 6):
        assert "At step 4 " in seen[step]["message"]
        assert seen[step]["last_good_checkpoint"] == "checkpoint-2"
    assert numbers(run) == numbers(falling[1])
    assert len(warnings_of(run)) == 1
    assert steps_of(run) == [12]


def test_stop_needs_pairs_to_look_at_and_a_limit(tiny_settings):
    stop = settings_with(tiny_settings, training={"on_drift": "stop"})
    assert parse_config(stop).training.max_chosen_fall == 0.5
    nothing = settings_with(stop, data={"heldout_source": None, "heldout_fraction": 0})
    for settings, overrides in ((nothing, []), (stop, ["training.max_chosen_fall=null"])):
        with pytest.raises(ConfigError, match="training: on_drift: stop looks at held-out pairs"):
            parse_config(settings, overrides)
    assert parse_config(nothing, ["training.on_drift=warn"])
    with pytest.raises(ConfigError, match="max_chosen_fall"):
        parse_config(stop, ["training.max_chosen_fall=0"])
