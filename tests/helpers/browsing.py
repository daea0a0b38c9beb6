"""What the tests of the page share: visits that forgive nothing, and the page's parts by name.

A visit fails where the page writes an error to the console, opens a dialog, or asks anything of
another address than its own server's.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from checkout import ROOT

from gapo_lite.config import RunConfig, parse_config

expect = pytest.importorskip("playwright.sync_api").expect

SCREENSHOTS = ROOT / "tests" / "screenshots"  # git ignores it
PATIENCE_MS = 20_000
PATIENCE_WITH_PROCESSES_MS = 90_000  # importing torch takes long on a busy machine
CUT_OFF = (
    r"net::ERR_(INCOMPLETE_CHUNKED_ENCODING|CONTENT_LENGTH_MISMATCH|EMPTY_RESPONSE)"
    r"|net::ERR_(CONNECTION_(REFUSED|RESET|CLOSED|ABORTED)|SOCKET_NOT_CONNECTED)"
    r"|Failed to fetch|network error|Connection errored out|AbortError"
    r"|Unexpected end of JSON input"
)
"""What Chromium and Gradio write to the console when a call is cut off: the server was killed, or
the page loaded again, meanwhile."""

HOSTILE = "<img src=x onerror=\"window.hacked='{}'\"><b class=hostile>bold</b>"

expect.set_options(timeout=PATIENCE_MS)


@contextmanager
def visiting(
    chromium: Any, server: Any, *, theme: str = "light", width: int = 1280, forgiven: str = "^$"
) -> Iterator[Any]:
    """A page in a browser context of its own, opened and ready.

    Args:
        chromium: the browser.
        server: see conftest.
        theme: "light" or "dark".
        width: of the window, in pixels.
        forgiven: a pattern of console errors that are meant to come.
    """
    context = chromium.new_context(viewport={"width": width, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    wrongs: list[str] = []
    addresses: set[str] = set()
    page.on("request", lambda request: addresses.add(urlsplit(request.url).netloc))
    page.on("console", lambda told: wrongs.append(told.text) if told.type == "error" else None)
    page.on("pageerror", lambda error: wrongs.append(str(error)))
    page.on("dialog", lambda dialog: wrongs.append(f"dialog: {dialog.message}"))
    try:
        page.goto(f"{server.url}?__theme={theme}")
        page.get_by_role("tab", name="Train").wait_for()
        yield page
        assert [wrong for wrong in wrongs if not re.search(forgiven, wrong)] == []
        assert addresses <= {urlsplit(server.url).netloc, ""}  # "": blob: and data:
        assert page.evaluate("window.hacked") is None
        assert not page.locator("img[src='x'], b.hostile").count()
    finally:
        context.close()


AT_REST_MS = 85.0
"""What FIXED_WORK takes on a core of an AMD EPYC that does nothing else."""
FIXED_WORK = """() => {
    const began = performance.now();
    for (let i = 0, sum = 0; i < 3e7; i++) sum += Math.sqrt(i);
    return performance.now() - began;
}"""


def slowness(page: Any) -> float:
    """How many times longer this machine takes at present than one at rest, at least 1: what a
    limit of time is multiplied by. A slow processor and a busy one both count."""
    took = sorted(page.evaluate(FIXED_WORK) for _ in range(5))
    return max(1.0, took[2] / AT_REST_MS)


def shoot(page: Any, name: str) -> None:
    """A picture of the whole page for people to look at."""
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def open_tab(page: Any, name: str) -> Any:
    """The tab's panel, chosen."""
    page.get_by_role("tab", name=name, exact=True).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def choose(panel: Any, label: str, option: str) -> None:
    """Picks from a drop-down list."""
    panel.get_by_label(label, exact=True).click()
    panel.page.get_by_role("option", name=option, exact=True).click()
    expect(panel.page.get_by_role("option")).to_have_count(0)


def watch(page: Any, run: str) -> Any:
    """The Train tab's panel, showing a run."""
    panel = open_tab(page, "Train")
    expect(page.locator(".live")).to_be_visible()  # some run, which the page has chosen by itself
    choose(panel, "run", run)
    expect(page.locator(".live .name")).to_have_text(run)
    return panel


def choose_file(page: Any, button: str, *files: Any) -> None:
    """Presses a button that asks for files, and gives them."""
    with page.expect_file_chooser() as asked:
        page.get_by_role("button", name=button, exact=True).click()
    asked.value.set_files(list(files))


def enter(panel: Any, label: str, value: object) -> None:
    """Types into a field and leaves it; tried again where the page has only just drawn it."""
    field = panel.get_by_label(label, exact=True)
    for _ in range(4):
        field.fill(str(value))
        field.press("Tab")
        panel.page.wait_for_timeout(300)
        if field.input_value() == str(value):
            return
    raise AssertionError(f"{label} does not keep {value!r}")


def expect_notice(page: Any, words: str | re.Pattern[str]) -> None:
    """A notice says so; all notices are closed then."""
    expect(page.get_by_test_id("toast-text").filter(has_text=words).first).to_be_visible()
    page.evaluate(  # at once: one that is found first and clicked then may have closed meanwhile
        "() => document.querySelectorAll('[data-testid=toast-close]').forEach((one) => one.click())"
    )
    expect(page.get_by_test_id("toast-body")).to_have_count(0)


def expect_state(page: Any, *states: str) -> None:
    """The run that is shown is in one of these states."""
    either = re.compile("|".join(states))
    expect(page.locator("[data-run-state]").last).to_have_attribute(
        "data-run-state", either, timeout=PATIENCE_WITH_PROCESSES_MS
    )


def curves(panel: Any, figure: str) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of each curve that a figure draws, by name."""
    points = json.loads(of_title(panel, figure).get_attribute("data-points") or "{}")
    return {one["name"]: (one["x"], one["y"]) for one in points.get("series", [])}


def of_title(panel: Any, title: str) -> Any:
    """A figure by its exact title."""
    named = panel.page.locator(".chart-title", has_text=re.compile(f"^{re.escape(title)}$"))
    return panel.locator("figure.chart").filter(has=named).first


def small_config(server: Any, settings: dict[str, Any], *overrides: str) -> RunConfig:
    """The tiny model on small pairs below the server's data folder, logging every step."""
    settings = copy.deepcopy(settings)
    for key in ("source", "heldout_source"):
        file = Path(settings["data"][key])
        kept = server.data_dir / file.name
        if not kept.exists():
            kept.write_bytes(file.read_bytes())
        settings["data"][key] = str(kept)
    settings["model"]["quantization"] = "none"
    return parse_config(settings, ["training.logging_steps=1", *overrides])


def yaml_file(config: RunConfig) -> dict[str, Any]:
    """A configuration as a file to choose."""
    return {"name": "small.yaml", "mimeType": "text/yaml", "buffer": config.to_yaml().encode()}


def jsonl_file(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows as a file to choose."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {"name": name, "mimeType": "application/jsonl", "buffer": text.encode()}


def load_settings(page: Any, config: RunConfig) -> Any:
    """The Train tab's panel, its form filled from a YAML."""
    panel = open_tab(page, "Train")
    if not page.get_by_role("button", name="Load a YAML", exact=True).is_visible():
        panel.get_by_role("button", name="YAML and command").click()
    choose_file(page, "Load a YAML", yaml_file(config))
    expect(panel.get_by_label("model", exact=True)).to_have_value(config.model.name)
    expect(panel.get_by_label("data", exact=True)).to_have_value(config.data.source)
    return panel
