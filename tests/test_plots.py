"""The figures: what is drawn, what can't break out of the HTML, what a redraw costs, and in a real
browser what the tooltip says and what a saved PNG holds."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout import ROOT

from gapo_lite import axes, plots
from gapo_lite.axes import decimate, number
from gapo_lite.plots import BarSeries, Series, bars, histogram, line_chart

CSS = plots.STYLE.read_text(encoding="utf-8")
JS = (ROOT / "app" / "static" / "charts.js").read_text(encoding="utf-8")
HOSTILE = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>&amp;\u202e{{7*7}}${1}"
STEPS = np.arange(1, 5001, dtype=float)


class _Figure(HTMLParser):
    """A figure taken apart the way a browser would: elements, words and the tooltip's data."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.elements[0][1]["data-points"] or "")

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of the drawn elements (not of the legend's swatches) with a class."""
        drawn = [found for tag, found in self.elements if tag in ("path", "text")]
        return [found for found in drawn if found.get("class") == name]

    def ends(self, kind: str) -> np.ndarray:
        """(N, 2): the points of a path, in units of the viewBox."""
        path = self.of_class(kind)[0]["d"] or ""
        points, at = [], np.zeros(2)
        for letter, x, y in re.findall(r"([Ml])(-?\d+) (-?\d+)", path):
            here = np.array([float(x), float(y)])
            at = here if letter == "M" else at + here
            points.append(at / 10)
        return np.array(points)


def _noise(count: int = 5000) -> np.ndarray:
    return 0.6 + np.random.default_rng(0).normal(0, 0.05, count)


def _chart(y: Any, *, x: Any = None, **more: Any) -> _Figure:
    x = np.arange(1, len(y) + 1) if x is None else x
    return _Figure(line_chart("Loss", [Series("train", x, y, "train", **more)], x_label="step"))


# --- curves ---------------------------------------------------------------------------------------


def _decimate_naively(y: np.ndarray, buckets: int) -> list[int]:
    if len(y) <= 2 * buckets:
        return list(range(len(y)))
    width = math.ceil(len(y) / buckets)
    kept = {0, len(y) - 1}
    for start in range(0, len(y), width):
        bucket = range(start, min(start + width, len(y)))
        finite = [i for i in bucket if math.isfinite(y[i])]
        if finite:
            kept |= {min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)}
        kept |= set([i for i in bucket if not math.isfinite(y[i])][:1])
    return sorted(kept)


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 25, 29, 30, 31, 97, 1000])
@pytest.mark.parametrize("lost", [0.0, 0.1, 0.9, 1.0])
def test_decimation_equals_its_naive_form(count: int, lost: float) -> None:
    random = np.random.default_rng(count)
    y = random.integers(-5, 5, count).astype(float)
    y[random.random(count) < lost] = np.nan
    y[random.random(count) < lost / 5] = np.inf
    assert decimate(y, 10).tolist() == _decimate_naively(y, 10)


def test_a_spike_of_one_step_among_5000_is_drawn_and_in_the_tooltip() -> None:
    y = _noise()
    y[3210], y[777] = 9.75, -3.5
    figure = _chart(y)
    data = figure.data
    assert {9.75, -3.5} <= set(data["series"][0]["y"])
    assert data["series"][0]["x"][data["series"][0]["y"].index(9.75)] == 3211
    assert data["ys"][0] < -3.5
    assert data["ys"][1] > 9.75
    assert len(data["series"][0]["x"]) <= 2 * axes.BUCKETS + 2
    left, top, right, bottom = data["box"]
    points = figure.ends("line")
    spike = points[points[:, 1].argmin()]
    assert spike[0] == pytest.approx(left + (right - left) * 3211 / 5000, abs=0.5)
    assert (points[:, 1] >= top).all()
    assert (points[:, 1] <= bottom).all()


