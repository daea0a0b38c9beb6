"""The Data tab in a real browser: files good and bad, figures that follow the settings, pairs."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from browsing import (
    HOSTILE,
    choose,
    choose_file,
    enter,
    expect,
    expect_notice,
    jsonl_file,
    of_title,
    open_tab,
    shoot,
    slowness,
    visiting,
)

from gapo_lite.data import load_pairs

NUM_EMBEDDED = str(len(load_pairs("embedded:everyday").pairs))
SCRIPT = "</script><script>hacked=1</script>"
TABS = ("Data", "Train", "Runs", "Sweeps", "Chat")


@pytest.fixture
def page(chromium: Any, server: Any) -> Iterator[Any]:
    with visiting(chromium, server) as opened:
        yield opened


def pairs(count: int) -> list[dict[str, Any]]:
    """Pairs whose rejected answers share ever fewer words with the chosen ones."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return [
        {
            "prompt": f"Count to ten, try {number}.",
            "chosen": " ".join(words),
            "rejected": " ".join(words[: 10 - number % 9] + ["umpteen"] * (number % 9)),
        }
        for number in range(count)
    ]


def upload(page: Any, *files: Any) -> Any:
    panel = open_tab(page, "Data")
    choose_file(page, "Upload a file", *files)
    return panel


def fact(panel: Any, name: str) -> Any:
    """The value beside a name, of the facts about the set."""
    return panel.locator(".fact-row > span").filter(has_text=re.compile(rf"^{name} ")).locator("b")


def test_the_first_screen_is_painted_in_two_seconds_and_filled(page: Any) -> None:
    paints = page.evaluate("performance.getEntriesByType('paint').map(p => [p.name, p.startTime])")
    assert dict(paints)["first-contentful-paint"] < 2000 * slowness(page)
    panel = open_tab(page, "Data")
    expect(fact(panel, "pairs").first).to_have_text(NUM_EMBEDDED)
    expect(of_title(panel, "Gap: log")).to_be_visible()
    expect(panel.locator(".pair-side.chosen mark").first).to_be_visible()
    expect(panel.get_by_text("Lengths in tokens of the model")).to_be_visible()
    shoot(page, "data")
    train = open_tab(page, "Train")
    expect(train.get_by_label("model", exact=True)).to_have_value("embedded:smollm2-135m-instruct")
    expect(train.get_by_role("button", name="Start training")).to_be_enabled()
    expect(train.get_by_text("Average target margin 3 reward units")).to_be_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_tab_fits_a_phone_in_both_themes(chromium: Any, server: Any, theme: str) -> None:
    with visiting(chromium, server, theme=theme, width=390) as page:
        expect(page.locator(".pair-side").first).to_be_visible()
        widths = "tabs => tabs.reduce((sum, tab) => sum + tab.offsetWidth, 0)"
        assert page.get_by_role("tab").evaluate_all(widths) < 300  # room for a wider font
        for name in TABS:
            panel = open_tab(page, name)
            expect(panel).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
            shoot(page, f"phone-{theme}-{name.lower()}")
        paper, ink = page.evaluate(
            """() => {
                const grey = (colour) => Math.max(...colour.match(/\\d+/g).slice(0, 3).map(Number));
                const seen = document.elementsFromPoint(3, 3).map((one) => getComputedStyle(one));
                const shown = seen.find((one) => one.backgroundColor !== "rgba(0, 0, 0, 0)");
                return [grey(shown.backgroundColor), grey(getComputedStyle(h1).color)];
            }""".replace("h1", "document.querySelector('h1')")
        )
        assert paper > 200 > 100 > ink if theme == "light" else paper < 60 < 200 < ink


def test_settings_of_the_margin_redraw_the_figures_at_once_and_stand_in_the_form_too(
    page: Any,
) -> None:
    panel = open_tab(page, "Data")
    average = fact(panel, "average target margin")
    expect(average).to_be_visible()
    expect(panel.get_by_text("Lengths in tokens of the model")).to_be_visible()
    page.evaluate(  # when the page shows it, by the browser's own clock
        """() => new MutationObserver(() => {
            const fact = [...document.querySelectorAll('.fact-row > span')]
                .find((one) => one.innerText.startsWith('γ '));
            if (fact && fact.innerText !== window.shown) {
                window.shown = fact.innerText;
                window.shownAt = performance.now();
            }
        }).observe(document.body, { subtree: true, childList: true, characterData: true })"""
    )
    for gamma in (0.7, 1.3, 0.4):
        began = page.evaluate("performance.now()")
        enter(panel, "γ (gamma)", gamma)
        expect(fact(panel, "γ")).to_have_text(f"{gamma:g}")
        assert page.evaluate("window.shownAt") - began < 500 * SLACK * slowness(page)
    before = of_title(panel, "Gap: log").inner_html()
    choose(panel, "mapping", "square")
    expect(of_title(panel, "Gap: square")).to_be_visible()
    assert of_title(panel, "Gap: square").inner_html() != before

    train = open_tab(page, "Train")
    expect(train.get_by_label("γ (gamma)", exact=True)).to_have_value("0.4")
    expect(train.get_by_label("mapping", exact=True)).to_have_value("square")
    enter(train, "γ (gamma)", 2)
    choose(train, "mapping", "linear")
    panel = open_tab(page, "Data")
    expect(panel.get_by_label("γ (gamma)", exact=True)).to_have_value("2")
    expect(of_title(panel, "Gap: linear")).to_be_visible()
    expect(fact(panel, "γ")).to_have_text("2")


