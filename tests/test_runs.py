"""The run folder: names, liveness, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from gapo_lite.checkpoints import (
    commit_checkpoint,
    list_checkpoints,
    newest_valid_checkpoint,
    replace_folder,
    stage_path,
    verify_checkpoint,
)
from gapo_lite.config import RunConfig
from gapo_lite.disk import read_jsonl, replace_text
from gapo_lite.errors import RunError
from gapo_lite.outputs import whole_file
from gapo_lite.runs import Run, create_run, device_lease, list_runs, open_run


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", ".hidden", "a b", "x" * 101, "a\n", "nul\0", "é", "-rf"]
)
def test_a_name_with_a_path_or_odd_characters_is_refused(tmp_path, name):
    with pytest.raises(RunError, match="cannot be a run's name"):
        create_run(tmp_path, name, "run")
    assert not list(tmp_path.iterdir())


def test_a_name_in_use_is_refused_and_a_default_one_is_counted_up(tmp_path):
    assert create_run(tmp_path, "mine", "x").name == "mine"
    with pytest.raises(RunError, match=r"in use.*--resume mine"):
        create_run(tmp_path, "mine", "x")
    assert [create_run(tmp_path, None, "my demo!").name for _ in range(3)] == [
        "my-demo",
        "my-demo-2",
        "my-demo-3",
    ]


def test_a_run_is_found_by_name_or_folder_and_a_missing_one_lists_what_there_is(tmp_path):
    run = create_run(tmp_path, "first", "x")
    (run.path / "config.yaml").write_text(RunConfig().to_yaml())
    assert open_run("first", tmp_path) == run
    assert open_run(run.path, tmp_path / "elsewhere").path == run.path
    assert [r.name for r in list_runs(tmp_path)] == ["first"]
    with pytest.raises(RunError, match="first"):
        open_run("second", tmp_path)


def test_liveness_is_a_lock_that_dies_with_its_process(tmp_path):
    run = create_run(tmp_path, "run", "x")
    run.write("status.json", {"state": "running", "pid": 1})
    assert run.state() == "interrupted"
    code = (
        "import sys, time; from pathlib import Path; from gapo_lite.runs import Run\n"
        f"with Run(Path({str(run.path)!r})).lock():\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        assert run.state() == "running"
        with pytest.raises(RunError, match="another process"), run.lock():
            pass
        process.kill()
    assert run.state() == "interrupted"
    with run.lock():
        assert run.is_locked()


def test_a_second_training_on_the_same_gpu_is_refused():
    with device_lease("cuda-test-0"):
        with (
            pytest.raises(RunError, match="another training already uses this GPU"),
            device_lease("cuda-test-0"),
        ):
            pass
        with device_lease("cuda-test-1"):
            pass
    with device_lease("cuda-test-0"):
        pass


def test_readers_drop_a_line_that_is_being_written(tmp_path):
    run = create_run(tmp_path, "run", "x")
    for step in range(3):
        run.append("metrics.jsonl", {"step": step, "text": "line\u2028separator"})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    assert [row["step"] for row in run.metrics()] == [0, 1, 2]
    run.forget_after(1)
    assert [row["step"] for row in read_jsonl(run.path / "metrics.jsonl")] == [0, 1]
    assert run.metrics()[0]["text"] == "line\u2028separator"


def test_what_a_full_disk_cut_costs_no_other_line(tmp_path):
    run = Run(tmp_path)
    run.append("votes.jsonl", {"winner": "tuned"})
    whole = (tmp_path / "votes.jsonl").read_bytes()
    with disk_of(len(whole) + 10), pytest.raises(RunError, match="cannot write .*votes.jsonl"):
        run.append("votes.jsonl", {"winner": "base", "prompt": "x" * 50})
    assert (tmp_path / "votes.jsonl").read_bytes() == whole
    with (tmp_path / "votes.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n")  # power was lost
    run.append("votes.jsonl", {"winner": "base"})
    assert read_jsonl(tmp_path / "votes.jsonl") == [{"winner": "tuned"}, {"winner": "base"}]


def test_a_file_that_does_not_fit_leaves_nothing_behind(tmp_path):
    replace_text(tmp_path / "status.json", "old")
    with disk_of(100), pytest.raises(RunError, match="cannot write"):
        replace_text(tmp_path / "status.json", "y" * 500)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"status.json": "old"}


def test_threads_that_replace_one_file_do_not_disturb_each_other(tmp_path):
    def often(letter):
        for _ in range(50):
            replace_text(tmp_path / "report.md", letter * 1000)
            with whole_file(tmp_path / "report.html") as part:
                part.write_text(letter * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(often, "abcd"))
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.html"}
    assert len(set((tmp_path / "report.md").read_text())) == 1


@contextlib.contextmanager
def disk_of(size):
    """No file of this process may have more bytes than `size`."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_damaged_file_is_named(tmp_path):
    run = create_run(tmp_path, "run", "x")
    (run.path / "status.json").write_text("{")
    with pytest.raises(RunError, match=r"status\.json is damaged"):
        run.state()


def checkpoint(folder, step, content="weights"):
    stage = stage_path(folder, step)
    stage.mkdir(parents=True)
    (stage / "adapter_model.safetensors").write_text(content)
    return commit_checkpoint(folder, step, keep=2)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (2, 4, 10):
        checkpoint(tmp_path, step)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 10]
    assert newest_valid_checkpoint(tmp_path, print).name == "checkpoint-10"
    assert not list(tmp_path.glob(".stage*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest"])
def test_damage_is_found_and_the_one_before_taken(tmp_path, damage):
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 4)
    file = newest / "adapter_model.safetensors"
    if damage == "flip":
        file.write_text("weighty")
    elif damage == "cut":
        file.write_text("weight")
    elif damage == "gone":
        file.unlink()
    else:
        (newest / "manifest.json").write_text("[]")
    assert verify_checkpoint(newest)
    heard = []
    assert newest_valid_checkpoint(tmp_path, heard.append).name == "checkpoint-2"
    assert len(heard) == 1
    assert "checkpoint-4" in heard[0]


def test_a_step_done_again_replaces_its_checkpoint(tmp_path):
    checkpoint(tmp_path, 2, "old")
    path = checkpoint(tmp_path, 2, "new")
    assert (path / "adapter_model.safetensors").read_text() == "new"
    assert verify_checkpoint(path) == ""


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("one", "two"):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text(content)
        replace_folder(tmp_path / "new", tmp_path / "final")
        assert (tmp_path / "final" / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_status_is_replaced_in_one_step(tmp_path):
    run = create_run(tmp_path, "run", "x")
    run.write("status.json", {"state": "finished", "note": "ünïcode"})
    assert json.loads((run.path / "status.json").read_text(encoding="utf-8"))["note"] == "ünïcode"
    assert sorted(path.name for path in run.path.iterdir()) == ["status.json"]