def test_spikes_of_the_unsmoothed_values_survive_too() -> None:
    raw = _noise()
    raw[1234] = 4.25
    series = _chart(np.full(5000, 0.6), raw=raw).data["series"][0]
    assert series["raw"][series["x"].index(1235)] == 4.25


def test_nothing_is_decimated_while_all_points_fit() -> None:
    data = _chart(_noise(400)).data["series"][0]
    assert data["x"] == list(range(1, 401))
    np.testing.assert_allclose(data["y"], _noise(400), rtol=1e-3)


def test_steps_beyond_a_million_keep_all_their_digits() -> None:
    figure = _chart([1.0, 2.0], x=[12_345_677, 12_345_678])
    assert figure.data["series"][0]["x"] == [12_345_677, 12_345_678]


def test_a_value_that_is_no_number_is_a_gap_and_says_where() -> None:
    y = np.linspace(1, 0.5, 100)
    y[39] = np.nan
    figure = _chart(y)
    assert (figure.of_class("line")[0]["d"] or "").count("M") == 2
    assert "not a number at step 40" in figure.words
    assert figure.data["series"][0]["y"][39] is None
    y[60:] = np.inf
    figure = _chart(y)
    assert "not a number at step 40 and 40 more" in figure.words
    assert "not a number" in figure.words  # the newest value, in the legend
    assert (figure.of_class("gap")[0]["d"] or "").count("M") == 2  # one point and one stretch


def test_a_gap_of_one_step_among_5000_is_seen() -> None:
    y = _noise()
    y[2500] = np.nan
    figure = _chart(y)
    assert None in figure.data["series"][0]["y"]
    assert (figure.of_class("line")[0]["d"] or "").count("M") == 2


def test_a_curve_of_nothing_but_gaps_has_a_step_axis_and_no_values() -> None:
    figure = _chart(np.full(5000, np.nan))
    assert "not a number at step 1 and 4,999 more" in figure.words
    assert {"1,000", "5,000"} <= set(figure.words)
    assert "0.5" not in figure.words


def test_a_point_between_two_gaps_is_a_dot() -> None:
    figure = _chart([np.nan, 1.0, np.nan, 2.0, 3.0])
    assert re.match(r"M\d+ \d+l0 0M", figure.of_class("line")[0]["d"] or "")


def test_one_point_stands_in_the_middle_and_its_target_is_a_whole_line() -> None:
    series = [
        Series("train", np.array([1]), np.array([0.69]), "train"),
        Series("target", np.array([1]), np.array([0.9]), "target", "dashed"),
    ]
    figure = _Figure(line_chart("Margin", series, x_label="step"))
    left, _, right, _ = figure.data["box"]
    assert figure.ends("line")[0, 0] == pytest.approx((left + right) / 2, abs=0.1)
    assert figure.ends("dashed")[:, 0] == pytest.approx([left, right], abs=0.1)
    assert "0.6900" in figure.words


@pytest.mark.parametrize("value", [0.0, 5e-6, -3.0, 0.6931471805599453, 1e12, 1e-310, -1e299])
def test_a_constant_is_a_level_line_inside_the_plot(value: float) -> None:
    figure = _chart(np.full(30, value))
    _, top, _, bottom = figure.data["box"]
    heights = figure.ends("line")[:, 1]
    assert np.ptp(heights) == 0
    assert top < heights[0] < bottom
    assert len(figure.of_class("tick")) > 4


def test_rounding_noise_on_a_constant_is_not_blown_up() -> None:
    figure = _chart(1e-5 * (1 + 1e-9 * np.random.default_rng(1).normal(size=50)))
    assert np.ptp(figure.ends("line")[:, 1]) == 0


@pytest.mark.parametrize("y", [[1e308, -1e308], [1e300, -1e300], [1e-320, 0.0], [3e-5, 1e5]])
def test_extreme_values_draw_without_a_warning(y: list[float]) -> None:
    assert _chart(y).of_class("line") or _chart(y).of_class("gap")


