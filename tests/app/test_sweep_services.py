"""Sweeps as the page builds, starts, finds, watches and deletes them, without a browser."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient
from sweeping import add_cell, forge_sweep, write

from app import forms, jobs, processes, sweep_forms, sweep_jobs, sweep_views
from app.services import Services
from app.sweep_forms import AGAINST, OWN_GRID, TRAIN_FORM, Filled, filled_from
from app.sweep_live import SweepView, report_endpoint, sweep_html, sweep_parts
from app.sweep_services import measured_margin
from gapo_lite.config import parse_config
from gapo_lite.disk import file_lock
from gapo_lite.errors import ConfigError, GapoError, RunError
from gapo_lite.runs import Run, now
from gapo_lite.sweep_config import load_sweep

DEMO = "Demo: embedded model, CPU or GPU"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def served(tmp_path):
    for name in ("runs", "data", "models"):
        (tmp_path / name).mkdir()
    services = Services.over(
        runs_dir=tmp_path / "runs", data_dir=tmp_path / "data", models_dir=tmp_path / "models"
    )
    yield services
    for record in (services.runs_dir / ".jobs").glob("*.job/job.json"):
        with contextlib.suppress(ProcessLookupError, TypeError):  # it has ended, or never began
            os.killpg(json.loads(record.read_text())["pid"], signal.SIGKILL)


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Puts a shell script in the place of Python."""

    def put(script):
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (outcome := condition()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
    return outcome


def form(**values):
    """The Train tab's form of the demo, with some settings changed, `__` for the dot."""
    own = forms.values_of(forms.preset(DEMO))
    return {**own, **{key.replace("__", "."): value for key, value in values.items()}}


def filled(start=OWN_GRID, **values) -> Filled:
    from dataclasses import replace

    given = filled_from(start)
    if "rows" in values:
        values["rows"] = tuple((values["rows"] + [("", "")] * 4)[:4])
    return replace(given, **values)


ONE_ROW = [("ef.metric", "rouge1, rougeL")]


# -- build --


def test_a_grid_says_how_many_runs_it_is_and_which(served):
    rows = [*ONE_ROW, ("margin.gamma", "0.1, 0.3, 1e-1")]
    with pytest.raises(ConfigError, match="two contenders are called"):  # 0.1 and 1e-1
        served.sweeps.plan(filled(rows=rows), form())
    rows[1] = ("margin.gamma", "0.1, 0.3")
    plan = served.sweeps.plan(filled(rows=rows, seeds="7, 8"), form())
    assert plan.runs == 8
    assert plan.seeds == (7, 8)
    assert plan.contenders[0] == (
        "metric-rouge1-gamma-0.1",
        "ef.metric = rouge1, margin.gamma = 0.1",
    )
    assert plan.name == "grid"
    assert plan.baseline == "metric-rouge1-gamma-0.1"


def test_a_plan_says_how_long_finished_runs_like_its_own_took(served):
    assert served.sweeps.plan(filled(rows=ONE_ROW, seeds="1, 2"), form()).seconds is None
    run = Run(served.runs_dir / "like")
    run.path.mkdir()
    run.write_text("config.yaml", forms.config_of(form()).to_yaml())
    run.write("status.json", {"state": "finished", "pid": 1, "step": 2, "total": 2})
    for step in (1, 2):
        run.append("metrics.jsonl", {"step": step, "loss": 1.0, "elapsed_s": 30.0 * step})
    plan = served.sweeps.plan(filled(rows=ONE_ROW, seeds="1, 2"), form(training__seed=9))
    assert plan.seconds == 4 * 60.0
    assert "4 min 00 s" in sweep_views.plan(plan)
    other = form(training__batch_size=16)
    assert served.sweeps.plan(filled(rows=ONE_ROW), other).seconds is None
    assert served.sweeps.plan(filled(rows=[("lora.rank", "8, 16")]), form()).seconds is None
    assert served.sweeps.plan(filled(rows=ONE_ROW, halving=True), form()).seconds is None


def test_the_base_is_the_train_tabs_form_or_a_recipe(served):
    values = form(training__learning_rate=3e-4)
    for base, rate in ((TRAIN_FORM, 3e-4), (DEMO, 2e-4)):
        sweep = sweep_forms.sweep_of(
            filled(rows=ONE_ROW, base=base), values, served.data.places, lambda _: 0.3
        )
        assert sweep.base["training"]["learning_rate"] == rate


@pytest.mark.parametrize("start", sweep_forms.starts())
def test_every_start_fills_a_form_that_is_a_sweep(served, start):
    found = filled_from(start)
    if start == OWN_GRID:
        with_base = served.sweeps.plan(found, form())
        assert with_base.runs == 3  # one contender, the form as it is
        return
    plan = served.sweeps.plan(found, form())
    assert plan.runs == len(plan.contenders) * len(plan.seeds) >= 6


def test_the_ready_made_sweep_is_the_one_of_the_file(served):
    file = load_sweep(sweep_forms.ready_made()["gamma_beta"])
    found = filled_from("gamma_beta")
    assert found.rows[0] == ("margin.gamma", "0.1, 0.3, 1.0")
    assert found.base == "The paper: Llama-3-8B, GaPO with ROUGE-L"
    made = sweep_forms.sweep_of(found, form(), served.data.places, lambda _: 0.3)
    assert made.grid == file.grid
    assert made.halving == file.halving
    assert made.seeds == file.seeds
    assert made.baseline == "gamma-0.1-beta-2.5-learning_rate-5e-06"
    assert made.answers.prompts == file.answers.prompts


def test_gapo_against_simpo_has_gapos_mean_margin(served):
    made = sweep_forms.sweep_of(
        filled_from(AGAINST), form(margin__normalization="none"), served.data.places, lambda _: 1.7
    )
    simpo, gapo = made.variants
    assert simpo.settings["margin.gamma"] == 1.7
    assert simpo.settings["margin.source"] == "constant"
    assert gapo.settings == {}
    assert made.baseline == "simpo"
    assert made.base["margin"]["normalization"] == "none"


def test_where_no_gamma_says_it_the_mean_margin_is_read_from_the_pairs(served):
    values = form(margin__normalization="none")
    config = served.data.data_config(values)
    assert measured_margin(served.data.data_config(form(margin__gamma=0.45))) == 0.45
    found = measured_margin(config)
    list(served.data.measure_lexical(config))
    assert 10 * found == pytest.approx(served.data.gaps(config).mean_reward_margin, rel=1e-9)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rows": [("ef.metric", "rouge1, bleu")]}, r"(?s)metric-bleu.*ef.metric.*bleu"),
        ({"rows": [("ef.metric", "bleu"), ("margin.gamma", "x")]}, "(?s)ef.metric.*margin.gamma"),
        ({"rows": [("ef.metric", "")]}, "ef.metric has no values to try"),
        ({"rows": [("", "0.1")]}, "choose the setting that '0.1' are values of"),
        ({"rows": [("training.seed", "1, 2")]}, "choose the setting"),
        ({"rows": [("no.setting", "1, 2")]}, "choose the setting"),
        ({"rows": [*ONE_ROW, ("ef.metric", "rouge2")]}, "ef.metric is there twice"),
        ({"rows": [("margin.gamma", "1], [2")]}, "are no values"),
        ({"rows": [("margin.gamma", "&a [1], *a")]}, "are no values"),
        ({"rows": [("margin.gamma", "!!python/name:os.system")]}, "are no values"),
        ({"rows": [("margin.gamma", "2026-01-01")]}, "are no values"),
        ({"rows": [("margin.gamma", ".nan, .inf")]}, "are no values"),
        ({"rows": [("margin.gamma", "[" * 900)]}, "are no values"),
        ({"rows": [("margin.gamma", "1," * 900)]}, "are no values"),
        ({"rows": [("margin.gamma", ",".join(map(str, range(200))))]}, "600 runs are more"),
        ({"seeds": ""}, "seeds has no values"),
        ({"seeds": "1, two"}, "'two' is no seed"),
        ({"seeds": "1, 1"}, "names a seed twice"),
        ({"seeds": "-1"}, "-1 is no seed"),
        ({"hours": 0.0}, "hours"),
        ({"max_runs": 0}, "max_runs"),
        ({"max_runs": 1.5}, "whole number"),
        ({"halving": True, "first_steps": None}, "steps of the first round"),
        ({"halving": True, "first_steps": 0}, "first_steps"),
        ({"prompts": -1}, "prompts"),
        ({"prompts": float("inf")}, "whole number"),
        ({"start": "results.yaml"}, "no such sweep to start from"),
        ({"start": "../demo"}, "no such sweep to start from"),
        ({"start": ["demo"]}, "no such sweep to start from"),
        ({"base": "/etc/passwd"}, "no preset of that name"),
    ],
)
def test_what_is_not_usable_is_said_in_words(served, values, words):
    given = {"rows": ONE_ROW, **values}
    with pytest.raises(GapoError, match=words):
        served.sweeps.plan(filled(**given), form())
    assert list(served.runs_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.source", "/etc/passwd"),
        ("data.source", "../../x.jsonl"),
        ("data.heldout_source", "/etc/hostname"),
        ("model.name", "/etc"),
        ("ef.bertscore_model", "/etc"),
        ("model.revision", "../../x"),
    ],
)
def test_a_grid_opens_nothing_that_the_train_tab_would_not(served, key, value):
    with pytest.raises(GapoError, match=r"can't be opened|no branch"):
        served.sweeps.start(filled(rows=[(key, json.dumps(value))]), form())
    if key != "ef.bertscore_model":  # which is out of sight in this form, and does not count
        with pytest.raises(GapoError, match=r"can't be opened|no branch"):
            served.sweeps.start(filled(rows=ONE_ROW), form(**{key: value}))
    assert list(served.runs_dir.iterdir()) == []


