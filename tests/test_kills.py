"""kill -9 at 25 points, 13 of them inside a save: the resumed run equals the uninterrupted one to
the last byte.

Each trial is a process of its own, forked from a server that has imported torch already. It is
killed either by itself, at the n-th file operation under `checkpoints/` (seen by an audit hook),
or from outside, after a random time.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time

import pytest

from gapo_lite.checkpoints import list_checkpoints, verify_checkpoint
from gapo_lite.config import parse_config
from gapo_lite.runs import Run

pytestmark = pytest.mark.slow

TIMING = {"tokens_per_second", "pairs_per_second", "memory_gib", "elapsed_s"}
KILLS_INSIDE_A_SAVE, KILLS_AT_RANDOM_TIMES = 13, 12
_WRITING = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def _train(settings, runs_dir, operations_until_kill):
    """The trial's process."""
    if operations_until_kill is not None:
        left = [operations_until_kill]

        def watch(event, arguments):
            path = str(arguments[0]) if arguments else ""
            saving = event in _WRITING and "/checkpoints/" in path
            if saving or (event == "open" and "/.stage-" in path):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)

    from gapo_lite.training import train

    resume = "run" if list_checkpoints(runs_dir / "run" / "checkpoints") else None
    name = None if resume or (runs_dir / "run").exists() else "run"
    if not resume and not name:  # killed before its first checkpoint: begin again
        import shutil

        shutil.rmtree(runs_dir / "run")
        name = "run"
    train(parse_config(settings), runs_dir=runs_dir, name=name, resume=resume, show_progress=False)


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "gapo_lite.training"])
    return context


def _trial(server, settings, runs_dir, *, operations=None, after=None):
    """Exit code of one process; `after` (step, seconds) kills it so long after that step."""
    process = server.Process(target=_train, args=(settings, runs_dir, operations))
    process.start()
    if after is not None:
        _wait_for_step(process, Run(runs_dir / "run"), after[0])
        process.join(after[1])
        process.kill()
    process.join()
    return process.exitcode


def _wait_for_step(process, run, step):
    while process.is_alive():
        status = run.read("status.json")
        if status.get("pid") == process.pid and status["step"] >= step:
            return
        time.sleep(0.01)


def _numbers(run):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in run.metrics()]


def _bytes(run):
    checkpoint = run.checkpoints / "checkpoint-12"
    return [
        (run.adapter / "adapter_model.safetensors").read_bytes(),
        *((checkpoint / name).read_bytes() for name in ("optimizer.safetensors", "random-0.json")),
    ]


def _check_finished(run, whole):
    assert run.state() == "finished"
    assert _numbers(run) == _numbers(whole)
    assert _bytes(run) == _bytes(whole)
    assert not [path for path in run.checkpoints.iterdir() if path.name.startswith(".")]


def test_kill_9_anywhere_changes_nothing(server, tiny_settings, tmp_path):
    assert _trial(server, tiny_settings, tmp_path / "whole") == 0
    whole = Run(tmp_path / "whole" / "run")
    draw = random.Random(0)
    kills = [{"operations": draw.randint(1, 90)} for _ in range(KILLS_INSIDE_A_SAVE)]
    kills += [
        {"after": (draw.randint(1, 10), draw.uniform(0, 0.1))} for _ in range(KILLS_AT_RANDOM_TIMES)
    ]
    draw.shuffle(kills)
    number = 0
    while kills:
        runs_dir = tmp_path / f"cut-{number}"
        code = -signal.SIGKILL
        while code and kills:
            code = _trial(server, tiny_settings, runs_dir, **kills[0])
            assert code in (0, -signal.SIGKILL)
            if code:
                kills.pop(0)  # it found a living process
            run = Run(runs_dir / "run")
            assert all(not verify_checkpoint(path) for _, path in list_checkpoints(run.checkpoints))
        if code:
            assert _trial(server, tiny_settings, runs_dir) == 0
        _check_finished(run, whole)
        number += 1
        assert number < 20
