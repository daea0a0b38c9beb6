"""The Train tab in a real browser: real training is started, watched, lost, stopped, resumed."""

from __future__ import annotations

import csv
import io
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import (
    CUT_OFF,
    PATIENCE_WITH_PROCESSES_MS,
    choose,
    choose_file,
    curves,
    enter,
    expect,
    expect_notice,
    expect_state,
    load_settings,
    of_title,
    open_tab,
    shoot,
    small_config,
    visiting,
    watch,
)
from checkout import ROOT
from forging import forge_run
from PIL import Image

from app import forms, jobs
from gapo_lite.config import load_config

SHORT = (
    "training.max_steps=12",
    'training.sample_prompts=["Why?"]',
    "training.sample_max_tokens=8",
)
LONG = (
    *("training.max_steps=100000", "training.eval_steps=50000", "training.save_steps=50000"),
    "training.batch_size=12",  # so slow that its curve is drawn with every step, not thinned
)


@pytest.fixture
def page(chromium: Any, server: Any) -> Iterator[Any]:
    with visiting(chromium, server) as opened:
        yield opened


@pytest.fixture
def long_run(server: Any, tiny_settings: dict[str, Any]) -> str:
    """A run that is being trained and would be for hours: the module's, or a new one."""
    config = small_config(server, tiny_settings, *LONG)
    name = jobs.active(server.runs_dir) or jobs.start(config, server.runs_dir, None, "long")
    until(lambda: len(server.metrics(name)) > 2)
    return name