def test_a_target_far_from_the_curve_is_inside_the_plot() -> None:
    series = [
        Series("train", STEPS, _noise(), "train"),
        Series("target", STEPS[[0, -1]], np.array([37.5, 37.5]), "target", "dashed"),
    ]
    figure = _Figure(line_chart("Margin", series, x_label="step"))
    _, top, _, bottom = figure.data["box"]
    assert ((figure.ends("dashed")[:, 1] > top) & (figure.ends("dashed")[:, 1] < bottom)).all()


def test_few_held_out_points_are_dots_and_many_are_a_line() -> None:
    assert len(_chart(_noise(12), style="dots").of_class("dot")) == 1
    assert not _chart(_noise(300), style="dots").of_class("dot")


def test_without_points_the_figure_says_what_it_waits_for_and_keeps_its_size() -> None:
    figure = _chart([])
    assert "waiting for the first step" in figure.words
    assert [found["viewbox"] for tag, found in figure.elements if tag == "svg"] == ["0 0 420 230"]
    assert "data-points" not in figure.elements[0][1]
    none = _Figure(line_chart("Loss", [], x_label="step", empty="no run is chosen"))
    assert "no run is chosen" in none.words


def test_a_curve_without_points_beside_one_with_points_is_a_dash_in_the_legend() -> None:
    series = [
        Series("train", np.array([1, 2]), np.array([3.0, 4.0]), "train"),
        Series("held out", np.array([]), np.array([]), "heldout", "dots"),
    ]
    figure = _Figure(line_chart("Loss", series, x_label="step"))
    assert "–" in figure.words
    assert [one["x"] for one in figure.data["series"]] == [[1, 2], []]


def test_missing_metrics_and_steps_are_left_out() -> None:
    figure = _chart([1.0, None, 3.0, 4.0], x=[1, 2, 3, np.nan])
    assert figure.data["series"][0] == {
        "name": "train",
        "tone": "train",
        "style": "line",
        "x": [1, 2, 3],
        "y": [1, None, 3],
    }


def test_the_legend_and_the_summary_hold_the_newest_values() -> None:
    series = [
        Series("train", STEPS, np.linspace(1, 0.25, 5000), "train"),
        Series("held out", STEPS[[99, 199]], np.array([0.5, 0.4375]), "heldout", "dots"),
    ]
    figure = _Figure(line_chart("Loss", series, x_label="step"))
    assert {"0.2500", "0.4375"} <= set(figure.words)
    summary = [found["aria-label"] for tag, found in figure.elements if tag == "svg"]
    assert summary == ["Loss: train 0.2500, held out 0.4375, at step 5,000."]


# --- numbers --------------------------------------------------------------------------------------

NUMBERS = [
    (0.0, "0"),
    (-0.0, "0"),
    (1.0, "1"),
    (0.693147, "0.6931"),
    (-0.5 - 1e-9, "−0.5000"),
    (0.0123456, "0.01235"),
    (12.3456, "12.35"),
    (1234.56, "1,235"),
    (5000.0, "5,000"),
    (2e-5, "2e-5"),
    (-1.5e-7, "−1.5e-7"),
    (1.23456e-4, "1.235e-4"),
    (1e6, "1e6"),
    (2.5e12, "2.5e12"),
    (math.nan, "not a number"),
    (math.inf, "not a number"),
]


@pytest.mark.parametrize(("value", "words"), NUMBERS)
def test_numbers_are_written_for_people(value: float, words: str) -> None:
    assert number(value) == words


