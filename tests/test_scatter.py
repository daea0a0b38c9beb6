"""Points with intervals: where they land, what is cut, and what cannot break out of the HTML."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from gapo_lite.drawing import still
from gapo_lite.plots import STYLE
from gapo_lite.scatter import Cloud, Row, intervals, scatter

HOSTILE = '"><script>alert(1)</script>&amp;\u202e\x1b[31m\ud800'


def _svg(html: str) -> ET.Element:
    """The picture (the last svg; those before it are the legend's marks)."""
    return ET.fromstring(html[html.index('<svg viewBox="0 0 420') : html.rindex("</figure>")])


def _words(svg: ET.Element, kind: str) -> list[str]:
    return [one.text or "" for one in svg.iter("text") if one.get("class") == kind]


def _paths(svg: ET.Element, kind: str) -> list[str]:
    return [one.get("d") or "" for one in svg.iter("path") if one.get("class") == kind]


def _start(path: str) -> tuple[float, float]:
    return tuple(map(float, re.match(r"M(-?[\d.]+) (-?[\d.]+)", path).groups()))


def _cloud(name: str, x: float, y: float, **more) -> Cloud:
    halves = {key: np.array([more.pop(key)]) for key in ("x_half", "y_half") if key in more}
    return Cloud(name, np.array([x]), np.array([y]), "run0", **halves, **more)


def test_a_point_further_right_and_higher_is_drawn_there():
    html = scatter("t", [_cloud("a", 0, 50), _cloud("b", 1, 60)], x_label="x")
    (ax, ay), (bx, by) = map(_start, _paths(_svg(html), "point"))
    assert bx > ax + 100
    assert by < ay - 50


def test_each_mark_has_its_label_and_the_browser_tells_its_numbers():
    clouds = [_cloud("simpo", 0.5, 70, y_half=2.5), _cloud("gapo", 3, 60, style="baseline")]
    svg = _svg(scatter("t", clouds, x_label="x"))
    assert _words(svg, "mark") == ["simpo", "gapo"]
    titles = {one.text for one in svg.iter("title")}
    assert titles == {"simpo: 0.5000, 70 ± 2.500", "gapo: 3, 60"}
    assert len(_paths(svg, "ring")) == 1


def test_labels_that_would_cover_each_other_are_left_to_the_legend():
    clouds = [_cloud(f"contender-{at}", 1 + at * 1e-3, 50 + at * 1e-3) for at in range(12)]
    clouds.append(_cloud("far", 9, 90))
    html = scatter("t", clouds, x_label="x")
    assert "far" in _words(_svg(html), "mark")
    assert len(_words(_svg(html), "mark")) < 8
    for cloud in clouds:
        assert f'title="{cloud.name}"' in html


def test_an_interval_far_wider_than_the_points_is_cut_at_the_picture():
    clouds = [_cloud("a", 0, 50, y_half=400.0), _cloud("b", 1, 60, y_half=1.0)]
    svg = _svg(scatter("t", clouds, x_label="x"))
    for path in _paths(svg, "whisker"):
        ends = [float(end) for end in re.findall(r"[ V](-?[\d.]+)(?=$|V)", path)]
        assert all(0 <= end <= 290 for end in ends)
    (_, ay), (_, by) = map(_start, _paths(svg, "point"))
    assert ay - by > 50  # the points are not made a spot by it


def test_no_axis_goes_on_where_there_can_be_no_values():
    clouds = [_cloud("a", 0, 50, y_half=80.0), _cloud("b", 1, 99, y_half=80.0)]
    ticks = _words(_svg(scatter("t", clouds, x_label="x", y_limits=(0, 100))), "tick")
    assert "100" in ticks
    assert "120" not in ticks


def test_what_is_no_number_is_left_out_and_nothing_says_so():
    nothing = scatter("t", [_cloud("a", math.nan, 1)], x_label="x")
    assert "nothing to compare yet" in nothing
    html = scatter("t", [_cloud("a", math.inf, 1), _cloud("b", 1, 2)], x_label="x")
    assert _words(_svg(html), "mark") == ["b"]


@pytest.mark.parametrize("value", [0.0, -1e-300, 1e299, 5e-324])
def test_one_point_of_any_size_is_inside_the_picture(value):
    (x, y) = _start(
        _paths(_svg(scatter("t", [_cloud("a", value, value)], x_label="x")), "point")[0]
    )
    assert 0 < x < 420
    assert 0 < y < 290


def test_an_interval_chart_has_a_row_a_name_and_a_line_at_zero():
    rows = [
        Row("up", 2.0, 1.0, "+2.0 ± 1.0", "run0"),
        Row("flat", 0.0, 3.0, "0.0 ± 3.0", "run1"),
        Row("alone", -1.0, None, "−1.0", "run2"),
        Row("none", math.nan, None, "–", "run3"),
    ]
    svg = _svg(intervals("t", rows, unit="points"))
    assert _words(svg, "mark") == ["up", "flat", "alone", "none"]
    points, whiskers = _paths(svg, "point"), _paths(svg, "whisker")
    assert (len(points), len(whiskers)) == (3, 2)
    zero = _start(_paths(svg, "zero-mark")[0])[0]
    ends = re.search(r"M([\d.]+) [\d.]+H([\d.]+)", whiskers[0]).groups()
    assert float(ends[0]) > zero  # 2 ± 1 does not reach 0
    ends = re.search(r"M([\d.]+) [\d.]+H([\d.]+)", whiskers[1]).groups()
    assert float(ends[0]) < zero < float(ends[1])


def test_no_differences_say_so():
    assert "nothing to compare yet" in intervals("t", [Row("a", math.nan, None, "–", "run0")])
    assert "nothing to compare yet" in intervals("t", [])


def test_hostile_names_stay_words():
    drawn = [
        scatter(HOSTILE, [_cloud(HOSTILE, 1, 2, y_half=1.0)], x_label=HOSTILE, y_label=HOSTILE),
        intervals(HOSTILE, [Row(HOSTILE, 1.0, 0.5, HOSTILE, HOSTILE)], unit=HOSTILE),
    ]
    for html in drawn:
        assert "<script" not in html
        assert not {"\u202e", "\x1b", "\ud800"} & set(html)
        ET.fromstring(html)


def test_a_still_figure_has_no_button_and_no_data():
    html = still(scatter("<t>", [_cloud("a", 1, 2)], x_label="x"))
    assert "<button" not in html
    assert "data-points" not in html
    ET.fromstring(html)


def test_every_class_that_is_drawn_has_its_rule():
    css = STYLE.read_text(encoding="utf-8")
    for kind in ("point", "run", "ring", "cross", "whisker", "zero-mark"):
        assert f"figure.chart svg .{kind} " in css