def test_margins_can_come_from_ratings_or_not_at_all(page: Any) -> None:
    rows = [{**row, "score": 1 + place % 4} for place, row in enumerate(pairs(12))]
    panel = upload(page, jsonl_file("rated.jsonl", rows))
    expect(fact(panel, "pairs").first).to_have_text("12")
    choose(panel, "margin from", "rating")
    expect(panel.get_by_text("none of 11 pairs has ratings of both responses")).to_be_visible()
    expect(panel.get_by_label("mapping", exact=True)).to_be_hidden()
    expect(panel.locator(".pair-side.chosen")).to_be_visible()  # they can be looked at
    columns = panel.get_by_label("rating columns")
    columns.fill("score")
    columns.press("Tab")
    expect(of_title(panel, "Gap: ratings")).to_be_visible()
    expect(fact(panel, "without ratings, at the mean")).to_have_text("0")
    choose(panel, "objective", "kto")
    expect(panel.get_by_text("kto has no target margin")).to_be_visible()
    expect(of_title(panel, "rougeL")).to_be_visible()
    expect(panel.get_by_label("γ (gamma)", exact=True)).to_be_hidden()
    expect(columns).to_be_hidden()
    choose(panel, "objective", "dpo")
    expect(panel.get_by_text("this is plain dpo")).to_be_visible()
    expect(panel.get_by_label("β (beta)", exact=True)).to_have_value("0.01")
    choose(panel, "margin from", "ef")
    expect(fact(panel, "γ")).to_have_text("3")
    expect(of_title(panel, "Gap: log")).to_be_visible()
    train = open_tab(page, "Train")
    expect(train.get_by_label("objective", exact=True)).to_have_value("dpo")
    expect(train.get_by_label("γ (gamma)", exact=True)).to_have_value("3")
    expect(train.locator(".formula")).to_contain_text("2305.18290")


SLACK = 3
"""A browser on the same core as its server: alone it takes some 150 ms."""


def test_an_uploaded_file_is_examined_line_by_line(page: Any, server: Any) -> None:
    name = "пари 對 \u202epairs🦜.jsonl"
    file = jsonl_file(name, pairs(20))
    file["buffer"] += b'{"prompt": "torn", "chosen": \n{"prompt": "none"}\n[1, 2]\n'
    before = {*(server.data_dir / "uploads").glob("*.jsonl")}
    panel = upload(page, file)
    expect(fact(panel, "pairs").first).to_have_text("20")
    expect(fact(panel, "unusable rows")).to_have_text("3")
    panel.get_by_text("3 rows cannot be used").click()
    lines = panel.locator(".problems tbody tr td:first-child").all_inner_texts()
    assert lines == ["21", "22", "23"]
    (kept,) = {*(server.data_dir / "uploads").glob("*.jsonl")} - before
    assert "пари" in kept.name
    expect(panel.get_by_label("data", exact=True)).to_have_value(re.compile("пари"))
    train = open_tab(page, "Train")
    expect(train.get_by_label("data", exact=True)).to_have_value(re.compile("пари"))
    expect(of_title(open_tab(page, "Data"), "Gap: log")).to_be_visible()


def test_texts_and_columns_of_a_file_are_shown_as_they_are_and_never_become_elements(
    page: Any,
) -> None:
    rows = [
        {
            "prompt": f"{HOSTILE.format('prompt')} {number}",
            "chosen": f"fine {HOSTILE.format('chosen')} {SCRIPT} {number}",
            "rejected": f"worse {HOSTILE.format('rejected')} {number}",
            HOSTILE.format("column"): 1,
        }
        for number in range(12)
    ] + [{"prompt": HOSTILE.format("problem"), "chosen": HOSTILE.format("problem")}]
    panel = upload(page, jsonl_file("<img src=x onerror=alert(1)>.jsonl", rows))
    expect(fact(panel, "pairs").first).to_have_text("12")
    expect(fact(panel, "columns")).to_contain_text(HOSTILE.format("column"))
    expect(panel.locator(".pair-prompt")).to_contain_text(HOSTILE.format("prompt"))
    expect(panel.locator(".pair-side.chosen")).to_contain_text(SCRIPT)
    panel.get_by_label("search").fill(HOSTILE.format("nowhere"))
    expect(panel.get_by_text("No pair holds")).to_contain_text(HOSTILE.format("nowhere"))
    shoot(page, "data-hostile")


