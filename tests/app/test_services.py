"""What the tabs may call, without Gradio."""

from __future__ import annotations

import csv
import html
import json
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from forging import forge_run

from app import figures, forms, jobs, services
from app.history import read_history
from app.run_table import RUN_COLUMNS
from app.services import Services
from app.talks import BLIND, Settings, Talk
from app.verdict import verdict
from gapo_lite.config import parse_config
from gapo_lite.embedded import EMBEDDED_DATA
from gapo_lite.errors import ConfigError, DataError, GapoError, ModelError, RunError

DEMO = next(iter(forms.PRESETS))


@pytest.fixture
def served(tmp_path, tiny_model) -> Iterator[Services]:
    """Services over empty folders; local models are those beside the tiny one."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "data").mkdir()
    made = Services.over(
        runs_dir=tmp_path / "runs", data_dir=tmp_path / "data", models_dir=tiny_model.parent
    )
    yield made
    made.voices.unload("the test has ended")


@pytest.fixture
def forged(served, tiny_settings):
    """Makes a finished run of the tiny model."""

    def forge(name: str, *overrides: str, adapter: bool = True):
        return forge_run(served.runs_dir / name, tiny_settings, *overrides, adapter=adapter)

    return forge


def form(**values) -> dict:
    own = {key.replace("__", "."): value for key, value in values.items()}
    return {**forms.values_of(forms.preset(DEMO)), **own}


# -- data --


def test_the_embedded_set_is_opened_with_its_own_heldout_pairs(served):
    opened = served.data.open_data("embedded:everyday", "")
    assert opened.heldout_source == "embedded:everyday-heldout"
    assert opened.split == "train"


def test_an_uploaded_file_stays_in_the_data_folder_and_can_be_opened(served, tmp_path):
    lines = EMBEDDED_DATA["embedded:everyday"].read_text(encoding="utf-8").splitlines()
    (tmp_path / "mine.jsonl").write_text("\n".join([*lines[:40], "{broken"]), encoding="utf-8")
    source = served.data.keep_upload(str(tmp_path / "mine.jsonl"))
    opened = served.data.open_data(source, "train")
    assert opened.heldout_source == ""  # held out by data.heldout_fraction
    config = served.data.data_config(form(data__source=opened.source, data__heldout_source=""))
    pair_set = served.data.pair_set(config)
    assert len(pair_set) == 40
    assert [problem.line for problem in pair_set.loaded.problems] == [41]
    assert any("mine.jsonl" in choice for choice in served.data.source_choices())


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.jsonl", "file:///etc/passwd", "", None, 3])
def test_data_elsewhere_are_refused(served, name):
    with pytest.raises(DataError):
        served.data.open_data(name, "train")


def test_margins_are_shown_whatever_else_in_the_form_is_unusable(served):
    values = form(training__batch_size=7, margin__gamma=0.5)
    list(served.data.measure_lexical(served.data.data_config(values)))
    view = served.data.gaps(served.data.data_config(values))
    assert view.mean_reward_margin == pytest.approx(5.0)
    assert set(view.known) == {"jaccard", "rouge1", "rouge2", "rougeL"}


def test_the_form_tells_the_average_target_margin(served):
    config = served.data.data_config(form(margin__gamma=0.2))
    list(served.data.measure_lexical(config))
    assert served.data.margin_line(config) == (
        "Average target margin **2 reward units** (SimPO's γ/β: 0.2)"
    )


def chosen(objective: str, source: str | None = None, **values) -> dict:
    """The demo's form with an objective chosen."""
    own = forms.own_values(objective, source)
    return {**form(**values), "objective.name": objective, **own}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (chosen("kto"), "kto has no target margin."),
        (chosen("dpo"), "Average target margin **0 reward units**: plain dpo"),
        (chosen("dpo", "ef"), "Average target margin **0.03 reward units**"),
        (chosen("slic", "ef"), "Average target margin **3 reward units**"),
        (chosen("simpo"), "Average target margin **3 reward units** (SimPO's γ/β: 0.3)"),
        (
            chosen("gapo", "rating", data__rating_columns="strength"),
            "Average target margin **3 reward units** (SimPO's γ/β: 0.3)",
        ),
        (
            chosen("gapo", "rating"),
            "Average target margin: there is none; the Data tab says why.",
        ),
        (
            chosen("dpo", "ef", data__source="owner/name"),
            "Average target margin: known once the pairs are opened (Data tab).",
        ),
        (
            chosen("dpo", "ef", ef__metric="bertscore_f1"),
            "Average target margin: known once the pairs are scored (Data tab).",
        ),
    ],
)
def test_the_form_tells_the_average_target_margin_of_every_kind(
    served, values, line, tmp_path, monkeypatch
):
    monkeypatch.setenv("GAPO_LITE_CACHE", str(tmp_path / "cache"))
    assert served.data.margin_line(forms.config_of(values)) == line


