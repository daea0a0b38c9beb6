"""The training process as the page sees it, against real trainings of a tiny model; and, for what
training seldom does, against shell scripts in the place of Python."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import ROOT

from app import jobs
from gapo_lite.checkpoints import commit_checkpoint, list_checkpoints
from gapo_lite.config import RunConfig, parse_config
from gapo_lite.errors import ConfigError, RunError
from gapo_lite.overview import overview
from gapo_lite.runs import Run, list_runs

PYTHON = sys.executable
ACTIVE = {"preparing", "starting", "running", "stopping"}
BAD_NAMES = [
    *("../x", "..", ".", "a/b", "/etc", "", ".jobs", "a b", "nul\0", "é", "run\n", "-rf"),
    *("\N{BANANA}", "x" * 101, "\ud800", None, 5, ["run"]),
]


@pytest.fixture
def runs_dir(tmp_path):
    folder = tmp_path / "runs"
    yield folder
    with contextlib.suppress(RunError):
        while name := jobs.active(folder):
            jobs.kill(folder, name)
            wait_for(lambda: jobs.active(folder) != name)


@pytest.fixture
def config(tiny_settings):
    return _config(tiny_settings)


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Puts a shell script in the place of Python."""

    def put(script):
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        return str(path)

    return put


def _config(settings, **training):
    settings = copy.deepcopy(settings)
    settings["training"] |= {"max_steps": 10, "eval_steps": 10, "logging_steps": 1, **training}
    return parse_config(settings)


def wait_for(condition, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not (outcome := condition()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
    return outcome


def wait_for_step(runs_dir, name, step):
    """The report once the training is so far, its process halted there."""

    def is_there():
        report = jobs.report(runs_dir, name)
        assert report.state in ACTIVE, report
        return report.state == "running" and report.step >= step and report

    report = wait_for(is_there)
    os.kill(report.pid, signal.SIGSTOP)
    return report


def stop_twice(runs_dir, name, pid):
    """Stops a halted training, and once more when it has heard that: a second SIGTERM would mean
    at once and without saving."""
    jobs.stop(runs_dir, name)
    assert jobs.report(runs_dir, name).state == "stopping"
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: "Stopping at the end" in jobs.tail(runs_dir, name))
    with contextlib.suppress(RunError):  # it may have ended already
        jobs.stop(runs_dir, name)


def wait_for_end(runs_dir, name):
    wait_for(lambda: jobs.report(runs_dir, name).state not in ACTIVE)
    return jobs.report(runs_dir, name)


def server(runs_dir, config, call, folder):
    """Another server's process, which does one thing when the file `go` is there, prints the
    outcome and stays."""
    path = folder / "server.yaml"
    path.write_text(config.to_yaml())
    code = f"""
import sys, time; from pathlib import Path
from app import jobs; from gapo_lite.config import load_config
from gapo_lite.errors import RunError
runs_dir, config = Path({str(runs_dir)!r}), load_config({str(path)!r})
while not Path({str(folder / "go")!r}).exists(): time.sleep(0.001)
try: print("done", {call}, flush=True)
except RunError as error: print("refused", error, flush=True)
time.sleep(600)
"""
    return subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)


# -- real trainings --