def until(condition: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def steps(server: Any, run: str) -> list[dict[str, Any]]:
    """What was logged of training, without the evaluations."""
    return [row for row in server.metrics(run) if "loss" in row]


KEEP_NOTICES = """() => {
    window.notices = [];
    new MutationObserver(() => {
        const shown = document.querySelectorAll('[data-testid="toast-text"]');
        for (const {innerText} of shown)
            if (innerText && !window.notices.includes(innerText)) window.notices.push(innerText);
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
LAST_STEP = """() => {
    const figures = [...document.querySelectorAll(".live figure.chart")];
    const loss = figures.find((one) => one.innerText.startsWith("Loss"));
    return loss?.dataset.points ? JSON.parse(loss.dataset.points).series[0].x.at(-1) : 0;
}"""


def until_drawn(page: Any, step: int) -> None:
    """Waits until the curve of the loss reaches a step."""
    page.wait_for_function(f"({LAST_STEP})() >= {step}")


# -- the form --


def expect_command(panel: Any, config: Any) -> None:
    """The inputs of a form change one after the other, and the command with each of them."""
    deadline = time.monotonic() + 20
    while config_of_command(panel) != config and time.monotonic() < deadline:
        panel.page.wait_for_timeout(100)
    assert config_of_command(panel) == config


def test_a_preset_fills_the_form_and_its_command_trains_just_that(page: Any) -> None:
    panel = open_tab(page, "Train")
    choose(panel, "start from", "SimPO: Llama-3-8B")
    expect(panel.get_by_label("objective", exact=True)).to_have_value("simpo")
    expect(panel.get_by_label("model", exact=True)).to_have_value(
        "meta-llama/Meta-Llama-3-8B-Instruct"
    )
    enter(panel, "seed", 7)
    enter(panel, "β (beta)", 2.5)
    panel.get_by_role("button", name="YAML and command").click()
    expect(panel.locator(".cm-content").last).to_contain_text("training.seed=7")
    expect(panel.locator(".cm-content").last).to_contain_text("objective.beta=2.5")
    recipe = ROOT / "configs" / "llama3-8b-simpo.yaml"
    expected = load_config(recipe, ["training.seed=7", "objective.beta=2.5"])
    expect_command(panel, expected)


def test_a_yaml_fills_the_form_and_is_saved_as_the_form_has_it(
    page: Any, server: Any, tiny_settings: dict[str, Any]
) -> None:
    odd = 'training.sample_prompts=["Ünïcode 🦜?", "two\\nlines and a \\\\"]'
    config = small_config(server, tiny_settings, odd, "margin.gamma=0.123", "lora.rank=3")
    panel = load_settings(page, config)
    expect(panel.get_by_label("γ (gamma)", exact=True)).to_have_value("0.123")
    expect(panel.locator(".cm-content").last).to_contain_text("margin.gamma=0.123")
    expect_command(panel, config)
    with page.expect_download() as saving:
        panel.get_by_role("button", name="Save this YAML").click()
    assert saving.value.path().read_text(encoding="utf-8") == config.to_yaml()
    lines = panel.locator(".cm-content").first.locator(".cm-line").all_inner_texts()
    assert lines[:5] == config.to_yaml().splitlines()[:5]


def test_a_file_that_is_no_configuration_is_refused_in_a_sentence(page: Any) -> None:
    panel = open_tab(page, "Train")
    panel.get_by_role("button", name="YAML and command").click()
    bad = {
        "margin: {gama: 1}": "gama",
        "training: [": "YAML",
        "model: {name: /etc}": "/etc",
        "": "holds no settings",
    }
    for text, words in bad.items():
        file = {"name": "bad.yaml", "mimeType": "text/yaml", "buffer": text.encode()}
        choose_file(page, "Load a YAML", file)
        expect_notice(page, words)
    expect(panel.get_by_label("γ (gamma)", exact=True)).to_have_value("0.3")


def test_a_setting_that_is_out_of_range_is_told_beside_the_form(page: Any) -> None:
    panel = open_tab(page, "Train")
    enter(panel, "batch size", 100_000)
    expect(panel.locator(".warning")).to_contain_text("less than or equal to 65536")
    panel.get_by_role("button", name="Start training").click()
    expect_notice(page, "less than or equal to 65536")
    enter(panel, "batch size", 8)
    expect(panel.locator(".warning")).to_have_count(0)


# -- objectives --


def setting(panel: Any, key: str) -> Any:
    """The input of a setting, in sight or not."""
    return panel.get_by_label(forms.fields()[key].label, exact=True)


def test_an_objective_shows_its_formula_and_its_own_settings_and_is_trained(
    page: Any, server: Any, tiny_settings: dict[str, Any]
) -> None:
    panel = load_settings(page, small_config(server, tiny_settings, *SHORT))
    expect(panel.locator(".formula code")).to_have_text("−log σ(β(aw − al) − s·margin)")
    expect(setting(panel, "ef.metric")).to_be_visible()
    choose(panel, "objective", "dpo")
    expect(panel.locator(".formula code")).to_have_text("−log σ(β(ρw − ρl) − s·margin)")
    expect(panel.locator(".formula")).to_contain_text("Needs the reference")
    expect(panel.locator(".formula")).to_contain_text("arXiv 2305.18290")
    expect(setting(panel, "objective.beta")).to_have_value("0.01")
    expect(setting(panel, "margin.source")).to_have_value("constant")
    expect(setting(panel, "margin.gamma")).to_have_value("0")
    for key in ("ef.metric", "margin.mapping", "objective.desirable_weight"):
        expect(setting(panel, key)).to_be_hidden()
    expect(panel.get_by_text("Average target margin 0 reward units: plain dpo")).to_be_visible()
    shoot(page, "train-dpo")
    enter(panel, "β (beta)", 0.05)
    choose(panel, "margin from", "ef")
    expect(setting(panel, "ef.metric")).to_be_visible()
    expect(setting(panel, "margin.gamma")).to_have_value("3")
    expect(setting(panel, "objective.beta")).to_have_value("0.05")  # a person's own stays
    expect(panel.get_by_label("name of the run")).to_have_attribute("placeholder", "dpo-rougel")
    choose(panel, "objective", "gapo")
    expect(setting(panel, "objective.beta")).to_have_value("10")
    choose(panel, "margin from", "constant")
    expect_notice(page, "with a constant margin it is simpo")
    choose(panel, "objective", "kto")
    for key in ("objective.desirable_weight", "objective.undesirable_weight"):
        expect(setting(panel, key)).to_have_value("1")
        expect(setting(panel, key)).to_be_visible()
    for key in ("margin.source", "margin.gamma", "ef.metric"):
        expect(setting(panel, key)).to_be_hidden()
    expect(panel.get_by_text("kto has no target margin.")).to_be_visible()
    expect(panel.locator(".warning")).to_have_count(0)
    shoot(page, "train-kto")
    panel.get_by_role("button", name="Start training").click()
    expect_notice(page, "Started kto.")
    expect_state(page, "finished")
    xs, ys = curves(panel, "Loss")["training"]
    assert xs == list(range(1, 13))
    assert ys == pytest.approx([row["loss"] for row in steps(server, "kto")], rel=1e-3)
    assert "target" not in curves(panel, "Reward margin")
    expect(panel.locator(".finding").first).to_be_visible()
    shoot(page, "train-kto-finished")


def test_a_form_filled_by_a_preset_or_a_run_shows_what_that_has(
    page: Any, server: Any, tiny_settings: dict[str, Any]
) -> None:
    config = small_config(server, tiny_settings, "objective.name=orpo")
    forge_run(server.runs_dir / "by-orpo", config.model_dump(mode="json"), adapter=False)
    panel = open_tab(page, "Train")
    choose(panel, "start from", "KTO: Llama-3-8B")
    expect(setting(panel, "objective.desirable_weight")).to_be_visible()
    expect(setting(panel, "margin.gamma")).to_be_hidden()
    choose(panel, "start from", "SLiC: Llama-3-8B")
    expect(setting(panel, "objective.delta")).to_have_value("1")
    for key, is_there in (("objective.beta", False), ("margin.gamma", True)):
        expect(setting(panel, key)).to_be_visible(visible=is_there)
    runs = open_tab(page, "Runs")
    choose(runs, "chosen run", "by-orpo")
    runs.get_by_role("button", name="Copy to a new form").click()
    expect_notice(page, "The settings of by-orpo are in the form now.")
    expect(setting(panel, "objective.odds_weight")).to_have_value("0.5")
    for key in ("objective.beta", "margin.gamma", "objective.delta"):
        expect(setting(panel, key)).to_be_hidden()
    panel.get_by_role("button", name="All other settings").click()
    expect(panel.get_by_role("button", name="LoRA: scale")).to_be_visible()
    expect(panel.get_by_role("button", name="Margin: floor")).to_be_hidden()
    panel.get_by_role("button", name="YAML and command").click()
    expect_command(panel, config)
    choose(panel, "start from", "Demo: embedded model, CPU or GPU")
    expect(panel.get_by_role("button", name="Margin: floor")).to_be_visible()
    expect(setting(panel, "objective.beta")).to_have_value("10")


def test_an_empty_number_stays_empty_when_it_comes_into_sight(page: Any) -> None:
    panel = open_tab(page, "Train")
    choose(panel, "start from", "DPO: Llama-3-8B")  # recomputed layers are left open in it
    panel.get_by_role("button", name="All other settings").click()
    for section, keys in (
        ("Training: schedule", ("max_steps", "micro_batch_tokens", "gradient_checkpointing")),
        ("Data: splits", ("max_pairs",)),
    ):
        panel.get_by_role("button", name=section).click()
        for key in keys:
            expect(panel.get_by_label(key.replace("_", " "), exact=True)).to_have_value("")
    enter(panel, "seed", 8)
    panel.get_by_role("button", name="YAML and command").click()
    recipe = ROOT / "configs" / "llama3-8b-dpo.yaml"
    expect_command(panel, load_config(recipe, ["training.seed=8"]))


# -- will it fit? --


def ask_whether_it_fits(panel: Any, words: str) -> None:
    """Presses the button and waits for an answer that is the form's."""
    panel.get_by_role("button", name="Will it fit?").click()
    expect_answer(panel, words)


def expect_answer(panel: Any, words: str) -> None:
    fresh = panel.locator(".outlook:not(.stale) .state")
    expect(fresh).to_have_text(words, timeout=PATIENCE_WITH_PROCESSES_MS)
    expect(panel.get_by_role("button", name="Stop asking")).to_be_hidden()


def test_this_machine_has_room_for_a_small_run(
    page: Any, server: Any, tiny_settings: dict[str, Any]
) -> None:
    panel = load_settings(page, small_config(server, tiny_settings, *SHORT))
    expect(panel.get_by_label("card", exact=True)).to_have_value("this machine")
    ask_whether_it_fits(panel, "it fits")
    expect(panel.locator(".outlook")).to_contain_text("tokens/s")
    expect(panel.get_by_role("button", name="Use these settings")).to_be_hidden()
    assert jobs.active(server.runs_dir) is None
    enter(panel, "batch size", 3)
    expect(panel.locator(".outlook.stale")).to_be_visible()
    expect(panel.get_by_text("For other settings than those of the form now.")).to_be_visible()
    enter(panel, "batch size", tiny_settings["training"]["batch_size"])
    expect(panel.locator(".outlook.stale")).to_have_count(0)
    enter(panel, "batch size", 0)
    panel.get_by_role("button", name="Will it fit?").click()
    expect_notice(page, "training.batch_size: input should be greater than or equal to 1, but is 0")


def test_settings_that_would_make_it_fit_are_put_into_the_form(page: Any) -> None:
    panel = open_tab(page, "Train")
    for label in ("batch size", "micro batch size"):
        enter(panel, label, 264)
    choose(panel, "card", "RTX 3060 12 GB")
    ask_whether_it_fits(panel, "it does not fit")
    expect(panel.get_by_role("cell", name="training.micro_batch_tokens")).to_be_visible()
    shoot(page, "train-does-not-fit")
    panel.get_by_role("button", name="Use these settings").click()
    expect_notice(page, "These settings are in the form now.")
    expect(panel.get_by_label("micro batch size", exact=True)).to_have_value("")
    expect(
        panel.get_by_text(re.compile(r"264 pairs a step, at most [\d,]+ tokens"))
    ).to_be_visible()
    expect_answer(panel, "it fits")
    expect(panel.get_by_role("button", name="Use these settings")).to_be_hidden()
    shoot(page, "train-fits")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_answer_fits_onto_a_phone_and_no_process_is_left_of_a_question_that_is_stopped(
    chromium: Any, server: Any, theme: str
) -> None:
    with visiting(chromium, server, theme=theme, width=390) as page:
        panel = open_tab(page, "Train")
        panel.get_by_role("button", name="Will it fit?").click()
        until(lambda: forecasters(server))
        panel.get_by_role("button", name="Stop asking").click()
        expect(panel.get_by_text("Not answered.")).to_be_visible()
        until(lambda: not forecasters(server), 10)
        choose(panel, "card", "RTX 4090 24 GB")
        ask_whether_it_fits(panel, "it fits")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        shoot(page, f"phone-{theme}-fits")


def test_a_window_that_is_closed_leaves_no_question_behind(chromium: Any, server: Any) -> None:
    with visiting(chromium, server) as page:
        open_tab(page, "Train").get_by_role("button", name="Will it fit?").click()
        until(lambda: forecasters(server))
    until(lambda: not forecasters(server), 30)


def forecasters(server: Any) -> list[str]:
    """The processes that work out an answer for this server."""
    found = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    pids = [pid for file in found for pid in file.read_text().split()]
    return [pid for pid in pids if b"forecast" in Path(f"/proc/{pid}/cmdline").read_bytes()]


# -- a whole run --


def test_a_run_from_an_uploaded_file_to_its_last_step(
    page: Any, server: Any, tiny_settings: dict[str, Any]
) -> None:
    load_settings(page, small_config(server, tiny_settings, *SHORT))
    open_tab(page, "Data")
    source = Path(tiny_settings["data"]["source"]).read_bytes()
    choose_file(
        page,
        "Upload a file",
        {"name": "my päirs.jsonl", "mimeType": "", "buffer": source},
    )
    panel = open_tab(page, "Train")
    expect(panel.get_by_label("data", exact=True)).to_have_value(re.compile("my päirs.jsonl"))
    panel.get_by_label("name of the run").fill("whole")
    panel.get_by_role("button", name="Start training").click()
    expect_notice(page, "Started whole.")
    expect_state(page, "finished")
    expect(panel.get_by_text("step 12 of 12")).to_be_visible()
    expect(panel.get_by_role("button", name="Stop (saves)")).to_be_hidden()
    expect(panel.get_by_role("button", name="Resume")).to_be_hidden()
    logged = steps(server, "whole")
    xs, ys = curves(panel, "Loss")["training"]
    assert xs == list(range(1, 13))
    assert ys == pytest.approx([row["loss"] for row in logged], rel=1e-3)
    assert "target" in curves(panel, "Reward margin")
    expect(panel.locator(".finding").first).to_be_visible()
    expect(panel.locator("pre.log")).to_contain_text("step 12/12")
    expect(panel.get_by_role("cell", name="Why?")).to_be_visible()
    config = (server.runs_dir / "whole" / "config.yaml").read_text(encoding="utf-8")
    assert "my päirs.jsonl" in config
    shoot(page, "train-finished")


def test_figures_are_saved_as_pictures_and_numbers_as_csv(
    page: Any, server: Any, tiny_settings: dict[str, Any]
) -> None:
    name = a_run_with_curves(server, tiny_settings)
    panel = watch(page, name)
    with page.expect_download() as one:
        of_title(panel, "Reward margin").get_by_role("button").click()
    with page.expect_download() as every:
        panel.get_by_role("button", name="Save all figures as PNG").click()
    sizes = [drawn_size(saving.value.path()) for saving in (one, every)]
    assert sizes[0][0] > 600
    assert sizes[1][0] * sizes[1][1] > 5 * sizes[0][0] * sizes[0][1]
    with page.expect_download() as numbers:
        panel.get_by_role("button", name="Save the numbers as CSV").click()
    assert numbers.value.suggested_filename == f"{name}.csv"
    text = numbers.value.path().read_text(encoding="utf-8")
    rows = [
        {key: float(cell) for key, cell in row.items() if cell}
        for row in csv.DictReader(io.StringIO(text))
    ]
    assert rows == server.metrics(name)[: len(rows)]
    assert len(rows) > 2


def a_run_with_curves(server: Any, tiny_settings: dict[str, Any]) -> str:
    """The first of the module's runs that has logged something, or a new one."""
    for name in jobs.names(server.runs_dir):
        if len(server.metrics(name)) > 2:
            return name
    name = jobs.start(small_config(server, tiny_settings, *SHORT), server.runs_dir, None, "short")
    until(lambda: jobs.report(server.runs_dir, name).state == "finished")
    return name


def drawn_size(picture: Path) -> tuple[int, int]:
    """Width and height of a picture on which something is drawn, in several colours."""
    with Image.open(picture) as image:
        colours = image.convert("RGB").quantize(32).getcolors()
        assert image.format == "PNG"
        assert colours is not None
        assert len(colours) > 8
        assert max(count for count, _ in colours) < 0.995 * image.width * image.height
        return image.size


# -- a run that goes on --


def test_two_people_who_press_start_get_one_run_and_one_clear_answer(
    chromium: Any, server: Any, tiny_settings: dict[str, Any]
) -> None:
    config = small_config(server, tiny_settings, *LONG)
    before = set(jobs.names(server.runs_dir))
    with visiting(chromium, server) as one, visiting(chromium, server) as two:
        for page in (one, two):
            load_settings(page, config)
            page.evaluate(KEEP_NOTICES)  # one may be gone before the other page's is there
        one.get_by_role("button", name="Start training").click()
        two.get_by_role("button", name="▶ Start").click()  # the one that every tab has
        for page in (one, two):
            page.wait_for_function("() => window.notices.length")
        told = [page.evaluate("() => window.notices[0]") for page in (one, two)]
        (name,) = set(jobs.names(server.runs_dir)) - before
        first_won = told[0] == f"Started {name}."
        winner, loser = (one, two) if first_won else (two, one)
        assert told[1 - first_won] == f"Started {name}."
        assert re.fullmatch(
            f"The run {name} is being trained .*: wait for it or stop it; one training at a time.",
            told[first_won],
        )
        expect_state(winner, "running")
        open_tab(loser, "Runs")
        watch(loser, name)
        expect_state(loser, "running")


def test_a_step_reaches_the_page_within_two_seconds_of_being_logged(
    page: Any, server: Any, long_run: str
) -> None:
    logged: dict[int, float] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            for row in steps(server, long_run)[-20:]:
                logged.setdefault(row["step"], time.time())

    reader = threading.Thread(target=look)
    reader.start()
    try:
        open_tab(page, "Train")
        expect_state(page, "running")
        page.evaluate(
            f"""() => {{
                window.seen = [];
                new MutationObserver(() => {{
                    const step = ({LAST_STEP})();
                    if (window.seen.at(-1)?.[0] !== step) window.seen.push([step, Date.now()]);
                }}).observe(document.querySelector(".live"), {{ subtree: true, childList: true }});
            }}"""
        )
        page.wait_for_function("window.seen.length >= 6")
    finally:
        over.set()
        reader.join()
    seen = page.evaluate("window.seen")
    due = [step for step in logged if seen[0][0] < step <= seen[-1][0]]
    shown = {step: min(at for drawn, at in seen if drawn >= step) / 1000 for step in due}
    assert len(due) >= 5
    assert max(shown[step] - logged[step] for step in due) < 2
    expect(page.locator(".status-line")).to_contain_text(re.compile(r"to go.*pairs/s.*tokens/s"))
    shoot(page, "train-running")


def test_a_page_that_is_loaded_again_finds_the_run_with_its_whole_curve(
    chromium: Any, server: Any, long_run: str
) -> None:
    with visiting(chromium, server, forgiven=CUT_OFF) as page:
        open_tab(page, "Train")
        expect_state(page, "running")
        page.reload()
        expect(page.get_by_role("tab", name="Train", selected=True)).to_be_visible()  # as before
        known = steps(server, long_run)
        panel = open_tab(page, "Train")
        expect_state(page, "running")
        until_drawn(page, known[-1]["step"])
        xs, ys = curves(panel, "Loss")["training"]
        assert xs[: len(known)] == [row["step"] for row in known]
        assert ys[: len(known)] == pytest.approx([row["loss"] for row in known], rel=1e-3)
        panel.get_by_label("epoch", exact=True).click()
        expect(of_title(panel, "Loss").locator("text.label")).to_have_text("epoch")


def test_a_run_that_is_being_trained_can_be_neither_deleted_nor_renamed(
    page: Any, server: Any, long_run: str
) -> None:
    panel = open_tab(page, "Runs")
    expect(panel.get_by_role("gridcell", name=long_run, exact=True).first).to_be_visible()
    choose(panel, "chosen run", long_run)
    panel.get_by_role("button", name="Delete", exact=True).click()
    expect(panel.get_by_text(f"Delete {long_run} (running)")).to_be_visible()
    panel.get_by_role("button", name="Delete it").click()
    expect_notice(page, f"The run {long_run} is being trained: stop it first.")
    panel.get_by_role("button", name="Keep it").click()
    enter(panel, "new name", "other")
    panel.get_by_role("button", name="Rename").click()
    expect_notice(page, f"The run {long_run} is being trained: stop it first.")
    assert jobs.report(server.runs_dir, long_run).state == "running"


def test_training_goes_on_when_the_server_is_killed_and_every_page_finds_it_again(
    chromium: Any, server: Any, long_run: str
) -> None:
    with visiting(chromium, server, forgiven=CUT_OFF) as page:
        open_tab(page, "Train")
        expect_state(page, "running")
        server.kill()
        expect(page.locator(".live.lost")).to_be_visible()
        shoot(page, "train-server-lost")
        before = len(steps(server, long_run))
        until(lambda: len(steps(server, long_run)) > before + 2)  # nobody watches, it goes on
        server.start()
        until_drawn(page, before)  # by itself
        expect(page.locator(".live.lost")).to_have_count(0)
        with visiting(chromium, server) as fresh:
            panel = open_tab(fresh, "Train")
            expect_state(fresh, "running")
            known = [row["step"] for row in steps(server, long_run)]
            until_drawn(fresh, known[-1])
            assert curves(panel, "Loss")["training"][0][: len(known)] == known


def test_stop_saves_and_resume_goes_on_from_there(page: Any, server: Any, long_run: str) -> None:
    panel = open_tab(page, "Train")
    expect_state(page, "running")
    expect(panel.get_by_role("button", name="Resume")).to_be_hidden()
    panel.get_by_role("button", name="Stop (saves)").click()
    expect_notice(page, f"{long_run} ends after this step, and saves.")
    expect_state(page, "stopped")
    stopped_at = steps(server, long_run)[-1]["step"]
    expect(panel.get_by_role("button", name="Stop (saves)")).to_be_hidden()
    panel.get_by_role("button", name="Resume").click()
    expect_notice(page, f"{long_run} goes on.")
    expect_state(page, "running")
    until(lambda: steps(server, long_run)[-1]["step"] > stopped_at + 2)
    until_drawn(page, stopped_at + 2)
    logged = [row["step"] for row in steps(server, long_run)]
    assert logged == list(range(1, logged[-1] + 1))


def test_stop_now_asks_before_it_throws_anything_away(
    page: Any, server: Any, long_run: str
) -> None:
    panel = open_tab(page, "Train")
    expect_state(page, "running")
    panel.get_by_role("button", name="Stop now, without saving").click()
    expect(
        panel.get_by_text(re.compile(f"{long_run} (has saved nothing|was last saved)"))
    ).to_be_visible()
    panel.get_by_role("button", name="Let it go on").click()
    expect(panel.get_by_role("button", name="Stop now and lose that")).to_be_hidden()
    assert jobs.active(server.runs_dir) == long_run
    panel.get_by_role("button", name="Stop now, without saving").click()
    panel.get_by_role("button", name="Stop now and lose that").click()
    expect_notice(page, f"{long_run} was stopped without saving.")
    expect_state(page, "interrupted")
    assert jobs.active(server.runs_dir) is None


def config_of_command(panel: Any) -> Any:
    """The configuration that the printed command trains, read as the command line reads it.

    None while the panel that holds the command is still opening.
    """
    text = "".join(panel.locator(".cm-content").last.locator(".cm-line").all_inner_texts())
    if not text:
        return None
    program, verb, recipe, *options = shlex.split(text)
    assert (Path(program).name, verb) == ("gapo-lite", "train")
    pairs = list(zip(options[::2], options[1::2], strict=True))
    assert {name for name, _ in pairs} <= {"--set", "--name", "--runs-dir"}
    return load_config(ROOT / recipe, [value for name, value in pairs if name == "--set"])
