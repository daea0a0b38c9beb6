"""What this process takes of memory, not what the one that started it has."""

from __future__ import annotations

import subprocess
import sys

PEAK = "from gapo_lite.memory import peak_resident_bytes as peak; "


def program(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_peak_is_not_that_of_a_large_parent():
    parent = (
        "import subprocess, sys; held = bytearray(3 * 2**30); "
        f"subprocess.run([sys.executable, '-c', {PEAK + 'print(peak())'!r}], check=True)"
    )
    assert int(program(parent)) < 2 * 2**30


def test_the_peak_stays_when_memory_is_given_back():
    code = PEAK + "before = peak(); held = bytearray(2**29); del held; print(peak() - before)"
    assert 0.45 * 2**30 < int(program(code)) < 0.6 * 2**30