def test_two_servers_start_one_training_which_outlives_them_and_can_be_stopped_renamed_and_resumed(
    runs_dir, config, tmp_path
):
    call = "jobs.start(config, runs_dir, None, 'demo')"
    servers = [server(runs_dir, config, call, tmp_path) for _ in range(2)]
    (tmp_path / "go").touch()
    said = sorted(process.stdout.readline() for process in servers)
    for process in servers:
        process.kill()
        process.communicate()
    assert said[0] == "done demo\n"
    assert said[1].startswith("refused the run demo is being trained (it prepares its data)")
    assert jobs.names(runs_dir) == ["demo"]
    assert list_runs(runs_dir) == []
    assert jobs.report(runs_dir, "demo").state == "preparing"

    report = wait_for_step(runs_dir, "demo", 3)
    assert (report.total, report.message, report.resumable) == (10, "", False)
    assert report.heartbeat_age < 10
    assert jobs.active(runs_dir) == "demo"
    assert "step 3/10" in jobs.tail(runs_dir, "demo")
    for refused in (
        lambda: jobs.start(config, runs_dir, "other"),
        lambda: jobs.resume(runs_dir, "demo"),
        lambda: jobs.rename(runs_dir, "demo", "other"),
        lambda: jobs.delete(runs_dir, "demo"),
    ):
        with pytest.raises(RunError, match="the run demo is being trained"):
            refused()
    assert [run.name for run in list_runs(runs_dir)] == ["demo"]

    stop_twice(runs_dir, "demo", report.pid)
    stopped = wait_for_end(runs_dir, "demo")
    assert (stopped.state, stopped.message, stopped.pid) == ("stopped", "", None)
    assert (stopped.resumable, stopped.why_not) == (True, "")
    assert list_checkpoints(runs_dir / "demo" / "checkpoints")[-1][0] == stopped.step < 10
    with pytest.raises(RunError, match="not being trained"):
        jobs.stop(runs_dir, "demo")

    jobs.rename(runs_dir, "demo", "second")
    assert jobs.names(runs_dir) == ["second"]
    jobs.resume(runs_dir, "second")
    assert jobs.report(runs_dir, "second").state == "preparing"
    finished = wait_for_end(runs_dir, "second")
    assert (finished.state, finished.step, finished.message) == ("finished", 10, "")
    assert [row["step"] for row in Run(runs_dir / "second").metrics() if "loss" in row] == [
        *range(1, 11)
    ]
    with pytest.raises(RunError, match="the run second is finished"):
        jobs.resume(runs_dir, "second")
    assert jobs.active(runs_dir) is None

    jobs.delete(runs_dir, "second")
    assert jobs.names(runs_dir) == []
    assert [path.name for path in (runs_dir / ".jobs").iterdir()] == ["start.lock"]


def test_a_killed_training_is_interrupted_and_resumable_unless_all_it_saved_is_damaged(
    runs_dir, config
):
    name = jobs.start(config, runs_dir, "mine")
    pid = wait_for_step(runs_dir, name, 3).pid
    jobs.kill(runs_dir, name)
    report = wait_for_end(runs_dir, name)
    assert (report.state, report.resumable, report.pid) == ("interrupted", True, None)
    assert "ended without saving" in report.message
    wait_for(lambda: not Path(f"/proc/{pid}").exists())  # no zombie stays

    with pytest.raises(RunError, match="'mine' is in use"):
        jobs.start(config, runs_dir, "mine")
    checkpoints = [path for _, path in list_checkpoints(runs_dir / name / "checkpoints")]
    for path in checkpoints:  # seen only when one looks closer
        weights = path / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x77")
    assert jobs.report(runs_dir, name).resumable
    with pytest.raises(RunError, match="no checkpoint .* can be used"):
        jobs.resume(runs_dir, name)
    for path in checkpoints:
        (path / "adapter_model.safetensors").write_bytes(b"")
    assert "all checkpoints of the run mine are damaged" in jobs.report(runs_dir, name).why_not
    assert jobs.active(runs_dir) is None


def test_a_training_whose_data_have_vanished_has_failed_and_says_why(runs_dir, tiny_settings):
    settings = copy.deepcopy(tiny_settings)
    settings["data"]["source"] = str(runs_dir / "gone.jsonl")
    name = jobs.start(parse_config(settings), runs_dir, default_name="my data!")
    assert name == "my-data"
    report = wait_for_end(runs_dir, name)
    assert (report.state, report.resumable) == ("failed", False)
    assert str(runs_dir / "gone.jsonl") in report.message
    assert not report.message.startswith("error")
    assert "has saved nothing yet" in report.why_not
    assert not (runs_dir / name).exists()
    assert jobs.names(runs_dir) == [name]
    assert "gone.jsonl" in jobs.tail(runs_dir, name)
    jobs.rename(runs_dir, name, "x")
    jobs.delete(runs_dir, "x")
    assert jobs.names(runs_dir) == []