@pytest.mark.parametrize(
    ("low", "high", "about", "labels"),
    [
        (0, 1, 5, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 2.1e-5, 5, ["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]),
        (0, 5000, 5, ["0", "1,000", "2,000", "3,000", "4,000", "5,000"]),
        (-0.55, 2.1, 5, ["−0.5", "0.0", "0.5", "1.0", "1.5", "2.0"]),
        (0.00118, 0.00172, 5, ["0.0012", "0.0013", "0.0014", "0.0015", "0.0016", "0.0017"]),
        (-3.2e7, 1e6, 4, ["−3e7", "−2e7", "−1e7", "0"]),
        (9.9e-4, 1.01e-3, 4, ["0.000990", "0.000995", "0.001000", "0.001005", "0.001010"]),
    ],
)
def test_ticks_are_round_and_share_their_decimals(
    low: float, high: float, about: int, labels: list[str]
) -> None:
    assert axes.tick_labels(axes.ticks(low, high, about)) == labels


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 2e-5, 0.037, 1, 999, 1e9, 1e299])
@pytest.mark.parametrize("offset", [-1.0, 0.0, 0.3])
def test_there_are_three_to_eight_ticks_at_any_scale(scale: float, offset: float) -> None:
    low, high = offset * scale, (offset + 1) * scale
    found = axes.ticks(low, high, 5)
    assert 3 <= len(found) <= 8
    assert min(found) >= low - 1e-6 * scale
    assert max(found) <= high + 1e-6 * scale
    assert len(set(axes.tick_labels(found))) == len(found)


def test_steps_have_whole_ticks() -> None:
    assert axes.tick_labels(axes.ticks(0, 2, 5, whole=True)) == ["0", "1", "2"]


# --- distributions and groups ---------------------------------------------------------------------


def test_a_histogram_counts_as_numpy_does_and_leaves_out_what_is_no_number() -> None:
    values = np.random.default_rng(2).beta(2, 5, 1000)
    data = _Figure(histogram("EF", np.append(values, [np.nan, np.inf]))).data
    counts, edges = np.histogram(values, 30)
    assert data["counts"] == counts.tolist()
    np.testing.assert_allclose(data["edges"], edges, rtol=1e-4)
    assert data["total"] == 1000


def test_values_outside_a_given_range_are_counted_in_the_caption() -> None:
    figure = _Figure(histogram("EF", np.array([0.1, 0.5, 1.5, -2.0]), range=(0, 1), note="by eye"))
    assert "by eye · 2 outside" in figure.words
    assert sum(figure.data["counts"]) == 2


def test_token_counts_get_whole_bins_without_a_comb() -> None:
    data = _Figure(histogram("Length", np.arange(1, 101))).data
    assert set(np.diff(data["edges"])) == {4.0}
    assert data["counts"] == [4] * 25
    two = _Figure(histogram("EF", np.array([0, 1, 1, 0, 1]))).data
    assert (two["edges"], two["counts"]) == ([-0.5, 0.5, 1.5], [2, 3])


@pytest.mark.parametrize("values", [[0.37] * 9, [2e-5], [7.0, 7.0], [0.0], [-1e300, 1e300]])
def test_any_values_make_a_histogram(values: list[float]) -> None:
    assert sum(_Figure(histogram("x", np.array(values))).data["counts"]) == len(values)


def test_marks_widen_the_axis_and_their_labels_do_not_cover_each_other() -> None:
    values = np.linspace(0, 0.5, 100)
    marks = [
        (0.25, "mean 0.25"),
        (0.26, "γ 0.26"),
        (0.27, "floor"),
        (1.5, "max_length"),
        (np.nan, "x"),
    ]
    figure = _Figure(histogram("Gap", values, marks=marks))
    assert figure.data["xs"] == [0.0, 1.5]
    labels = [one for one in figure.of_class("mark") if "y" in one]
    assert len({one["y"] for one in labels[:3]}) == 3
    assert len(labels) == 4
    assert labels[3]["text-anchor"] == "end"
    lines = [one["d"] or "" for one in figure.of_class("mark") if "d" in one]
    xs = [float(line[1:].split()[0]) for line in lines]
    assert xs == sorted(xs)


def test_a_small_histogram_has_half_the_size_and_few_ticks() -> None:
    figure = _Figure(histogram("EF", np.linspace(0, 1, 50), range=(0, 1), small=True))
    assert [found["viewbox"] for tag, found in figure.elements if tag == "svg"] == ["0 0 210 130"]
    assert len(figure.of_class("tick")) <= 7


