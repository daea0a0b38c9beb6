"""Sweeps of the tiny model: cells, kills, budgets, halving."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gapo_lite.errors import ConfigError, RunError
from gapo_lite.runs import open_run
from gapo_lite.sweep import Budget, run_sweep
from gapo_lite.sweep_config import parse_sweep
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
