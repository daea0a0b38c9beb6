"""The list of runs, whatever state their folders are in."""

from __future__ import annotations

import os

import pytest
from forging import forge_run

from gapo_lite.overview import overview


@pytest.fixture
def run(tiny_settings, tmp_path):
    run = forge_run(tmp_path / "first", tiny_settings, "margin.gamma=0.5")
    run.write("margins.json", {"mean_margin_in_reward_units": 5.0})
    return run


def test_a_run_shows_its_settings_and_its_last_evaluation(run, tmp_path):
    (row,) = overview(tmp_path)
    assert (row.name, row.state, row.problem) == ("first", "finished", "")
    assert (row.objective, row.metric, row.gamma, row.beta) == ("gapo", "rougeL", 0.5, 10.0)
    assert row.target_reward_margin == 5.0
    assert (row.step, row.total, row.accuracy, row.reward_margin) == (4, 4, 0.75, 1.25)


def test_a_run_that_has_just_begun_has_no_results_yet(tiny_settings, tmp_path):
    run = forge_run(tmp_path / "new", tiny_settings, "objective.name=simpo", adapter=False)
    (run.path / "metrics.jsonl").unlink()
    (run.path / "status.json").unlink()
    (row,) = overview(tmp_path)
    assert (row.state, row.problem, row.metric) == ("interrupted", "", None)
    assert (row.accuracy, row.reward_margin, row.target_reward_margin) == (None, None, None)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", b"model: ["),
        ("config.yaml", b"\xff\xfe"),
        ("config.yaml", b""),
        ("status.json", b"{"),
        ("status.json", b"[]"),
        ("metrics.jsonl", b"1\n"),
        ("margins.json", b"\x00"),
    ],
)
def test_a_damaged_folder_is_listed_as_such_beside_the_others(
    run, tiny_settings, tmp_path, file, content
):
    forge_run(tmp_path / "second", tiny_settings)
    (run.path / file).write_bytes(content)
    rows = {row.name: row for row in overview(tmp_path)}
    assert rows["first"].state == "damaged"
    assert rows["first"].problem
    assert rows["second"].state == "finished"


def test_a_run_without_its_configuration_is_damaged_and_other_folders_are_no_runs(run, tmp_path):
    (run.path / "config.yaml").unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    assert [(row.name, row.state) for row in overview(tmp_path)] == [("first", "damaged")]


def test_runs_are_in_the_order_in_which_they_began(run, tiny_settings, tmp_path):
    later = forge_run(tmp_path / "a-later", tiny_settings)
    os.utime(run.path / "config.yaml", (0, 0))
    os.utime(later.path / "config.yaml", (100, 100))
    assert [row.name for row in overview(tmp_path)] == ["first", "a-later"]


def test_no_folder_is_no_runs(tmp_path):
    assert overview(tmp_path / "nothing") == []