def test_pairs_without_ratings_can_still_be_looked_at(served):
    config = served.data.data_config(chosen("gapo", "rating"))
    with pytest.raises(DataError, match="none of 264 pairs has ratings"):
        served.data.gaps(config)
    found = served.data.browse(config, "", "margin down", 0)
    assert (found.line, found.reward_margin) == (1, None)


def test_ratings_are_read_from_the_columns_that_the_form_names(served):
    values = chosen("gapo", "rating", data__rating_columns="strength")
    with Path(served.data.margins_csv(values)).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    path = EMBEDDED_DATA["embedded:everyday"]
    own = [json.loads(line)["strength"] for line in path.read_text("utf-8").splitlines()]
    assert [float(row["gap"]) for row in rows] == own


def test_every_pairs_numbers_are_saved_as_csv(served):
    values = form(margin__gamma=0.5)
    config = served.data.data_config(values)
    list(served.data.measure_lexical(config))
    with Path(served.data.margins_csv(values)).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    view = served.data.gaps(config)
    assert [float(row["reward_margin"]) for row in rows] == view.reward_margin.tolist()
    assert [float(row["jaccard"]) for row in rows] == view.known["jaccard"].tolist()
    assert {row["part"] for row in rows} == {"training"}


def test_a_lexical_metric_is_never_sent_to_an_encoder(served):
    with pytest.raises(ConfigError, match="measured already"):
        list(served.data.measure_bertscore(served.data.data_config(form())))


def test_a_pair_is_found_by_its_words(served):
    config = served.data.data_config(form())
    list(served.data.measure_lexical(config))
    found = served.data.browse(config, "LIGHT bulb", "margin down", 0)
    assert "light bulb" in json.dumps(found.prompt).lower()
    assert served.data.browse(config, "no such words anywhere", "file", 0) is None


# -- train --


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (form(data__source="/etc/passwd"), ConfigError),
        (form(model__name="/etc"), ConfigError),
        (form(ef__bertscore_model="../..", ef__metric="bertscore_f1"), ConfigError),
        (form(training__learning_rate=-1), ConfigError),
        ({"no.such": 1}, ConfigError),
    ],
)
def test_a_form_that_is_not_usable_starts_nothing(served, values, error):
    with pytest.raises(error) as refused:
        served.start(values)
    assert served.run_names() == []
    with pytest.raises(error, match=re.escape(str(refused.value))):
        served.will_it_fit(values, "this machine")


@pytest.mark.parametrize("name", ["../x", "a b", ".hidden", "x" * 200, "a/b"])
def test_a_bad_name_starts_nothing(served, name):
    with pytest.raises(RunError, match="cannot be a run's name"):
        served.start(form(), name)
    assert served.run_names() == []


