"""A sweep's folder, read while it is half there, damaged or strange."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sweeping import SETTINGS, add_cell, forge_sweep, write

from gapo_lite.errors import ConfigError, RunError
from gapo_lite.sweep_results import read_sweep_results


def test_a_cell_is_read_with_its_changes_of_logps(tmp_path):
    folder = forge_sweep(tmp_path)
    add_cell(folder, "gapo", 2, accuracy=0.75, chosen=0.2, tokens=123.0)
    results = read_sweep_results(folder)
    gapo = results.contenders[1]
    assert gapo.values("accuracy") == {2: 0.75}
    assert gapo.values("tokens") == {2: 123.0}
    # chosen: −1.6 after −1.8; rejected: −1.8 after −1.82
    assert gapo.values("chosen_change")[2] == pytest.approx(0.2)
    assert gapo.values("rejected_change")[2] == pytest.approx(0.02)
    assert (results.count("finished"), results.count("missing")) == (1, 5)


def test_what_was_run_is_known_by_its_public_names(tmp_path):
    folder = forge_sweep(tmp_path)
    add_cell(folder, "simpo", 1)
    results = read_sweep_results(folder)
    assert results.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert results.data == "embedded:everyday"
    assert results.num_train == 400
    assert results.started == "2026-11-28"
    assert results.machines == ("2 CPU cores, no GPU",)
    assert results.versions == ("python 3.11.9, torch 2.13.0, transformers 5.23.0",)
    assert results.base_answers == {"tokens": 90.0, "cut_short": 0.25, "repetition": 0.04}


def test_margins_are_in_reward_units_and_only_of_objectives_that_have_them(tmp_path):
    settings = SETTINGS | {"ipo": {"objective.name": "ipo"}}
    folder = forge_sweep(tmp_path, contenders=settings)
    for name in settings:
        add_cell(folder, name, 1)
    simpo, gapo, ipo = read_sweep_results(folder).contenders
    kept = json.loads((tmp_path / "sweep-gapo-s1" / "margins.json").read_text())
    np.testing.assert_allclose(gapo.margins.edges, 10 * np.array(kept["margin_histogram"]["edges"]))
    assert gapo.ef.counts.sum() == 400
    assert (gapo.metric, simpo.metric, ipo.metric) == ("rougeL", None, None)
    assert simpo.margins is not None
    assert simpo.ef is None
    assert ipo.margins is None


def test_failed_and_dropped_runs_do_not_count(tmp_path):
    folder = forge_sweep(tmp_path)
    add_cell(folder, "gapo", 1, accuracy=0.9, state="dropped", stopped_by="halving", step=4)
    run = "sweep-gapo-s2"
    write(
        folder / "cells" / f"{run}.json",
        {"run": run, "contender": "gapo", "seed": 2, "state": "failed", "message": "no memory"},
    )
    gapo = read_sweep_results(folder).contenders[1]
    assert gapo.values("accuracy") == {}
    assert [cell.state for cell in gapo.cells] == ["dropped", "failed", "missing"]
    assert gapo.cells[1].message == "no memory"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"run": ', "\x00\x01", "[" * 100_000],
    ids=["empty", "torn", "list", "null", "cut", "binary", "deep"],
)
def test_a_damaged_cell_is_left_out_and_said_to_be(tmp_path, text):
    folder = forge_sweep(tmp_path)
    add_cell(folder, "simpo", 1)
    (folder / "cells" / "sweep-gapo-s1.json").write_text(text)
    results = read_sweep_results(folder)
    assert results.count("finished") == 1
    assert results.problems == ("cells/sweep-gapo-s1.json is damaged and was left out",)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (math.nan, math.nan),
        (-math.inf, math.nan),
        (1e300, math.nan),
        ("0.7", math.nan),
        (True, math.nan),
        ([], math.nan),
        (10**400, math.nan),
        (1, 1.0),
    ],
)
def test_any_value_is_read_as_a_number_or_as_none(tmp_path, value, read):
    folder = forge_sweep(tmp_path)
    record = add_cell(folder, "gapo", 1)
    tuned = record["tuned"] | {"logps/accuracies": value}
    add_cell(folder, "gapo", 1, tuned=tuned)
    found = read_sweep_results(folder).contenders[1].values("accuracy")[1]
    assert found == read or (math.isnan(found) and math.isnan(read))


@pytest.mark.parametrize(
    "damage",
    [
        {"tuned": None, "base": [1], "answers": "x", "by_ef": {"low": 1}},
        {"tuned": {}, "base": {}, "by_ef": [None, 3, {"low": "x"}], "num_heldout": -5},
        {"step": 1e300, "total": math.nan, "state": None, "message": None},
    ],
)
def test_records_of_another_shape_do_not_stop_the_reading(tmp_path, damage):
    folder = forge_sweep(tmp_path)
    add_cell(folder, "simpo", 1, **damage)
    write(folder / "base.json", [])
    write(folder / "sweep-status.json", {"started": "yesterday"})
    write(
        tmp_path / "sweep-simpo-s1" / "margins.json", {"ef_histogram": {"counts": [1], "edges": []}}
    )
    write(tmp_path / "sweep-simpo-s1" / "environment.json", {"versions": 3, "cpu_count": "many"})
    results = read_sweep_results(folder)
    assert results.started == ""
    assert len(results.cells) == 6


@pytest.mark.parametrize(
    "histogram",
    [
        {"counts": [1, 2], "edges": [0, 1]},
        {"counts": [1, 2], "edges": [0, 0, 1]},
        {"counts": [0, 0], "edges": [0, 1, 2]},
        {"counts": [1, math.nan], "edges": [0, 1, 2]},
        {"counts": [-1, 2], "edges": [0, 1, 2]},
        {"counts": ["a", 2], "edges": [0, 1, 2]},
        {"counts": [[1], [2]], "edges": [0, 1, 2]},
    ],
)
def test_a_histogram_that_cannot_be_drawn_is_none(tmp_path, histogram):
    folder = forge_sweep(tmp_path)
    add_cell(folder, "gapo", 1)
    write(tmp_path / "sweep-gapo-s1" / "margins.json", {"ef_histogram": histogram})
    assert read_sweep_results(folder).contenders[1].ef is None


def test_cells_of_other_runs_are_left_out_and_said_to_be(tmp_path):
    folder = forge_sweep(tmp_path)
    write(folder / "cells" / "other.json", {"run": "other", "state": "finished"})
    results = read_sweep_results(folder)
    assert results.count("finished") == 0
    assert results.problems == ("1 cells are of runs that the sweep does not name",)


def test_a_folder_that_is_no_sweeps_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"holds no sweep\.yaml"):
        read_sweep_results(tmp_path)
    folder = forge_sweep(tmp_path)
    (folder / "sweep.yaml").write_text("variants: [\x00")
    with pytest.raises(ConfigError):
        read_sweep_results(folder)