def test_an_empty_histogram_says_so() -> None:
    assert "nothing to count yet" in _Figure(histogram("EF", np.array([np.nan]))).words


def test_bars_stand_side_by_side_and_a_missing_one_leaves_its_place() -> None:
    labels = ["0.0–0.1", "0.1–0.2"]
    series = [
        BarSeries("base", np.array([0.5, 0.25]), "target"),
        BarSeries("tuned", np.array([1.0, np.nan]), "train"),
    ]
    figure = _Figure(bars("Accuracy", labels, series, x_label="EF"))
    base, tuned = (one["d"] or "" for one in figure.of_class("bar") if "d" in one)
    heights = [int(found) for found in re.findall(r"v(\d+)h", base + tuned)]
    assert base.count("M") == 2
    assert tuned.count("M") == 1
    assert heights[0] == pytest.approx(2 * heights[1], abs=1)
    assert heights[2] == pytest.approx(2 * heights[0], abs=1)
    assert set(labels) <= set(figure.words)
    assert [one["y"] for one in figure.data["series"]] == [[0.5, 0.25], [1, None]]


def test_bars_below_zero_hang_from_the_zero_line() -> None:
    figure = _Figure(bars("Drift", ["a", "b"], [BarSeries("x", np.array([-1.0, 1.0]), "train")]))
    path = next(one["d"] or "" for one in figure.of_class("bar") if "d" in one)
    (below, down), (above, up) = re.findall(r"M\d+ (\d+)h\d+v(-?\d+)h", path)
    assert int(below) + int(down) == int(above) + int(up)
    assert int(down) < 0 < int(up)


def test_no_bars_say_so() -> None:
    assert "nothing to compare yet" in _Figure(bars("Accuracy", [], [])).words


# --- what comes from outside ----------------------------------------------------------------------


def _hostile_figures(words: str) -> list[str]:
    x = np.array([1.0, 2.0, np.nan, 4.0])
    y = np.array([1.0, np.nan, 3.0, 4.0])
    return [
        line_chart(
            words, [Series(words, x, y, words)], x_label=words, explanation=words, unit=words
        ),
        line_chart(words, [], x_label=words, empty=words),
        histogram(words, y, marks=[(1, words)], x_label=words, note=words, tone=words),
        bars(words, [words], [BarSeries(words, y[:1], words)], x_label=words, unit=words),
    ]


@pytest.mark.parametrize("html", _hostile_figures(HOSTILE))
def test_words_from_outside_stay_words(html: str) -> None:
    tame = _Figure(_hostile_figures("tame")[_hostile_figures(HOSTILE).index(html)])
    figure = _Figure(html)
    assert [(tag, list(found)) for tag, found in figure.elements] == [
        (tag, list(found)) for tag, found in tame.elements
    ]
    assert any("<script>alert(1)</script>" in words for words in figure.words)


@pytest.mark.parametrize(
    "words", ["a\x00b\x1b[31m\ud800\ufffe\r\n", "👩‍👩‍👧 γ=½ 汉字 می‌خواهم", "x" * 10_000]
)
def test_any_name_leaves_the_svg_a_valid_file(words: str) -> None:
    for html in _hostile_figures(words):
        html.encode("utf-8")
        assert len(html) < 40_000
        ET.fromstring(html[html.index("<svg") : html.index("</figure>")])


def test_emoji_and_persian_joiners_are_kept() -> None:
    name = "👩‍👩‍👧 می‌خواهم"
    series = Series(name, np.array([1]), np.array([2.0]), "run3")
    figure = _Figure(line_chart("x", [series], x_label="step"))
    assert name in figure.words


# --- cost -----------------------------------------------------------------------------------------