def test_a_yaml_is_loaded_with_the_page_told_nothing_of_the_servers_folders(served, tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("margin: {gamma: 0.7}\n")
    bad.write_text("margin: {gama: 0.7}\n")
    assert served.load_yaml(str(good)).margin.gamma == 0.7
    with pytest.raises(ConfigError, match="Did you mean margin.gamma") as refused:
        served.load_yaml(str(bad))
    assert str(tmp_path) not in str(refused.value)
    (tmp_path / "x.txt").write_text("margin: {gamma: 0.7}\n")
    with pytest.raises(ConfigError, match=r"no \.yaml"):
        served.load_yaml(str(tmp_path / "x.txt"))
    bad.write_text("a" * 1_000_001)
    with pytest.raises(ConfigError, match="larger than 1 MB"):
        served.load_yaml(str(bad))


def test_what_killing_costs_is_told(served, forged):
    run = forged("one")
    (run.checkpoints / "checkpoint-3").mkdir(parents=True)
    assert "last saved at step 3: ended now, it loses 1 steps" in served.lost_by_killing("one")
    (run.checkpoints / "checkpoint-3").rmdir()
    assert "saved nothing yet" in served.lost_by_killing("one")


def test_the_numbers_are_saved_as_csv(served, forged):
    run = forged("one")
    with Path(served.history_csv("one")).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["eval/rewards/accuracies"]) for row in rows] == [
        row["eval/rewards/accuracies"] for row in run.metrics()
    ]


def test_a_run_that_logged_nothing_has_no_csv(served, forged):
    run = forged("one")
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="logged nothing"):
        served.history_csv("one")


# -- runs --


def test_the_table_has_a_row_for_each_run_and_for_each_damaged_folder(served, forged):
    forged("one")
    forged("two", "objective.name=simpo")
    (served.runs_dir / "torn").mkdir()
    (served.runs_dir / "torn" / "config.yaml").write_text("[")
    rows = {row[0]: row for row in served.run_rows()}
    assert set(rows) == {"one", "two", "torn"}
    assert {len(row) for row in rows.values()} == {len(RUN_COLUMNS)}
    named = dict(zip(RUN_COLUMNS, rows["one"], strict=True))
    assert (named["state"], named["EF"], named["γ"], named["β"]) == (
        "finished", "rougeL", "0.3", "10",
    )  # fmt: skip
    assert (named["accuracy"], named["reward margin"]) == ("75.0%", "1.25")
    assert dict(zip(RUN_COLUMNS, rows["two"], strict=True))["EF"] == "–"


@pytest.mark.parametrize(
    ("objective", "source", "cells"),
    [
        ("kto", None, ("–", "–", "–", "0.01")),
        ("orpo", None, ("–", "–", "–", "–")),
        ("slic", None, ("–", "–", "0", "–")),
        ("slic", "ef", ("0.50", "rougeL", "3", "–")),
        ("dpo", "rating", ("0.50", "ratings", "3", "0.01")),
        ("gapo", None, ("0.50", "rougeL", "0.3", "10")),
    ],
)
def test_the_table_and_the_figures_say_what_a_run_has_none_of(
    served, forged, objective, source, cells
):
    given = [f"objective.name={objective}"] + ([f"margin.source={source}"] if source else [])
    run = forged("one", *given)
    run.write("margins.json", {"mean_margin_in_reward_units": 0.5 if "0.50" in cells else 0.0})
    for row in run.metrics():
        run.append("metrics.jsonl", {**row, "step": row["step"] + 10, "eval/margin/mean": 0.2})
    (row,) = served.run_rows()
    named = dict(zip(RUN_COLUMNS, row, strict=True))
    assert tuple(named[column] for column in ("target", "EF", "γ", "β")) == cells
    drawn = figures.of_run(run, read_history(run), axis="step", smoothing=0)
    assert ("target" in json_series(drawn)) == ("0.50" in cells)
    for finding in verdict(run):
        assert "None" not in f"{finding.title} {finding.text} {finding.advice}"


def json_series(html_text: str) -> set[str]:
    """Names of all that the figures draw, but for held-out points."""
    found = re.findall(r'data-points="([^"]*)"', html_text)
    lines = [one for text in found for one in json.loads(html.unescape(text)).get("series", [])]
    return {one["name"].removeprefix("held-out ") for one in lines}


