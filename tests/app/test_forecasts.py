"""Will it fit, asked of a process of its own, and what a person is shown of the answer."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from checkout import ROOT
from forging import forge_run

from app import forecast_views, forecasts, forms
from app.forecasts import CARDS, THIS_MACHINE, Outlook, answers, asked
from app.notices import as_html
from gapo_lite.config import RunConfig, load_config, parse_config
from gapo_lite.devices import GPUS, VISIBLE
from gapo_lite.errors import ConfigError, GapoError, RunError

RECIPE = ROOT / "configs" / "llama3-8b-gapo-rougel.yaml"
GREEDY = (
    "model.name=embedded:smollm2-135m-instruct",
    "data.source=embedded:everyday",
    *("training.batch_size=264", "training.micro_batch_size=264"),
    "training.gradient_checkpointing=0",
)


@pytest.fixture
def config(tiny_settings) -> RunConfig:
    return parse_config(tiny_settings)


def answer(config: RunConfig, card: str, runs_dir: Path) -> Outlook:
    *_, last = answers(asked(config, card), runs_dir)
    return last


def children() -> set[str]:
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {pid for file in found for pid in file.read_text().split()}


def test_every_card_that_the_command_line_knows_is_offered_by_its_name(config):
    assert CARDS[0] == THIS_MACHINE
    assert len(CARDS) == len(GPUS) + 1
    for card in (*CARDS, "4090", "NVIDIA GeForce RTX 4090", "24GB", "24 gb"):
        assert asked(config, card).card == card


@pytest.mark.parametrize(
    "card", ["voodoo2", "RTX 4090\0", "", "0GB", None, 5, ["RTX 4090"], {"a": 1}]
)
def test_what_is_no_card_is_refused_with_what_does(config, card):
    with pytest.raises(ConfigError, match="such as 24GB"):
        asked(config, card)


def test_a_card_of_a_size_is_answered_for_with_what_was_assumed(tmp_path):
    recipe = load_config(RECIPE, ["data.max_pairs=300"])
    last = answer(recipe, "24GB", tmp_path)
    assert last.found["memory"] == pytest.approx(24 * VISIBLE)
    shown = forecast_views.answer(asked(recipe, "24GB"), last)
    for words in ("speed unknown", "shape is the published one", "Lengths are not counted"):
        assert as_html(words) in shown


def test_this_machine_is_answered_for_with_what_was_measured_on_it(config, tiny_settings, tmp_path):
    run = forge_run(tmp_path / "like-it", tiny_settings, adapter=False)
    run.write("environment.json", {"gpu": None})
    run.append("metrics.jsonl", {"step": 4, "tokens_per_second": 1234.5, "memory_gib": 0.75})
    last = answer(config, THIS_MACHINE, tmp_path)
    found = last.found
    assert found["fits"]
    assert found["peak"] == pytest.approx(sum(found["parts"].values()))
    assert 0 < found["usable"] < found["memory"]
    shown = forecast_views.answer(asked(config, THIS_MACHINE), last)
    for words in ("it fits", as_html(found["device"]), "tokens/s", "the whole run", "Estimated"):
        assert words in shown
    if found["is_cpu"]:
        assert found["measured"] == [["like-it", 0.75, 1234.5]]
        assert "like-it" in shown
        assert "1,234" in shown
        assert "was measured now" in shown
        assert "alone it is quicker" not in shown
        beside = forecast_views.answer(asked(config, THIS_MACHINE), replace(last, beside="other"))
        assert "while other was being trained: alone it is quicker" in beside


def test_what_does_not_fit_on_a_card_does_with_the_settings_that_come_with_it(
    tiny_settings, tmp_path
):
    greedy = parse_config(tiny_settings, ["data.heldout_source=null", *GREEDY])
    found = answer(greedy, "RTX 3060 12 GB", tmp_path).found
    assert (found["fits"], found["device"]) == (False, "RTX 3060 12 GB")
    shown = forecast_views.answer(asked(greedy, "RTX 3060 12 GB"), Outlook(found=found))
    for words in ("it does not fit", "training.micro_batch_tokens", "none of them measured yet"):
        assert words in shown
    mended = forms.config_of(forms.values_of(greedy) | found["advice"])
    assert answer(mended, "RTX 3060 12 GB", tmp_path).found["fits"]


def test_an_answer_is_stale_when_what_decides_it_has_changed(config):
    question = asked(config, THIS_MACHINE)
    for change, is_like in (
        ("margin.gamma=0.7", True),
        ("training.batch_size=3", False),
        ("lora.rank=2", False),
        ("data.max_length=99", False),
    ):
        other = parse_config(config.model_dump(mode="json"), [change])
        assert asked(other, THIS_MACHINE).is_like(question) is is_like, change
    assert not asked(config, "RTX 4090").is_like(question)


def test_data_that_are_not_there_are_told_as_the_command_line_tells_it(config, tmp_path):
    gone = config.model_copy(
        update={"data": config.data.model_copy(update={"source": str(tmp_path / "gone.jsonl")})}
    )
    with pytest.raises(GapoError, match="gone.jsonl"):
        answer(gone, "RTX 4090", tmp_path)


def test_who_waits_no_longer_leaves_no_process_behind(config, tmp_path):
    before = children()
    signs = answers(asked(config, "RTX 4090"), tmp_path)
    next(signs)
    (pid,) = children() - before
    began = time.monotonic()
    signs.close()
    assert time.monotonic() - began < 2
    assert not Path(f"/proc/{pid}").exists()


def test_what_takes_too_long_is_given_up(config, tmp_path, monkeypatch):
    monkeypatch.setattr(forecasts, "PATIENCE_S", 0.0)
    before = children()
    with pytest.raises(RunError, match=r"given up after 0 minutes.*data\.max_pairs"):
        answer(config, "RTX 4090", tmp_path)
    assert children() == before