def test_eight_figures_of_two_5000_step_curves_redraw_at_once_and_stay_small() -> None:
    raw = _noise()
    held_out = _noise()

    def draw() -> str:
        return "".join(
            line_chart(
                f"Figure {i}",
                [
                    Series("train", STEPS, raw, "train", raw=raw[::-1]),
                    Series("held out", STEPS, held_out, "heldout"),
                ],
                x_label="step",
            )
            for i in range(8)
        )

    draw()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        html = draw()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.6
    assert len(html.encode()) < 400_000


# --- colours --------------------------------------------------------------------------------------

TONES = ["train", "heldout", "target", "chosen", "rejected", *(f"run{i}" for i in range(10)), "bad"]


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(
    ("theme", "page", "least"),
    [(":root", "#ffffff", 3.0), (".dark", "#0b0f19", 3.0), (".dark", "#27272a", 3.0)],
)
def test_every_tone_has_a_contrast_of_three_to_one(theme: str, page: str, least: float) -> None:
    block = re.search(re.escape(theme) + r" \{(.*?)\}", CSS, re.DOTALL)
    assert block
    colours = dict(re.findall(r"--chart-(\w+): (#\w{6});", block[1]))
    assert set(TONES) <= set(colours)
    for tone in TONES:
        light, dark = sorted((_luminance(colours[tone]), _luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, tone


def test_every_tone_has_its_class() -> None:
    for tone in TONES[:-1]:
        assert f".tone-{tone} {{ --tone: var(--chart-{tone}); }}" in CSS


# --- in a browser ---------------------------------------------------------------------------------

PAGE = """<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="
default-src 'none'; img-src 'self' data: blob:; style-src 'nonce-n'; script-src 'nonce-n'">
<style nonce="n">body { margin: 20px; font-family: sans-serif; background: #fff; }
body.dark { background: #0b0f19; --block-background-fill: #27272a; }
CSS</style>
<body class="THEME"><div class="chart-grid">FIGURES</div><script nonce="n">JS</script>"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed: the figures were not tried in a browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def _open(browser: Any, *figures: str, theme: str = "light", **more: Any) -> Any:
    """A page with the figures under a strict CSP; what goes wrong in it is in `page.problems`."""
    page = browser.new_context(viewport={"width": 900, "height": 700}, **more).new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("dialog", lambda dialog: page.problems.append(dialog.message))
    html = PAGE.replace("FIGURES", "".join(figures)).replace("THEME", theme)
    html = html.replace("CSS<", CSS + "<").replace("JS<", JS + "<")
    page.route("**/*", lambda route: route.fulfill(body=html, content_type="text/html"))
    page.goto("http://page.test/")
    return page


def _place(page: Any, across: float, figure: int) -> tuple[float, float]:
    """Screen coordinates of a share of the plot's width."""
    box = page.locator("figure.chart > svg").nth(figure).bounding_box()
    data = json.loads(page.locator("figure.chart").nth(figure).get_attribute("data-points"))
    x = data["box"][0] + across * (data["box"][2] - data["box"][0])
    return box["x"] + x * box["width"] / 420, box["y"] + box["height"] / 2


def _point(page: Any, across: float, figure: int = 0) -> None:
    """Rests the pointer there."""
    page.mouse.move(*_place(page, across, figure))


def _tip(page: Any) -> list[str]:
    """The tooltip's lines, one a series; empty where it isn't shown."""
    tip = page.locator(".chart-tip")
    if not tip.count() or tip.is_hidden():
        return []
    return [" ".join(line.inner_text().split()) for line in tip.locator("> div").all()]


def _await(page: Any, expression: str) -> None:
    """Until `expression` holds in the page. (Playwright's own way of waiting needs eval, which the
    policy forbids.)"""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never came true: {expression}")


def _margin_chart(last: float = 1.5, name: str = "train") -> str:
    x = np.arange(0, 101)
    series = [
        Series(name, x, x / 100 * last, "train", raw=x / 50),
        Series("held out", x[::20], x[::20] / 100, "heldout", "dots"),
        Series("target", x[[0, -1]], np.array([1.0, 2.0]), "target", "dashed"),
    ]
    return line_chart("Reward margin", series, x_label="step", unit="nats")


def test_the_tooltip_shows_every_value_at_the_nearest_step(chromium: Any) -> None:
    page = _open(chromium, _margin_chart())
    assert _tip(page) == []
    _point(page, 0.502)
    assert _tip(page) == [
        "step 50",
        "train 0.7500 nats unsmoothed 1",
        "held out 0.4000 nats at 40",
        "target 1.500 nats",
    ]
    page.mouse.move(450, 5)
    assert _tip(page) == []
    assert page.problems == []


def test_a_redraw_under_a_resting_pointer_renews_the_tooltip(chromium: Any) -> None:
    page = _open(chromium, _margin_chart())
    _point(page, 1.0)
    assert _tip(page)[1].startswith("train 1.500 nats")
    page.evaluate(
        "html => { document.querySelector('.chart-grid').innerHTML = html }", _margin_chart(3.0)
    )
    _await(page, "document.querySelector('.chart-tip').textContent.includes('3 nats')")
    points = "document.querySelector('figure').dataset.points"
    new = _Figure(_margin_chart(4.0)).elements[0][1]["data-points"]
    page.evaluate(f"text => {{ {points} = text }}", new)  # Gradio rewrites attributes in place
    _await(page, "document.querySelector('.chart-tip').textContent.includes('4 nats')")
    page.evaluate("document.querySelector('.chart-grid').replaceChildren()")
    _await(page, "document.querySelector('.chart-tip').hidden")
    assert page.problems == []


def test_the_tooltip_writes_numbers_as_the_legend_does(chromium: Any) -> None:
    values = [value for value, _ in NUMBERS]
    series = Series("y", np.arange(len(values)), np.array(values), "train")
    page = _open(chromium, line_chart("x", [series], x_label="n"))
    found = []
    for at in range(len(values)):
        _point(page, at / (len(values) - 1))
        found.append(_tip(page)[1].removeprefix("y "))
    assert found == [words for _, words in NUMBERS]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (9999.6, "10,000"),
        (12345.6, "12,346"),
        (999999.7, "1e6"),
        (-12344.5, "−12,344"),  # a tie, to the even digit
        (12345.5, "12,346"),
        (100.25, "100.2"),
        (1234500.0, "1.234e6"),
        (0.00099996, "0.001000"),
    ],
)
def test_the_tooltip_rounds_places_along_x_as_python_does(
    chromium: Any, value: float, words: str
) -> None:
    assert number(value) == words
    page = _open(
        chromium,
        line_chart("x", [Series("y", np.array([value]), np.ones(1), "train")], x_label="at"),
    )
    _point(page, 0.5)
    assert _tip(page)[0] == f"at {words}"
    assert page.problems == []