def test_a_run_of_before_there_were_other_objectives_is_still_read(served, forged):
    run = forged("one")
    settings = yaml.safe_load((run.path / "config.yaml").read_text())
    settings["objective"] = {"name": "simpo", "beta": 10.0, "margin_scale": "beta"}
    del settings["margin"]["source"], settings["data"]["rating_columns"]
    (run.path / "config.yaml").write_text(yaml.safe_dump(settings))
    named = dict(zip(RUN_COLUMNS, served.run_rows()[0], strict=True))
    assert (named["objective"], named["EF"], named["γ"], named["β"]) == ("simpo", "–", "0.3", "10")


def test_the_table_follows_what_a_run_logs(served, forged):
    run = forged("one")
    before = served.run_rows()
    assert served.run_rows() == before
    run.append("metrics.jsonl", {**run.metrics()[-1], "step": 8, "eval/rewards/accuracies": 0.9})
    assert served.run_rows()[0][RUN_COLUMNS.index("accuracy")] == "90.0%"


def test_runs_are_overlaid(served, forged):
    forged("one")
    forged("two")
    drawn = served.overlay(["one", "two"], "step", 0.5)
    assert "one, held out" in drawn
    assert "two, held out" in drawn
    assert served.overlay([], "step", 0.5) == ""


@pytest.mark.parametrize(
    "names", [["absent"], ["../one"], ["one"] * 11, [3], [None], [{"a": 1}], ["one\0"]]
)
def test_an_overlay_of_what_is_no_run_is_refused(served, forged, names):
    forged("one")
    with pytest.raises(GapoError):
        served.overlay(names, "step", 0.0)


def test_two_configurations_differ_by_key_and_values(served, forged):
    forged("one")
    forged("two", "margin.gamma=0.5", "objective.name=simpo")
    assert served.difference("one", "two") == [
        ("objective.name", "gapo", "simpo"),
        ("margin.source", "ef", "constant"),
        ("margin.gamma", "0.3", "0.5"),
    ]
    forged("three", "objective.name=orpo")
    assert ("objective.beta", "10.0", "–") in served.difference("one", "three")
    assert served.difference("one", "one") == []


def test_a_run_is_renamed_and_deleted(served, forged):
    forged("one")
    served.rename("one", " other ")
    assert served.run_names() == ["other"]
    with pytest.raises(RunError):
        served.rename("other", "../up")
    assert "cannot be undone" in served.lost_by_deleting("other")
    served.delete("other")
    assert served.run_names() == []
    with pytest.raises(RunError, match="no run"):
        served.delete("other")


def test_the_adapter_is_downloaded_as_what_peft_loads(served, forged):
    forged("one")
    with zipfile.ZipFile(served.adapter_archive("one")) as archive:
        names = set(archive.namelist())
        settings = json.loads(archive.read("one-adapter/adapter_config.json"))
    assert {"one-adapter/adapter_model.safetensors", "one-adapter/README.md"} <= names
    assert not any("training_args" in name for name in names)
    assert settings["r"] == 4


def test_base_and_tuned_are_compared_and_the_result_is_kept(served, forged):
    forged("one")
    assert served.known_comparison("one") == {}
    found = served.evaluate("one")
    assert found["num_pairs"] == 6
    assert found["base"]["loss"] != found["tuned"]["loss"]
    assert served.known_comparison("one") == found


def test_a_training_ends_a_comparison_on_the_same_gpu(served, forged, monkeypatch):
    run = forged("one")
    monkeypatch.setattr(services, "gpu_is_here", lambda: True)
    with_gpu = Services.over(
        runs_dir=served.runs_dir, data_dir=served.data.places.data_dir, models_dir=Path("models")
    )
    found = []

    def compare():
        with pytest.raises(RunError, match="ended") as refused:
            with_gpu.evaluate("one")
        found.append(str(refused.value))

    comparing = threading.Thread(target=compare)
    comparing.start()
    while not with_gpu.evaluations.is_running():
        time.sleep(0.01)
    *_, last = with_gpu.answer(Talk(), "one", BLIND, "Why?", Settings())
    assert "is being compared with its base on this GPU" in last.columns[0].remark
    run.write("status.json", {"state": "running", "pid": 1, "step": 12, "total": 60})
    with run.lock():
        with_gpu.give_way()
        comparing.join(20)
    assert found
    assert with_gpu.known_comparison("one") == {}