def test_data_of_the_data_folder_can_be_varied(served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = '{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}\n'
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(pair * 3)
    rows = [("data.source", "a.jsonl, b.jsonl")]
    made = sweep_forms.sweep_of(filled(rows=rows), form(), served.data.places, lambda _: 0.3)
    assert [Path(one).name for one in made.grid["data.source"]] == ["a.jsonl", "b.jsonl"]
    assert all(Path(one).is_file() for one in made.grid["data.source"])


# -- processes --


def started(served, program, script="exec sleep 60", **values):
    program(script)
    return served.sweeps.start(filled(rows=ONE_ROW, seeds="1", **values), form())


def test_a_sweep_is_a_process_of_its_own_and_neither_a_sweep_nor_a_run_starts_beside_it(
    served, program
):
    name = started(served, program)
    assert name == "grid"
    record = json.loads((served.runs_dir / ".jobs" / "grid.job" / "job.json").read_text())
    assert record["command"][1:] == [
        *("-m", "gapo_lite", "sweep", "--resume", "grid"),
        *("--runs-dir", str(served.runs_dir)),
    ]
    assert os.getsid(record["pid"]) == record["pid"] != os.getsid(0)
    assert load_sweep(served.runs_dir / name / "sweep.yaml").grid == {
        "ef.metric": ["rouge1", "rougeL"]
    }
    assert sweep_jobs.report(served.runs_dir, name).state == "preparing"
    words = "the sweep grid is at work .*: wait for it or stop it; one training at a time"
    with pytest.raises(RunError, match=words):
        served.start(form())
    with pytest.raises(RunError, match=words):
        served.sweeps.start(filled(rows=ONE_ROW), form())
    with pytest.raises(RunError, match="at work: stop it first"):
        served.sweeps.delete(name)
    assert served.sweeps.names() == [name]
    assert served.run_names() == []


def test_of_two_starts_at_once_one_wins_and_the_other_leaves_nothing(served, program):
    program("exec sleep 60")
    starts = [
        lambda: served.sweeps.start(filled(rows=ONE_ROW), form(), "one"),
        lambda: served.sweeps.start(filled(rows=ONE_ROW), form(), "two"),
        lambda: served.start(form(), "three"),
    ]
    with ThreadPoolExecutor(3) as pool:
        errors = [future.exception() for future in [pool.submit(start) for start in starts]]
    lost = [str(error) for error in errors if error]
    assert len(lost) == 2
    assert all("one training at a time" in words for words in lost)
    folders = [path.name for path in served.runs_dir.iterdir() if path.name != ".jobs"]
    assert len(folders) <= 1  # a run's is made by its own process


def test_no_sweep_starts_while_a_run_is_trained(served, program):
    program("exec sleep 60")
    run = jobs.start(parse_config({}), served.runs_dir, "alone")
    with pytest.raises(RunError, match="the run alone is being trained"):
        served.sweeps.start(filled(rows=ONE_ROW), form())
    assert served.sweeps.names() == []
    jobs_record = json.loads((served.runs_dir / ".jobs" / f"{run}.job" / "job.json").read_text())
    os.killpg(jobs_record["pid"], signal.SIGKILL)
    wait_for(lambda: processes.active(served.runs_dir) is None)


def test_a_sweep_that_fails_at_once_says_why_and_can_go_on(served, program):
    name = started(served, program, "echo 'error: the GPU is on fire'; exit 2")
    wait_for(lambda: not sweep_jobs.report(served.runs_dir, name).is_active)
    report = sweep_jobs.report(served.runs_dir, name)
    assert (report.state, report.message) == ("interrupted", "the GPU is on fire")
    assert "on fire" in sweep_parts(served, name)["status"]
    program("exec sleep 60")
    served.sweeps.resume(name)
    assert sweep_jobs.report(served.runs_dir, name).state == "preparing"


def test_a_bad_name_and_one_in_use_leave_nothing_behind(served, program):
    program("exec sleep 60")
    (served.runs_dir / "taken").mkdir()
    (served.runs_dir / "s-metric-rouge1-s42").mkdir()
    for name in ("../x", ".jobs", "a b", "taken", "s", "x" * 99):
        with pytest.raises(RunError):
            served.sweeps.start(filled(rows=ONE_ROW), form(), name)
    assert sorted(path.name for path in served.runs_dir.iterdir()) == [
        *(".jobs", "s-metric-rouge1-s42", "taken")
    ]


# -- what is there --


@pytest.fixture
def two_runs(served):
    """A sweep that nobody works on, with one finished, one failed and four runs to come."""
    folder = forge_sweep(served.runs_dir, "tried")
    add_cell(folder, "simpo", 1, accuracy=0.71)
    add_cell(folder, "gapo", 1, state="failed", message=f"CUDA error {HOSTILE}")
    write(folder / "cells" / "tried-gapo-s1.json", {
        **{"run": "tried-gapo-s1", "contender": "gapo", "seed": 1, "state": "failed"},
        "message": f"CUDA error {HOSTILE}",
    })  # fmt: skip
    status = {"state": "running", "pid": 1, "done": 1, "total": 6, "cell": "tried-simpo-s2"}
    write(folder / "sweep-status.json", {**status, "step": 1, "heartbeat": now()})
    return folder


def test_the_table_shows_each_contender_and_its_runs(served, two_runs):
    add_cell(two_runs, "simpo", 2, accuracy=0.75)
    parts = sweep_parts(served, "tried")
    table = parts["table"]
    assert "73.0 ± " in table
    assert 'data-run="tried-simpo-s1" data-state="finished"' in table
    assert "71.0" in table
    assert 'data-run="tried-gapo-s1" data-state="failed"' in table
    assert 'data-state="to come"' in table
    assert "baseline" in table
    assert HOSTILE not in "".join(parts.values())
    assert "CUDA error &lt;img" in table
    assert 'data-value="tried-simpo-s1"' in table
    assert 'data-value="tried-gapo-s3"' not in table  # there is no such run yet
    assert "sweep?sweep=tried" in sweep_html(served, "tried")


def test_a_sweep_at_work_says_which_run_and_how_far(served, two_runs):
    run = Run(served.runs_dir / "tried-simpo-s2")
    run.path.mkdir()
    pid = os.getpid()
    run.write("status.json", {"state": "running", "pid": pid, "step": 3, "total": 12})
    status = json.loads((two_runs / "sweep-status.json").read_text())
    write(two_runs / "sweep-status.json", {**status, "pid": pid})
    view = SweepView("tried")
    before = view.token(served)
    with file_lock(two_runs / ".lock"), file_lock(run.path / ".lock"):
        report = sweep_jobs.report(served.runs_dir, "tried")
        assert (report.state, report.cell, report.is_active) == ("running", run.name, True)
        parts = sweep_parts(served, "tried")
        assert "run 3 of 6: tried-simpo-s2, step 3 of 12" in parts["status"]
        assert "</b> to go" in parts["status"]
        assert 'data-run="tried-simpo-s2" data-state="running"' in parts["table"]
        assert jobs.active(served.runs_dir) == run.name
        assert processes.active(served.runs_dir) == "tried"
        assert served.sweeps.watched() == "tried"
        token = view.token(served)
        assert token != before
        run.write("status.json", {"state": "running", "pid": pid, "step": 4, "total": 12})
        assert view.token(served) != token
        with pytest.raises(RunError, match="cannot end"):  # this test is no training
            served.sweeps.stop("tried")
        with pytest.raises(RunError, match="the sweep tried is at work"):
            served.start(form())
    assert sweep_jobs.report(served.runs_dir, "tried").state == "interrupted"


def test_a_damaged_sweep_is_said_to_be_and_can_be_deleted(served, two_runs):
    (two_runs / "sweep.yaml").write_text("base: [", encoding="utf-8")
    parts = sweep_parts(served, "tried")
    assert "not readable as YAML" in parts["table"]
    assert "tried" in parts["list"]
    with pytest.raises(GapoError):
        served.sweeps.resume("tried")
    served.sweeps.delete("tried")
    assert served.sweeps.names() == []


def test_deleting_removes_the_runs_of_a_sweep_and_no_others(served, two_runs):
    add_cell(two_runs, "simpo", 2)
    other = served.runs_dir / "tried-simpo-s9"
    other.mkdir()
    assert "its 3 runs" in served.sweeps.lost_by_deleting("tried")
    served.sweeps.delete("tried")
    assert [p.name for p in served.runs_dir.iterdir() if p.name != ".jobs"] == [other.name]


def test_a_finished_sweep_has_nothing_to_go_on_with(served):
    folder = forge_sweep(served.runs_dir, "done", seeds=(1,))
    for contender in ("simpo", "gapo"):
        add_cell(folder, contender, 1)
    with pytest.raises(RunError, match="nothing to go on with"):
        served.sweeps.resume("done")


@pytest.mark.parametrize("name", ["", "..", "../x", ".jobs", "no-such", "x\0", None, 3, ["tried"]])
def test_what_is_no_sweep_is_refused(served, two_runs, name, tmp_path):
    for call in ("resume", "stop", "delete", "lost_by_deleting", "report_page", "report_html"):
        with pytest.raises(RunError):
            getattr(served.sweeps, call)(name)
    assert two_runs.is_dir()


def test_a_link_to_a_sweep_elsewhere_is_none(served, two_runs, tmp_path):
    two_runs.rename(tmp_path / "elsewhere")
    two_runs.symlink_to(tmp_path / "elsewhere")
    assert served.sweeps.names() == []
    for call in ("delete", "report_page"):
        with pytest.raises(RunError, match="there is no sweep"):
            getattr(served.sweeps, call)("tried")
    assert (tmp_path / "elsewhere" / "sweep.yaml").is_file()


def test_a_sweep_is_no_run(served, two_runs):
    for call in ("resume", "stop", "kill", "delete", "run", "lost_by_killing"):
        with pytest.raises(RunError, match="tried is a sweep, not a run"):
            getattr(served, call)("tried")
    with pytest.raises(RunError, match="is a sweep"):
        served.rename("tried", "other")
    assert "tried" not in served.run_names()


def test_the_reports_route_serves_a_page_that_may_run_nothing(served, two_runs):
    app = Starlette(routes=[Route("/report", report_endpoint(served))])
    app.auth = None
    client = TestClient(app)
    answer = client.get("/report", params={"sweep": "tried"})
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'none'" in policy
    assert "sandbox" in policy
    assert answer.headers["cache-control"] == "no-store"
    assert "<script" not in answer.text
    for name in ("", "no-such", "../tried", "tried/..", str(two_runs), "tried-simpo-s1"):
        answer = client.get("/report", params={"sweep": name})
        assert answer.status_code == 404
        assert answer.headers["content-type"].startswith("text/plain")
    app.auth, app.cookie_id, app.tokens = ("ada", "secret"), "x", {}
    assert client.get("/report", params={"sweep": "tried"}).status_code == 401


def test_the_report_can_be_read_and_saved(served, two_runs):
    page = served.sweeps.report_page("tried")
    assert page.startswith("<!")
    assert HOSTILE not in page
    assert Path(served.sweeps.report_html("tried")).read_text(encoding="utf-8") == page
    markdown = Path(served.sweeps.report_markdown("tried"))
    assert markdown.name == "tried.md"
    assert markdown.read_text(encoding="utf-8").startswith("#")
    assert not markdown.is_relative_to(served.runs_dir)
