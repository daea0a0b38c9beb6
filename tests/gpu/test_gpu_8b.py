"""benchmarks/gpu_8b.py on a GPU: all of it on a small model, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from checkout import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SCRIPT = ROOT / "benchmarks" / "gpu_8b.py"


def command(file):
    small = ("--tiny", "--parts", "quick", "--steps", "1", "--warmup", "1")
    return [sys.executable, str(SCRIPT), *small, "--json", str(file)]


def test_the_quick_part_measures_trl_and_ours_first_then_levers_and_a_card(tmp_path):
    file = tmp_path / "result.json"
    done = subprocess.run(command(file), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    quick = json.loads(file.read_text())["quick"]
    assert quick["complete"]
    rows = quick["measurements"]
    beside_trl = [(row["contender"], row["pairs"]) for row in rows if not row["lever"]]
    assert beside_trl == [("trl", 8), ("trl", 2), ("gapo-lite", 8), ("gapo-lite", 2)]
    assert rows[5]["lever"] == "all that is faster"
    assert rows[-1]["cap_gib"] == 12
    assert len(rows) == 18
    failed = {row["lever"]: row["failed"] for row in rows if "failed" in row}
    assert set(failed) <= {"Liger's kernels"}  # where it is not installed
    assert all(row["peak_gib"] > row["model_gib"] for row in rows if "failed" not in row)
    for ratio in quick["ratios"]:  # one process for both: the adapter starts anew
        assert abs(ratio["first_loss_difference"]) < 0.05
    assert "times the pairs/s" in done.stdout


def test_a_kill_half_way_leaves_what_was_measured(tmp_path):
    file = tmp_path / "result.json"
    with subprocess.Popen(
        command(file), stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while process.poll() is None and measured(file) < 3:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    quick = json.loads(file.read_text())["quick"]
    assert not quick["complete"]
    assert len(quick["summary"]) == len(quick["measurements"]) >= 3
    assert quick["ratios"][0]["pairs_per_second"]["median"] > 0


def measured(file):
    """Number of cases; whoever reads the file meanwhile finds it whole."""
    return len(json.loads(file.read_text())["quick"]["measurements"]) if file.exists() else 0