BAD_FILES = {
    "empty.jsonl": (b"", "is empty"),
    "broken.jsonl": (b'{"prompt": \nnot json at all\n', "has no usable row among 2"),
    "zipped.parquet": (b"PK\x03\x04 this is a zip", "is not .parquet"),
    "text.jsonl.gz": (b'{"prompt": "p"}', "is not .gz"),
    "columns.csv": (b"a,b\n1,2\n", "has no column 'chosen' and 'rejected'"),
    "program.exe": (b"MZ", "Invalid file type"),
}


def test_a_file_that_cannot_be_used_is_refused_in_a_sentence_and_what_was_there_stays(
    page: Any,
) -> None:
    panel = open_tab(page, "Data")
    expect(fact(panel, "pairs").first).to_have_text(NUM_EMBEDDED)
    for name, (content, words) in BAD_FILES.items():
        choose_file(page, "Upload a file", {"name": name, "mimeType": "", "buffer": content})
        expect_notice(page, words)
        expect(fact(panel, "pairs").first).to_have_text(NUM_EMBEDDED)


def test_a_name_that_cannot_be_opened_is_refused_in_a_sentence(page: Any) -> None:
    panel = open_tab(page, "Data")
    for name in ("/etc/passwd", "../../secret.jsonl", "no such thing", "https://example.org/x.csv"):
        field = panel.get_by_label("data", exact=True)
        field.fill(name)
        field.press("Enter")
        expect_notice(page, "can't be opened as data here")


def test_pairs_can_be_searched_sorted_and_leafed_through_with_differing_words_marked(
    page: Any,
) -> None:
    panel = upload(page, jsonl_file("browse.jsonl", pairs(9)))
    expect(fact(panel, "pairs").first).to_have_text("9")
    place = fact(panel, "pair")
    expect(place).to_have_text("1 of 9")
    marked = panel.locator(".pair-side.rejected mark")
    expect(panel.locator(".pair-prompt")).to_contain_text("try 8.")  # the largest margin first
    assert set(" ".join(marked.all_inner_texts()).split()) == {"umpteen"}

    panel.get_by_role("button", name="next ▶").click()
    expect(place).to_have_text("2 of 9")
    expect(panel.locator(".pair-prompt")).to_contain_text("try 7.")
    panel.get_by_role("button", name="◀ previous").click()
    expect(place).to_have_text("1 of 9")

    choose(panel, "order", "margin up")
    expect(panel.locator(".pair-prompt")).to_contain_text("try 0.")
    expect(marked).to_have_count(0)  # both say the same

    panel.get_by_label("search").fill("TRY 5")
    expect(place).to_have_text("1 of 1")
    expect(panel.locator(".pair-prompt")).to_contain_text("try 5.")
    panel.get_by_label("search").fill("")
    expect(place).to_have_text("1 of 9")


def test_a_redraw_is_fast_on_the_server_even_for_many_pairs(page: Any, server: Any) -> None:
    panel = upload(page, jsonl_file("many.jsonl", pairs(4000)))
    expect(fact(panel, "pairs").first).to_have_text("4,000")
    expect(of_title(panel, "Gap: log")).to_be_visible()
    process = psutil.Process(server.process.pid)
    took, worked = [], []
    for gamma in (0.9, 0.8, 0.7):  # the quickest: a busy machine slows one of them, not all
        busy = sum(process.cpu_times()[:2])
        with page.expect_response(re.compile("queue/join")):
            began = time.monotonic()
            enter(panel, "γ (gamma)", gamma)
        expect(fact(panel, "γ")).to_have_text(str(gamma))
        took.append(time.monotonic() - began)
        worked.append(sum(process.cpu_times()[:2]) - busy)
    assert min(worked) < 0.5  # of the server's own processor time
    assert min(took) < 0.5 * SLACK * slowness(page)


def test_the_page_rests_after_changes_that_came_faster_than_answers(page: Any) -> None:
    panel = open_tab(page, "Data")
    expect(fact(panel, "γ")).to_be_visible()
    page.route("**/queue/join*", lambda route: (time.sleep(0.2), route.continue_()))
    for gamma in (0.9, 0.8, 0.7):
        enter(panel, "γ (gamma)", gamma)
    expect(fact(panel, "γ")).to_have_text("0.7")
    deadline = time.monotonic() + 30
    asked = [""]
    page.on("request", lambda request: asked.append(request.url))
    while asked:  # endless where two handlers, each busy when an event came, repeat it for another
        assert time.monotonic() < deadline, asked
        asked.clear()
        page.wait_for_timeout(2000)
    page.unroute_all()


def test_no_event_is_repeated_for_a_busy_handler_with_others_beside_it(server: Any) -> None:
    with urllib.request.urlopen(f"{server.url}config") as answer:
        config = json.load(answer)
    listening = defaultdict(list)
    for handler in config["dependencies"]:
        for component, event in handler["targets"]:
            if component is not None and (handler["backend_fn"] or handler["js"] == "() => []"):
                listening[component, event].append(handler)
    assert len(listening) > 100
    for event, handlers in listening.items():
        if any(one["backend_fn"] and one["trigger_mode"] == "always_last" for one in handlers):
            assert len(handlers) == 1, (event, [one["api_name"] for one in handlers])