def test_a_histogram_and_bars_have_tooltips(chromium: Any) -> None:
    counts = histogram("Length", np.repeat([1, 2, 3, 4], [5, 1, 1, 3]), x_label="tokens")
    groups = bars(
        "Accuracy", ["low", "high"], [BarSeries("base", np.array([0.5, np.nan]), "target")]
    )
    page = _open(chromium, counts, groups)
    _point(page, 0.9)
    assert _tip(page) == ["tokens: 4", "values 3 30.0 % of 10"]
    _point(page, 0.2, figure=1)
    assert _tip(page) == ["low", "base 0.5000"]
    _point(page, 0.9, figure=1)
    assert _tip(page) == ["high", "base –"]
    assert page.problems == []


def test_hostile_names_run_nothing_in_the_page_or_the_tooltip(chromium: Any) -> None:
    page = _open(chromium, *_hostile_figures(HOSTILE), _margin_chart(name=HOSTILE))
    for figure in range(page.locator("figure.chart[data-points]").count() + 1):
        if page.locator("figure.chart").nth(figure).get_attribute("data-points"):
            page.locator("figure.chart").nth(figure).scroll_into_view_if_needed()
            _point(page, 0.5, figure=figure)
            assert _tip(page)
    assert page.locator(".chart-tip img, .chart-tip script, figure img, figure script").count() == 0
    assert page.problems == []