def test_a_failed_run_without_settings_has_no_comparison(served):
    job = served.runs_dir / ".jobs" / "early.job"
    job.mkdir(parents=True)
    (job / "config.yaml").write_text("")
    (job / "job.json").write_text("{}")
    (job / "output.log").touch()
    assert served.known_comparison("early") == {}


def test_a_run_without_adapter_is_not_exported(served, forged):
    forged("one", adapter=False)
    with pytest.raises(RunError, match="saved no adapter"):
        served.export_merged("one")


def test_a_model_goes_to_ollama_from_a_folder_of_its_own(served, forged):
    forged("one")
    folder = served.export_merged("one", ollama=True)
    assert folder == served.runs_dir.parent / "exports" / "one-ollama"
    assert "\nFROM .\nTEMPLATE " in (folder / "Modelfile").read_text(encoding="utf-8")
    assert (folder / "model.safetensors").is_file()
    with pytest.raises(RunError, match="is there already"):
        served.export_merged("one", ollama=True)


# -- chat --


def test_runs_with_an_adapter_can_answer_and_so_can_base_models(served, forged, tiny_model):
    assert served.voice_choices() == ["base: embedded:smollm2-135m-instruct"]
    forged("one")
    forged("empty", adapter=False)
    assert served.voice_choices() == [
        "one",
        "base: embedded:smollm2-135m-instruct",
        f"base: {tiny_model}",
    ]


@pytest.mark.parametrize(
    ("voice", "error"),
    [
        ("absent", RunError),
        ("../one", RunError),
        ("base: /etc", ModelError),
        ("base: ../../x", ModelError),
        ("", ConfigError),
        (None, ConfigError),
        (["one"], ConfigError),
    ],
)
def test_a_voice_that_is_none_is_refused(served, forged, voice, error):
    forged("one")
    with pytest.raises(error):
        list(served.answer(Talk(), voice, BLIND, "Why?", Settings()))


def test_there_is_nothing_to_vote_on_before_a_blind_answer(served, forged):
    forged("one")
    with pytest.raises(ConfigError, match="nothing to vote on"):
        served.vote(Talk(), "left")
    with pytest.raises(RunError, match="not open"):
        served.vote(Talk("one", True, BLIND, duel="guessed"), "left")


def test_on_one_gpu_chat_waits_for_training_and_says_so(served, forged, monkeypatch):
    run = forged("one")
    run.write("status.json", {"state": "running", "pid": 1, "step": 12, "total": 60})
    monkeypatch.setattr(services, "gpu_is_here", lambda: True)
    with_gpu = Services.over(
        runs_dir=served.runs_dir, data_dir=served.data.places.data_dir, models_dir=Path("models")
    )
    with run.lock():
        assert jobs.active(served.runs_dir) == "one"
        *_, last = with_gpu.answer(Talk(), "one", BLIND, "Why?", Settings())
        words = last.columns[0].remark
        assert "one is being trained on this GPU (step 12 of 60)" in words
        assert with_gpu.voices.loaded() is None


@pytest.mark.parametrize(
    ("visible", "found", "expected"), [("", True, False), ("-1", True, False), (None, False, False)]
)
def test_a_hidden_gpu_is_none(monkeypatch, visible, found, expected):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(["x"] if found else []))
    monkeypatch.setattr(Path, "exists", lambda self: found)
    assert services.gpu_is_here() is expected


def test_a_real_run_is_started_stopped_and_found_again(served, tiny_settings, tiny_model):
    values = forms.values_of(parse_config(tiny_settings))
    source = served.data.keep_upload(tiny_settings["data"]["source"])
    values |= {"data.source": source, "data.heldout_source": "", "model.name": str(tiny_model)}
    name = served.start(values, "real")
    assert (name, served.watched()) == ("real", "real")
    with pytest.raises(RunError, match="one training at a time"):
        served.start(values)
    with pytest.raises(RunError, match="stop it first"):
        served.delete("real")
    served.kill("real")