def test_a_training_that_is_stopped_while_it_prepares_ends_at_once(runs_dir, config):
    name = jobs.start(config, runs_dir)
    time.sleep(0.5)
    jobs.stop(runs_dir, name)
    report = wait_for_end(runs_dir, name)
    assert (report.state, report.resumable) == ("stopped", False)
    assert report.message == "It was stopped before anything was saved."
    assert jobs.names(runs_dir) == ["run"]
    assert jobs.active(runs_dir) is None


def test_a_training_of_the_command_line_is_found_and_stopped(runs_dir, config, tmp_path):
    path = tmp_path / "cli.yaml"
    path.write_text(config.to_yaml())
    command = [sys.executable, "-m", "gapo_lite", "train", path, "--runs-dir", runs_dir]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: jobs.active(runs_dir))
        assert wait_for_step(runs_dir, "cli", 2).pid == process.pid
        with pytest.raises(RunError, match=r"the run cli is being trained \(step \d+ of 10\)"):
            jobs.start(config, runs_dir)
        stop_twice(runs_dir, "cli", process.pid)
        assert process.wait() == 130
    report = jobs.report(runs_dir, "cli")
    assert (report.state, report.message, report.resumable) == ("stopped", "", True)
    assert jobs.names(runs_dir) == ["cli"]


# -- who is ended --


