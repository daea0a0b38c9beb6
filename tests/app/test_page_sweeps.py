"""The Sweeps tab in a real browser: a grid is built, watched while it trains, opened, reported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import (
    CUT_OFF,
    choose,
    enter,
    expect,
    expect_notice,
    load_settings,
    open_tab,
    shoot,
    small_config,
    visiting,
)

from app import sweep_jobs

PATIENCE_MS = 900_000  # two trainings with their evaluations and answers, on a busy machine
SHORT = (
    *("training.max_steps=3", "training.eval_steps=3", "training.save_steps=3"),
    *("training.epochs=1", "training.keep_checkpoints=1"),
)


@pytest.fixture
def page(chromium: Any, server: Any) -> Iterator[Any]:
    with visiting(chromium, server, forgiven=CUT_OFF) as opened:
        yield opened


def build_grid(page: Any, values: str) -> Any:
    """The Sweeps tab's panel with a grid of one setting, one seed and short answers."""
    panel = open_tab(page, "Sweeps")
    choose(panel, "setting 1", "ef.metric")
    enter(panel, "values 1", values)
    enter(panel, "seeds", "1")
    enter(panel, "prompts answered after a run", 1)
    enter(panel, "longest such answer, tokens", 4)
    return panel


def runs_in_state(page: Any, state: str) -> Any:
    return page.locator(f".sweep-table [data-state='{state}']")


@pytest.mark.timeout(2400)
def test_a_grid_is_built_watched_opened_and_reported(
    page: Any, chromium: Any, server: Any, tiny_settings: dict[str, Any]
) -> None:
    load_settings(page, small_config(server, tiny_settings, *SHORT))
    panel = build_grid(page, "rouge1, bleu")
    expect(panel.locator(".warning", has_text="metric-bleu")).to_be_visible()
    enter(panel, "values 1", "rouge1, rougeL")
    expect(panel.locator(".fact-row").first).to_contain_text("runs 2")
    expect(panel.get_by_role("cell", name="metric-rouge1")).to_be_visible()

    panel.get_by_role("button", name="Start the sweep").click()
    expect_notice(page, "Started grid.")
    expect(panel.locator(".live.sweep .name")).to_have_text("grid")
    expect(runs_in_state(page, "running").first).to_be_visible(timeout=PATIENCE_MS)
    expect(panel.get_by_role("button", name="Stop (saves)")).to_be_visible()
    shoot(page, "sweep-running")

    page.reload()
    expect(page.locator(".live.sweep .name")).to_have_text("grid")  # the same tab, the same sweep
    expect(runs_in_state(page, "finished")).to_have_count(2, timeout=PATIENCE_MS)
    state = page.locator(".status-line[data-sweep-state]")
    expect(state).to_have_attribute("data-sweep-state", "complete", timeout=PATIENCE_MS)
    expect(page.locator(".live.sweep .status-line")).to_contain_text("2 of 2 runs done")
    expect(page.get_by_role("button", name="Resume").filter(visible=True)).to_have_count(0)
    assert sweep_jobs.report(server.runs_dir, "grid").state == "finished"
    expect(page.locator(".sweep-table")).to_contain_text(re.compile(r"rouge1.*1 of 1.*\d\.\d"))
    shoot(page, "sweep-finished")

    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Open the report").click()
    report = opened.value
    expect(report.get_by_role("heading", level=1)).to_contain_text("grid")
    assert report.locator("script").count() == 0
    shoot(report, "sweep-report")
    report.close()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save it as Markdown").click()
    assert saved.value.suggested_filename == "grid.md"
    assert "metric-rougeL" in Path(saved.value.path()).read_text(encoding="utf-8")

    page.locator(".sweep-table button", has_text="seed 1").first.click()
    expect(page.locator(".live:not(.sweep) .name")).to_have_text("grid-metric-rouge1-s1")
    expect(page.get_by_role("tab", name="Train", exact=True)).to_have_attribute(
        "aria-selected", "true"
    )

    with visiting(chromium, server, theme="dark", width=390) as phone:
        open_tab(phone, "Sweeps")
        expect(phone.locator(".live.sweep .name")).to_have_text("grid")
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390
        shoot(phone, "sweep-dark-390")

    open_tab(page, "Sweeps")
    page.get_by_role("button", name="Delete", exact=True).filter(visible=True).click()
    expect(page.get_by_text("with its report and its 2 runs")).to_be_visible()
    page.get_by_role("button", name="Delete all of it").click()
    expect_notice(page, "grid was deleted.")
    expect(page.get_by_text("No sweep yet.")).to_be_visible()
    assert not list(server.runs_dir.glob("grid*"))


@pytest.mark.timeout(2400)
def test_gapo_against_simpo_is_one_click_and_keeps_the_gpu_to_itself_until_it_is_stopped(
    page: Any, server: Any, tiny_settings: dict[str, Any]
) -> None:
    long = ("training.max_steps=100000", "training.eval_steps=50000", "training.save_steps=50000")
    panel = load_settings(page, small_config(server, tiny_settings, *long))
    shoot(page, "sweep-against-simpo-button")
    panel.get_by_role("button", name="GaPO against SimPO").click()
    expect_notice(page, "Started gapo-against-simpo.")
    expect(page.locator(".live.sweep .name")).to_have_text("gapo-against-simpo")
    expect(page.locator(".sweep-table .contender")).to_have_count(2)
    expect(page.locator(".sweep-table [data-run]")).to_have_count(6)
    expect(runs_in_state(page, "running")).to_have_count(1, timeout=PATIENCE_MS)
    page.get_by_role("button", name="▶ Start").click()
    expect_notice(page, re.compile("The sweep gapo-against-simpo is at work .* one training at a"))
    page.get_by_role("button", name="Stop (saves)").filter(visible=True).click()
    expect_notice(page, "gapo-against-simpo saves its run and ends.")
    state = page.locator(".status-line[data-sweep-state]")
    expect(state).to_have_attribute("data-sweep-state", "stopped", timeout=PATIENCE_MS)
    expect(page.get_by_role("button", name="Resume").filter(visible=True)).to_be_visible()
    expect(page.locator("[data-run='gapo-against-simpo-simpo-s42']")).to_have_attribute(
        "data-state", "stopped"
    )


def test_a_ready_made_sweep_fills_the_form(page: Any) -> None:
    panel = open_tab(page, "Sweeps")
    choose(panel, "what to compare", "gamma_beta")
    expect(panel.get_by_label("setting 1", exact=True)).to_have_value("margin.gamma")
    expect(panel.get_by_label("values 1", exact=True)).to_have_value("0.1, 0.3, 1.0")
    expect(panel.get_by_label("stop losers early", exact=True)).to_be_checked()
    expect(panel.locator(".fact-row").first).to_contain_text("runs 18")