def test_a_finger_gets_the_tooltip_and_sees_the_button(chromium: Any) -> None:
    page = _open(chromium, _margin_chart(), has_touch=True, is_mobile=True)
    page.touchscreen.tap(*_place(page, 0.5, figure=0))
    assert _tip(page)[0] == "step 50"
    assert page.locator(".chart-png").evaluate("one => getComputedStyle(one).opacity") == "1"
    page.touchscreen.tap(5, 5)
    assert _tip(page) == []


def test_the_button_shows_for_the_pointer_and_the_keyboard_only(chromium: Any) -> None:
    page = _open(chromium, _margin_chart())
    opacity = "getComputedStyle(document.querySelector('.chart-png')).opacity"
    assert page.evaluate(opacity) == "0"
    page.keyboard.press("Tab")
    _await(page, f"{opacity} === '1'")


def _saved(page: Any, act: str) -> tuple[str, Any]:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    with page.expect_download() as download:
        page.evaluate(act)
    content = Path(download.value.path()).read_bytes()
    return download.value.suggested_filename, image.open(io.BytesIO(content)).convert("RGB")


@pytest.mark.parametrize(
    ("theme", "background", "blue"),
    [("light", (255, 255, 255), (0, 0x72, 0xB2)), ("dark", (0x27, 0x27, 0x2A), (0x4B, 0xA3, 0xE3))],
)
def test_a_saved_png_is_the_figure_in_its_theme(
    chromium: Any, theme: str, background: tuple[int, ...], blue: tuple[int, ...]
) -> None:
    page = _open(chromium, _margin_chart(), theme=theme)
    name, picture = _saved(page, "document.querySelector('.chart-png').click()")
    assert name == "reward-margin.png"
    width = page.locator("figure.chart > svg").bounding_box()["width"]
    assert picture.width == int(2 * (width + 28))
    assert picture.getpixel((1, 1)) == background
    pixels = np.asarray(picture).reshape(-1, 3)
    drawn = (np.abs(pixels.astype(int) - blue).max(axis=1) < 12).reshape(picture.height, -1)
    assert drawn[:90].any()  # the legend's swatch
    assert drawn[100:].sum() > 300  # the curve
    assert drawn[100:].any(axis=0).sum() > 0.8 * 2 * width  # all the way
    ink = (np.abs(pixels.astype(int) - background).max(axis=1) > 60).reshape(picture.height, -1)
    assert ink[:50, :300].sum() > 200  # the title's words
    assert ink[-110:].sum() > 50  # the words under the axis
    assert page.problems == []


def test_all_figures_are_saved_on_one_sheet(chromium: Any) -> None:
    empty = line_chart("Loss", [], x_label="step")
    page = _open(chromium, _margin_chart(), empty, _margin_chart(name=HOSTILE))
    name, sheet = _saved(page, "gapoCharts.saveAll(document.querySelector('.chart-grid'))")
    _, one = _saved(page, "gapoCharts.savePng(document.querySelector('figure'))")
    assert name == "charts.png"
    assert sheet.width == 2 * one.width + 3 * 28
    assert sheet.height > 2 * one.height
    assert page.problems == []


def test_the_script_leaves_one_global(chromium: Any) -> None:
    page = _open(chromium, _margin_chart())
    bare = _open(chromium)
    bare.evaluate("delete window.gapoCharts")
    added = set(page.evaluate("Object.keys(window)")) - set(bare.evaluate("Object.keys(window)"))
    assert added == {"gapoCharts"}
    assert page.evaluate("Object.keys(gapoCharts)") == ["savePng", "saveAll"]