@contextlib.contextmanager
def _holder(lock, *arguments):
    """A process of its own group that holds a lock; `arguments` are what it looks like."""
    code = (
        "import sys, time; from pathlib import Path; from gapo_lite.disk import file_lock\n"
        f"with file_lock(Path({str(lock)!r})): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [PYTHON, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def _forged(runs_dir, pid):
    run = Run(runs_dir / "forged")
    run.path.mkdir(parents=True)
    run.write_text("config.yaml", RunConfig().to_yaml())
    run.write("status.json", {"state": "running", "pid": pid, "step": 1, "total": 2})
    return run


@pytest.mark.parametrize("pid", [None, 1, 0, -1, True, "8", 2**70, {}])
def test_a_pid_that_is_none_ends_nothing(runs_dir, pid):
    run = _forged(runs_dir, pid)
    with _holder(run.path / ".lock", "gapo_lite", "train") as holder:
        assert jobs.report(runs_dir, "forged").state in ACTIVE
        for end in (jobs.stop, jobs.kill):
            with pytest.raises(RunError, match="cannot end"):
                end(runs_dir, "forged")
        assert holder.poll() is None


def test_only_the_process_that_holds_the_lock_and_is_our_program_is_ended(runs_dir, tmp_path):
    with _holder(tmp_path / "another.lock", "gapo_lite", "train") as innocent:
        run = _forged(runs_dir, innocent.pid)  # its pid was the training's once
        with pytest.raises(RunError, match="not being trained"):
            jobs.kill(runs_dir, "forged")
        holder = _holder(run.path / ".lock", "gapo_lite", "train")
        with holder, pytest.raises(RunError, match="cannot end"):
            jobs.kill(runs_dir, "forged")
        job = runs_dir / ".jobs" / "forged.job"
        job.mkdir()
        (job / "job.json").write_text(json.dumps({"pid": innocent.pid}))
        holder = _holder(job / "lock", "gapo_lite", "train")
        with holder, pytest.raises(RunError, match="cannot end"):
            jobs.stop(runs_dir, "forged")
        assert innocent.poll() is None
    with _holder(run.path / ".lock", "notebook") as notebook:
        run.write("status.json", {"state": "running", "pid": notebook.pid})
        with pytest.raises(RunError, match="another program"):
            jobs.stop(runs_dir, "forged")
        assert notebook.poll() is None
    with _holder(run.path / ".lock", "/bin/gapo-lite", "train") as ours:
        run.write("status.json", {"state": "running", "pid": ours.pid})
        jobs.kill(runs_dir, "forged")
        assert ours.wait(10) == -signal.SIGKILL


def test_what_a_process_leaves_behind_is_ended_with_it(runs_dir, program, tmp_path):
    program(f"sleep 60 & echo $! > {tmp_path}/left; exit 1")
    name = jobs.start(RunConfig(), runs_dir)
    assert wait_for_end(runs_dir, name).state == "failed"
    left = int((tmp_path / "left").read_text())
    wait_for(lambda: _stat(left) in ("", "Z"), 10)


def test_a_lock_that_a_grandchild_still_holds_means_nothing_once_the_process_is_gone(
    runs_dir, program, tmp_path
):
    script = program(
        f"sleep 60 & echo $! > {tmp_path}/left\n"
        f"while [ ! -e {tmp_path}/end ]; do sleep 0.05; done; echo 'error: lost'"
    )
    call = f"(setattr(sys, 'executable', {script!r}), jobs.start(config, runs_dir, 'x'))[1]"
    lost = server(runs_dir, RunConfig(), call, tmp_path)
    (tmp_path / "go").touch()
    assert lost.stdout.readline() == "done x\n"
    lost.kill()
    lost.communicate()
    assert jobs.report(runs_dir, "x").state == "preparing"
    left = int(wait_for((tmp_path / "left").read_text))
    (tmp_path / "end").touch()
    report = wait_for_end(runs_dir, "x")
    assert (report.state, report.message) == ("failed", "lost")
    assert _stat(left) not in ("", "Z")
    assert jobs.active(runs_dir) is None
    program("echo 'error: again'")
    assert jobs.start(RunConfig(), runs_dir, "x") == "x"
    assert wait_for_end(runs_dir, "x").message == "again"
    os.kill(left, signal.SIGKILL)


def test_a_process_whose_server_died_before_it_noted_the_pid_is_found(runs_dir, forged_stop):
    job = runs_dir / ".jobs" / "old.job"
    job.mkdir(parents=True)
    (job / "job.json").write_text(json.dumps({"pid": None, "resumed": True}))
    (job / "output.log").touch()
    forged_stop.write("status.json", {"state": "stopped", "pid": _pid_of_nobody()})
    with _holder(job / "lock", "gapo_lite", "train") as process:
        assert jobs.active(runs_dir) == "old"
        with pytest.raises(RunError, match="cannot end"):  # nobody knows its pid yet
            jobs.stop(runs_dir, "old")
        forged_stop.write("status.json", {"state": "running", "pid": process.pid, "step": 4})
        assert jobs.report(runs_dir, "old").step == 4
        jobs.kill(runs_dir, "old")
        assert process.wait(10) == -signal.SIGKILL
    assert jobs.active(runs_dir) is None


def _pid_of_nobody():
    with subprocess.Popen(["true"]) as process:
        return process.pid


def _stat(pid):
    """Letter of a process's state, "" where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


# -- the process's surroundings and words --


def test_the_process_gets_what_it_needs_and_nothing_of_the_page(runs_dir, program, monkeypatch):
    for name in ("GRADIO_SERVER_NAME", "AWS_SECRET_ACCESS_KEY", "RANK", "XPATH", "HOMEPAGE"):
        monkeypatch.setenv(name, "no")
    for name in ("HF_HOME", "CUDA_VISIBLE_DEVICES", "GAPO_LITE_CACHE", "https_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "yes")
    program('env; echo "$@"; readlink /proc/$$/fd/0; ps -o sid= -p $$; echo pid $$')
    name = jobs.start(RunConfig(), runs_dir, "-".join(["x"] * 3))
    wait_for_end(runs_dir, name)
    job = runs_dir / ".jobs" / f"{name}.job"
    *variables, arguments, stdin, session, pid = (job / "output.log").read_text().splitlines()
    assert not [line for line in variables if line.endswith("=no")]
    assert sum(line.endswith("=yes") for line in variables) == 5
    assert {line.partition("=")[0] for line in variables} >= {"PATH", "HOME"}
    assert arguments == (
        f"-m gapo_lite train {job / 'config.yaml'} --name x-x-x --runs-dir {runs_dir}"
    )
    assert stdin == "/dev/null"
    assert pid.split() == ["pid", session.strip()]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'error: early'; echo 'error: two\n  lines: β'", "two\n  lines: β"),
        ("echo 'Traceback (most recent call last):\n  File x\nOSError: lost'", "OSError: lost"),
        ("echo ok; kill -9 $$", "Its process ended without a word before the training began"),
        ("printf 'error: \\033[31mhf_abcdefghijkl <b>\\377'", "*** <b>\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_the_last_words_of_a_process_are_the_message(runs_dir, program, script, message):
    program(script)
    report = wait_for_end(runs_dir, jobs.start(RunConfig(), runs_dir))
    assert report.state == "failed"
    assert report.message.startswith(message)


def test_a_resume_that_fails_says_why_and_leaves_the_run_as_it_was(runs_dir, program, forged_stop):
    program("echo 'error: the pairs have changed'; exit 2")
    jobs.resume(runs_dir, "old")
    report = wait_for_end(runs_dir, "old")
    assert (report.state, report.message) == ("stopped", "the pairs have changed")
    assert report.resumable
    run = Run(runs_dir / "old")
    run.write("status.json", {**run.read("status.json"), "pid": 77, "heartbeat": time.time() + 1})
    assert jobs.report(runs_dir, "old").message == ""  # the command line went on with it since


@pytest.fixture
def forged_stop(runs_dir):
    run = Run(runs_dir / "old")
    checkpoint = run.checkpoints / ".stage-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_model.safetensors").write_text("weights")
    commit_checkpoint(run.checkpoints, 3, keep=2)
    run.write_text("config.yaml", RunConfig().to_yaml())
    status = {"state": "stopped", "pid": 9, "step": 3, "total": 5, "heartbeat": time.time() - 60}
    run.write("status.json", status)
    return run


def test_a_log_is_shown_without_escapes_overwritten_progress_and_secrets(
    runs_dir, forged_stop, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    log = forged_stop.path / "train.log"
    log.write_bytes(
        b"\x1b]0;title\x07first\x1b[2K\r\n"
        b" 10%|#\r 50%|##\r100%|### done\n"
        b"\x1b[1;31mbroken \xff\xfe\x1b[0m \x1b(B\x07\x9b\n"
        b"token hf_AbCdEfGhIjKlMnOpQrSt and sk-proj-12345678, api_key=geheim99 ok\n"
        b'{"hf_token": "very secret", "step": 3} Authorization: Bearer abcdef.123456\n'
        b"http://me:pass@proxy:80 login 0123456789abcdef\n"
        b"hf_\x1b[0mAbCdEfGhIjKlMnOpQrSt from hf_hub_download, risk-free basic training\n"
    )
    assert jobs.tail(runs_dir, "old").split("\n") == [
        "first",
        "100%|### done",
        "broken �� ␇�",
        "token *** and ***, api_key=*** ok",
        '{"hf_token": "***", "step": 3} Authorization: Bearer ***',
        "http://***@proxy:80 login ***",
        "*** from hf_hub_download, risk-free basic training",
    ]
    assert jobs.tail(runs_dir, "old", lines=1).startswith("*** from")


def test_only_the_end_of_a_long_log_is_read_and_no_half_secret_shown(runs_dir, forged_stop):
    log = forged_stop.path / "train.log"
    log.write_text("x" * 10 + "hf_" + "A" * 70_000 + "\nlast β\n", encoding="utf-8")
    assert jobs.tail(runs_dir, "old") == "last β"
    log.write_text("hf_" + "A" * 70_000)
    assert jobs.tail(runs_dir, "old") == ""
    with log.open("ab") as file:
        file.truncate(5 * 2**30)
    started = time.perf_counter()
    jobs.tail(runs_dir, "old")
    assert time.perf_counter() - started < 1


def test_a_log_that_is_a_link_is_not_followed(runs_dir, forged_stop, tmp_path):
    (tmp_path / "private").write_text("private")
    (forged_stop.path / "train.log").symlink_to(tmp_path / "private")
    assert jobs.tail(runs_dir, "old") == ""


# -- names, looking, renaming, deleting --


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_is_none_is_refused_everywhere(runs_dir, name, config, forged_stop, tmp_path):
    calls = [
        *(jobs.resume, jobs.stop, jobs.kill, jobs.report, jobs.tail, jobs.delete),
        lambda place, bad: jobs.rename(place, bad, "new"),
        lambda place, bad: jobs.rename(place, "old", bad),
    ]
    if name is not None:  # which asks for a default one
        calls.append(lambda place, bad: jobs.start(config, place, bad))
    for call in calls:
        with pytest.raises(RunError, match="cannot be a run's name|no run is chosen"):
            call(runs_dir, name)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert jobs.names(runs_dir) == ["old"]
    assert jobs.active(runs_dir) is None


def test_a_run_that_is_not_there_or_is_no_run_is_refused(runs_dir, forged_stop):
    (runs_dir / "photos").mkdir()
    (runs_dir / "photos" / "1.jpg").touch()
    for name in ("nothing", "photos"):
        for call in (jobs.resume, jobs.stop, jobs.kill, jobs.report, jobs.tail, jobs.delete):
            with pytest.raises(RunError, match=f"there is no run {name}"):
                call(runs_dir, name)
    assert (runs_dir / "photos" / "1.jpg").exists()


def test_a_link_out_of_the_folder_is_left_alone(runs_dir, forged_stop, tmp_path):
    forged_stop.path.rename(tmp_path / "elsewhere")
    forged_stop.path.symlink_to(tmp_path / "elsewhere")
    for call in (jobs.report, jobs.delete, jobs.tail, jobs.resume):
        with pytest.raises(RunError, match="a link to another place"):
            call(runs_dir, "old")
    with pytest.raises(RunError, match="in use"):
        jobs.start(RunConfig(), runs_dir, "old")
    assert jobs.names(runs_dir) == []
    assert (tmp_path / "elsewhere" / "status.json").exists()


def test_a_link_in_a_run_is_deleted_and_not_what_it_leads_to(runs_dir, forged_stop, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").touch()
    (forged_stop.path / "data").symlink_to(tmp_path / "data")
    jobs.delete(runs_dir, "old")
    assert not forged_stop.path.exists()
    assert (tmp_path / "data" / "pairs.jsonl").exists()


def test_a_run_is_renamed_to_a_free_name_only(runs_dir, forged_stop):
    (runs_dir / "taken").mkdir()
    for new in ("taken", "old"):
        with pytest.raises(RunError, match="in use"):
            jobs.rename(runs_dir, "old", new)
    jobs.rename(runs_dir, "old", "New.1")
    assert jobs.names(runs_dir) == ["New.1"]
    assert jobs.report(runs_dir, "New.1").step == 3


def test_a_name_that_a_run_without_folder_has_is_in_use(runs_dir, program, forged_stop):
    program("echo 'error: no'; exit 2")
    jobs.start(RunConfig(), runs_dir, "early")
    wait_for_end(runs_dir, "early")
    for old in ("old", "early"):
        with pytest.raises(RunError, match="in use"):
            jobs.rename(runs_dir, old, "early")
    assert set(jobs.names(runs_dir)) == {"early", "old"}
    assert jobs.report(runs_dir, "early").message == "no"
    jobs.rename(runs_dir, "early", "later")
    assert set(jobs.names(runs_dir)) == {"later", "old"}


def test_a_run_that_prepares_keeps_its_name(runs_dir, program, forged_stop):
    program("sleep 30")
    jobs.start(RunConfig(), runs_dir, "new")
    try:
        with pytest.raises(RunError, match="in use"):
            jobs.rename(runs_dir, "old", "new")
        assert jobs.active(runs_dir) == "new"
    finally:
        jobs.kill(runs_dir, "new")


@pytest.mark.parametrize("name", ["adapter", "config.yaml", "status.json", "start.lock", "x.job"])
def test_a_run_may_have_the_name_of_a_file(runs_dir, program, name):
    program("echo 'error: no'")
    assert jobs.start(RunConfig(), runs_dir, name) == name
    assert wait_for_end(runs_dir, name).message == "no"
    assert jobs.names(runs_dir) == [name]
    assert overview(runs_dir) == []  # which finds runs by such files


def test_runs_and_failed_starts_are_listed_oldest_first(runs_dir, program, forged_stop):
    program("echo 'error: no'")
    os.utime(forged_stop.path / "config.yaml", (1e9, 1e9))
    for name in ("b", "a"):
        wait_for_end(runs_dir, jobs.start(RunConfig(), runs_dir, name))
        time.sleep(0.02)
    newest = _forged(runs_dir, 1)
    os.utime(newest.path / "config.yaml", (4e9, 4e9))
    (runs_dir / "not a run").mkdir()
    (runs_dir / "file").touch()
    assert jobs.names(runs_dir) == ["old", "b", "a", "forged"]
    assert jobs.start(RunConfig(), runs_dir, "b") == "b"  # what has failed does not keep its name
    wait_for_end(runs_dir, "b")
    assert jobs.names(runs_dir) == ["old", "a", "b", "forged"]


def test_there_is_nothing_in_a_folder_that_is_not_there(tmp_path):
    assert jobs.names(tmp_path / "no") == []
    assert jobs.active(tmp_path / "no") is None
    with pytest.raises(RunError, match="there is no run x"):
        jobs.report(tmp_path / "no", "x")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "content",
    [
        '{"state": "<script>", "step": -1, "total": "x", "heartbeat": "y"}',
        "{",
        "[]",
        "\xff",
        "null",
    ],
)
def test_files_that_are_not_as_they_were_written_break_nothing(runs_dir, forged_stop, content):
    (forged_stop.path / "status.json").write_text(content, encoding="latin-1")
    job = runs_dir / ".jobs" / "old.job"
    job.mkdir(parents=True)
    (job / "job.json").write_text(content, encoding="latin-1")
    (job / "lock").mkdir()
    report = jobs.report(runs_dir, "old")
    assert (report.state, report.step, report.total) == ("interrupted", 0, 0)
    assert report.heartbeat_age is None
    (forged_stop.path / "config.yaml").write_text("{")
    with pytest.raises(ConfigError):
        jobs.resume(runs_dir, "old")


def test_the_active_run_is_found_quickly_among_300(runs_dir, forged_stop):
    for number in range(300):
        run, job = runs_dir / f"run-{number}", runs_dir / ".jobs" / f"run-{number}.job"
        for folder, lock in ((run, ".lock"), (job, "lock")):
            folder.mkdir(parents=True)
            (folder / lock).touch()
            (folder / "config.yaml").touch()
            (folder / "job.json").write_text('{"pid": 1}')
            (folder / "output.log").touch()
    with _holder(runs_dir / "run-150" / ".lock"):
        times = []
        for _ in range(7):
            started = time.perf_counter()
            assert jobs.active(runs_dir) == "run-150"
            times.append(time.perf_counter() - started)
    print(f"active() among 300 runs and jobs: {min(times) * 1000:.1f} ms")
    assert min(times) < 0.06  # 0.02 on an idle machine


def test_importing_it_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'gradio', 'pyarrow', 'datasets'}"
    code = f"import sys, app.jobs; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([PYTHON, "-c", code], check=True, cwd=ROOT)
