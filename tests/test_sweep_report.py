"""A sweep's report: what it claims and refuses to claim, its two files, hostile words in them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sweeping import SETTINGS, add_cell, forge_sweep, keep_hits, write
from typer.testing import CliRunner

from gapo_lite.cli import app
from gapo_lite.errors import RunError
from gapo_lite.report import sections_of, write_report
from gapo_lite.report_blocks import Name, Section, Table, as_html, as_markdown
from gapo_lite.report_tables import without_paths
from gapo_lite.report_verdict import ACCURACY, compare
from gapo_lite.sweep_results import read_sweep_results

VOID = {"meta", "br", "link", "img"}
HOSTILE = (
    "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>|`*_[a](http://b.c)_*`"
    "\n# $x$ ~~ @ada #1 \u202e\u2066\x1b[2J\x00\ud800 &amp; www.b.c אבג"
)


class _Page(HTMLParser):
    """A page taken apart; `problems` are elements that were not closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.problems: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(tag)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def _written(folder: Path) -> tuple[_Page, str]:
    page, markdown = write_report(folder)
    return _Page(page.read_text(encoding="utf-8")), markdown.read_text(encoding="utf-8")


def _sweep(tmp_path: Path, gains: dict[str, tuple[float, ...]], **more) -> Path:
    """A sweep whose contenders gain so much on SimPO's accuracy, a number a seed."""
    settings = {"simpo": {"objective.name": "simpo"}}
    settings |= {name: {"margin.gamma": 0.3 + at / 100} for at, name in enumerate(gains)}
    folder = forge_sweep(tmp_path, contenders=settings, **more)
    for seed, accuracy in enumerate((0.70, 0.74, 0.66), start=1):
        add_cell(folder, "simpo", seed, accuracy=accuracy, tokens=100.0 + seed)
        for name, gain in gains.items():
            if seed <= len(gain):
                add_cell(
                    folder, name, seed, accuracy=accuracy + gain[seed - 1], tokens=110.0 + 2 * seed
                )
    return folder


# --- what may be claimed --------------------------------------------------------------------------


def test_a_difference_whose_interval_includes_0_is_no_difference(tmp_path):
    page, markdown = _written(_sweep(tmp_path, {"gapo": (0.03, -0.01, 0.02)}))
    # mean 1.33, deviations 1.67, −2.33, 0.67: s = 2.08, 4.3027 · 2.08 / √3 = 5.2
    assert "**gapo**: accuracy +1.3 ± 5.2 points (1.1 of 84 pairs) over 3 seeds." in markdown
    assert "includes 0: no difference can be told from these runs" in markdown
    assert "The contender cannot be told apart from simpo by held-out accuracy" in page.text
    assert "higher" not in markdown.split("## How to read")[0]


def test_a_clear_difference_is_one_and_its_length_stands_beside_it(tmp_path):
    page, markdown = _written(_sweep(tmp_path, {"gapo": (0.050, 0.052, 0.051)}))
    assert "gapo has a higher accuracy than simpo on these pairs" in page.text
    # lengths differ by 11, 12, 13
    assert (
        "higher on these held-out pairs. Length of answers: +12.0 ± 2.5 tokens, longer." in markdown
    )


def test_a_clear_loss_is_called_one(tmp_path):
    _, markdown = _written(_sweep(tmp_path, {"gapo": (-0.050, -0.052, -0.051)}))
    assert "**gapo** has a lower accuracy than **simpo**" in markdown


def test_with_many_comparisons_one_lucky_interval_is_a_lead_and_no_finding(tmp_path):
    # ± 2.9 around 3.1 excludes 0 by itself: p = 0.043, times 4 is 0.17
    gains = {f"g{at}": (0.02, -0.02, 0.001 * at) for at in range(3)}
    page, markdown = _written(_sweep(tmp_path, gains | {"lucky": (0.020, 0.033, 0.040)}))
    assert "**lucky**: accuracy +3.1 ± 2.5 points" in markdown
    assert "among 4 comparisons that is not enough" in markdown
    assert "None of 4 contenders can be told apart from simpo" in page.text
    assert "There are 4 comparisons with the baseline" in page.text
    assert "about 0.2 of the intervals" in page.text


def test_the_same_difference_on_every_seed_proves_nothing(tmp_path):
    page, markdown = _written(_sweep(tmp_path, {"gapo": (0.05, 0.05, 0.05)}))
    assert "It is the same on every seed" in markdown
    assert "The contender cannot be told apart from simpo" in page.text


def _with_hits(folder: Path, ours: list[list[bool]], theirs: list[list[bool]]) -> Path:
    for seed, (our, their) in enumerate(zip(ours, theirs, strict=True), start=1):
        keep_hits(folder, "gapo", seed, our)
        keep_hits(folder, "simpo", seed, their)
    return folder


def test_the_interval_over_pairs_takes_each_pairs_mean_over_seeds(tmp_path):
    folder = _sweep(tmp_path, {"gapo": (0.05, 0.052)})
    _with_hits(
        folder,
        [[True, True, True, False], [True, True, False, False]],
        [[False, True, False, False], [False, True, True, False]],
    )
    (comparison,) = compare(read_sweep_results(folder))
    # gains by pair: (1 + 1)/2, 0, (1 − 1)/2, 0: mean 1/4, s = 1/2, t₃ = 3.1824, s/√4 = 1/4
    assert comparison.over_pairs.mean == 0.25
    assert comparison.over_pairs.half_width == pytest.approx(3.1824 / 4, abs=1e-4)
    _, markdown = _written(folder)
    assert "| ± 79.6 |" in markdown
    assert "stands in the table of differences" in markdown


def test_a_finding_on_these_pairs_says_whether_it_would_hold_on_others(tmp_path):
    folder = _sweep(tmp_path, {"gapo": (0.050, 0.052, 0.051)})
    few = [[True, True, False, False]] * 3, [[False, True, False, False]] * 3
    assert (
        "includes 0: other pairs might show nothing of it" in _written(_with_hits(folder, *few))[1]
    )
    many = [[True] * 30 + [False] * 10] * 3, [[True] * 10 + [False] * 30] * 3
    assert "points, which excludes 0 too." in _written(_with_hits(folder, *many))[1]


def test_pairs_that_are_not_the_same_are_not_compared(tmp_path):
    folder = _sweep(tmp_path, {"gapo": (0.05,)})
    _with_hits(folder, [[True, True]], [[True, False, True]])
    assert compare(read_sweep_results(folder))[0].over_pairs is None
    _with_hits(folder, [[True, True]], [[True, False]])
    assert compare(read_sweep_results(folder))[0].over_pairs is not None
    add_cell(folder, "gapo", 1, data_fingerprint="another")
    assert compare(read_sweep_results(folder))[0].over_pairs is None
    write(folder.parent / "sweep-gapo-s1" / "heldout.json", {"newest": {"chosen_logps": "x"}})
    assert compare(read_sweep_results(folder))[0].over_pairs is None


def test_one_seed_has_means_and_no_interval_and_no_verdict(tmp_path):
    folder = forge_sweep(tmp_path, seeds=(1,))
    add_cell(folder, "simpo", 1, accuracy=0.6)
    add_cell(folder, "gapo", 1, accuracy=0.9)
    page, markdown = _written(folder)
    assert "**gapo**: accuracy +30.0 points (25.2 of 84 pairs) over 1 seed." in markdown
    assert "One seed has no interval" in markdown
    assert "With one seed there is none" in page.text
    assert "| **gapo** | 1 of 1 | 90.0 |" in markdown
    assert "The contender cannot be told apart from simpo" in page.text


def test_only_seeds_that_both_have_are_compared(tmp_path):
    folder = _sweep(tmp_path, {"gapo": (0.01, 0.03)})
    (comparison,) = compare(read_sweep_results(folder))
    assert comparison.differences["accuracy"].num == 2
    assert comparison.differences["accuracy"].mean == pytest.approx(0.02)


def test_without_a_baseline_there_are_no_differences(tmp_path):
    folder = forge_sweep(tmp_path, baseline=None)
    add_cell(folder, "gapo", 1)
    page, markdown = _written(folder)
    assert "names no baseline" in page.text
    assert "Differences" not in markdown


def test_a_baseline_without_a_finished_run_is_told(tmp_path):
    folder = forge_sweep(tmp_path)
    add_cell(folder, "gapo", 1)
    page, _ = _written(folder)
    assert "The baseline simpo has no finished run yet, so there is nothing" in page.text


def test_of_a_sweep_that_is_over_nothing_is_to_come(tmp_path):
    folder = forge_sweep(tmp_path, seeds=(1,), halving={"first_steps": 4})
    write(folder / "sweep-status.json", {"state": "finished"})
    for name in ("gapo", "simpo"):
        add_cell(folder, name, 1, state="dropped", step=4)
    assert "No run has finished, so there is nothing to say." in _written(folder)[0].text
    add_cell(folder, "gapo", 1)
    page, _ = _written(folder)
    assert "The baseline simpo has no finished run, so there is nothing to compare" in page.text
    assert "1 dropped by halving. What follows is of the finished ones alone. " in page.text


# --- what is there --------------------------------------------------------------------------------


def test_without_a_finished_run_the_page_says_so(tmp_path):
    page, markdown = _written(forge_sweep(tmp_path))
    assert "No run has finished yet, so there is nothing to say." in page.text
    assert "0 of 6 runs are finished, 6 not done yet." in page.text
    assert "| **gapo** | 0 of 3: 3 to come |" in markdown
    assert "figure" not in page.tags


def test_every_measure_of_a_run_is_in_the_table(tmp_path):
    _, markdown = _written(_sweep(tmp_path, {"gapo": (0.03, -0.01, 0.02)}))
    head, base, simpo = (
        next(line for line in markdown.split("\n") if line.startswith(start))
        for start in ("| Contender | Runs", "| base model", "| **simpo** (baseline) | 3 of 3")
    )
    columns = [cell.strip() for cell in head.split("|")[1:-1]]
    row = dict(zip(columns, (cell.strip() for cell in simpo.split("|")[1:-1]), strict=True))
    # 70, 74, 66: s = 4, 4.3027 · 4 / √3 = 9.9
    assert row["Accuracy, %"] == row["Accuracy by its own reward, %"] == "70.0 ± 9.9"
    assert row["Reward margin"] == "2.50"
    assert row["Target margin"] == "3.00"
    assert row["Chosen logps, change"] == "0.100"
    assert row["Rejected logps, change"] == "−0.080"
    assert row["Answer, tokens"] == "102.0 ± 2.5"
    assert row["Cut short, %"] == "25"
    assert row["Repetition, %"] == "4.0"
    assert base.split("|")[3].strip() == "50.0"
    assert base.split("|")[9].strip() == "90.0"


def test_failed_dropped_and_missing_runs_are_counted_and_explained(tmp_path):
    folder = _sweep(tmp_path, {"gapo": (0.03,)}, halving={"first_steps": 4})
    add_cell(folder, "gapo", 2, state="dropped", step=4)
    run = "sweep-gapo-s3"
    message = "out of memory in /home/ada/runs/x.py: lower data.max_length"
    record = {"run": run, "contender": "gapo", "seed": 3, "state": "failed", "message": message}
    write(folder / "cells" / f"{run}.json", record)
    page, markdown = _written(folder)
    assert "| **gapo** | 1 of 3: 1 failed, 1 dropped at step 4 |" in markdown
    assert "4 of 6 runs are finished, 1 failed, 1 dropped by halving." in page.text
    assert "gapo, seed 3, failed: out of memory in x.py: lower data.max_length" in page.text
    assert "1 run was stopped early by successive halving and counts in no mean" in page.text
    assert "drift guard" not in page.text


def test_runs_that_the_drift_guard_stopped_are_not_passed_over(tmp_path):
    folder = _sweep(tmp_path, {"gapo": (0.02, 0.025, 0.03)}, halving={"first_steps": 4})
    message = "At step 6 … So training.on_drift stopped it."
    drifted = {"state": "dropped", "stopped_by": "drift", "step": 6, "message": message}
    add_cell(folder, "gapo", 3, accuracy=0.4, **drifted)
    page, markdown = _written(folder)
    assert "| **gapo** | 2 of 3: 1 drifted at step 6 |" in markdown
    assert "5 of 6 runs are finished, 1 stopped by the drift guard. What follows" in page.text
    assert "over 2 seeds" in page.text
    assert "This is without 1 of its 3 runs, stopped by the drift guard." in page.text
    assert "(training.on_drift) and counts in no mean. The means of gapo are of" in page.text
    assert f"gapo, seed 3, was stopped by the drift guard: {message}" in page.text
    assert "halving" not in page.text


def test_runs_that_halving_dropped_are_told_apart_from_those(tmp_path):
    folder = forge_sweep(tmp_path, halving={"first_steps": 4})
    add_cell(folder, "simpo", 1)
    for seed in (1, 2):
        add_cell(folder, "gapo", seed, state="dropped", step=4, stopped_by="halving")
    halved = _written(folder)[0].text
    assert "2 dropped by halving" in halved
    assert "2 runs were stopped early by successive halving and count in no mean" in halved
    assert "drift guard" not in halved


def test_words_that_a_first_reader_does_not_know_are_explained(tmp_path):
    page, _ = _written(_sweep(tmp_path, {"gapo": (0.03, -0.01, 0.02)}))
    reading = page.text.partition("How to read this")[2]
    for word in (
        "A contender is",
        "Logps are",
        "in nats (",
        "EF, the",
        "A reward margin",
        "target",
    ):
        assert word in reading


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, None, "x"])
def test_any_value_makes_a_report(tmp_path, value):
    folder = forge_sweep(tmp_path)
    for seed in (1, 2, 3):
        add_cell(folder, "simpo", seed, accuracy=0.6 + seed / 100)
        record = add_cell(folder, "gapo", seed, accuracy=0.7)
        keys = ("tuned", "base")
        broken = {key: dict.fromkeys(record[key], value) for key in keys} if seed > 1 else {}
        add_cell(folder, "gapo", seed, **broken, target_reward_margin=value, answers=value)
    page, markdown = _written(folder)
    assert page.problems == []
    assert not re.search(r"\bnan\b|\binf\b", markdown)


def test_a_measure_that_only_some_runs_have_says_of_how_many_it_is(tmp_path):
    folder = forge_sweep(tmp_path)
    add_cell(folder, "gapo", 1, tokens=100.0)
    add_cell(folder, "gapo", 2, tokens=None)
    _, markdown = _written(folder)
    assert "100.0 (1 of 2)" in markdown


def test_the_papers_figures_and_the_deciles_are_drawn(tmp_path):
    page, markdown = _written(_sweep(tmp_path, {"gapo": (0.03, -0.01, 0.02)}))
    titles = {dict([one])["aria-label"] for one in page.attributes if one[0] == "aria-label"}
    told = " ".join(filter(None, titles))
    for start in (
        "Accuracy and change of chosen logps: base model, simpo, gapo",
        "Accuracy and length of answers",
        "Accuracy, difference: gapo +1.3 ± 5.2",
        "rougeL: 400 values from 0 to 1",
        "gapo: base model, gapo.",
    ):
        assert start in told
    assert "| 0.00 to 0.09 | 8 | 50.0 | 80.0 |" in markdown


def test_rank_correlations_stand_where_agree_has_found_some(tmp_path):
    folder = _sweep(tmp_path, {"gapo": (0.03, -0.01, 0.02)})
    rho = {"rho": 0.123, "low": -0.01, "high": 0.25}
    found = {
        "judgement": "ratings",
        "metrics": [{"metric": "rougeL", "gap": rho, "at_equal_lengths": {"rho": None}}],
        "length": rho,
        "sentence": "Hardly.",
    }
    write(folder / "agree.json", found)
    page, markdown = _written(folder)
    assert "| rougeL | +0.12 (−0.01 to +0.25) | – |" in markdown
    assert "Hardly. ρ is Spearman's rank correlation" in page.text
    for damaged in ({"metrics": 3}, {"metrics": [1]}, {"x": 1}):
        write(folder / "agree.json", damaged)
        assert "Spearman" not in _written(folder)[0].text


def test_numbers_have_real_minus_signs_and_no_sign_at_zero():
    assert ACCURACY.write(-0.0123, signed=True) == "−1.2"
    assert ACCURACY.write(0.0123, signed=True) == "+1.2"
    assert ACCURACY.write(-0.0001, signed=True) == ACCURACY.write(-0.0) == "0.0"
    assert ACCURACY.write(12345.678) == "1.235e6"
    assert ACCURACY.write(math.nan) == "not a number"


# --- the files ------------------------------------------------------------------------------------


def test_the_same_sweep_gives_the_same_bytes(tmp_path):
    folder = _sweep(tmp_path, {"gapo": (0.03, -0.01, 0.02)})
    first = [path.read_bytes() for path in write_report(folder)]
    again = [path.read_bytes() for path in write_report(folder)]
    assert first == again
    assert {path.name for path in folder.iterdir() if "report" in path.name} == {
        "report.html",
        "report.md",
    }


def test_the_page_is_whole_and_asks_for_nothing_elsewhere(tmp_path):
    folder = _sweep(tmp_path, {"gapo": (0.03, -0.01, 0.02)})
    page, _ = _written(folder)
    assert page.problems == []
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "button", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "onload", "onclick")]
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "url(" not in source
    assert "@import" not in source


def test_the_dark_is_the_readers_own(tmp_path):
    source = write_report(forge_sweep(tmp_path))[0].read_text(encoding="utf-8")
    assert not re.search(r"^\.dark", source, re.MULTILINE)
    assert (
        "@media screen and (prefers-color-scheme: dark) { :root {\n  --chart-train: #4ba3e3"
        in source
    )
    style = source[source.index("<style>") : source.index("</style>")]
    assert style.count("{") == style.count("}")


def test_no_local_path_or_user_gets_into_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/jqz")
    data = tmp_path / "jqz-private" / "pairs.jsonl"
    settings = SETTINGS | {"other": {"data.source": str(data)}}
    folder = forge_sweep(tmp_path / "jqz-runs", contenders=settings)
    for name in settings:
        add_cell(folder, name, 1)
    for path in write_report(folder):
        text = path.read_text(encoding="utf-8")
        assert "jqz" not in text
        assert str(tmp_path) not in text
        assert "data.source = pairs.jsonl" in text


def test_messages_keep_the_last_part_of_a_path():
    told = without_paths("cannot read '/home/ada b/x y.jsonl' or ~/z/a.bin, see https://a.b/c/d")
    assert told == "cannot read x y.jsonl or a.bin, see https://a.b/c/d"
    assert without_paths("rewards/margins of HuggingFaceTB/SmolLM2") == (
        "rewards/margins of HuggingFaceTB/SmolLM2"
    )
    assert len(without_paths("x" * 10_000)) == 600


def test_of_a_path_with_blanks_nothing_but_the_last_part_is_kept():
    told = without_paths("cannot read /home/ada lovelace/Secret Client Ltd/pairs.jsonl: gone.")
    assert told == "cannot read pairs.jsonl: gone."
    assert without_paths("/a b/x.jsonl or ~/y z/q.bin or ./c/d") == "x.jsonl or q.bin or d"
    assert without_paths("/data/x.jsonl has no prompt/chosen") == "x.jsonl has no prompt/chosen"
    roots = [Path("/srv/Client (Secret), a b c d e"), Path("Client X")]
    message = f"read {roots[0]}/x.jsonl, {roots[1]}/y.jsonl, {roots[0]}."
    assert without_paths(message, roots) == "read x.jsonl, y.jsonl, ~."


def test_the_folders_of_a_sweep_s_own_data_stay_out_of_its_messages(tmp_path):
    client = "Client (Secret), a b c d"
    source = f"{tmp_path}/{client}/pairs.jsonl"
    settings = SETTINGS | {"gapo": {"data.source": source}}
    folder = forge_sweep(tmp_path, contenders=settings)
    add_cell(folder, "gapo", 1, state="failed", message=f"cannot read {source} of {Path.cwd()}")
    add_cell(folder, "simpo", 1)
    page, markdown = _written(folder)
    assert "gapo, seed 1, failed: cannot read pairs.jsonl of ~" in page.text
    assert "Secret" not in markdown


def test_a_full_disk_leaves_the_old_report_alone(tmp_path, monkeypatch):
    folder = _sweep(tmp_path, {"gapo": (0.03, -0.01, 0.02)})
    before = [path.read_bytes() for path in write_report(folder)]
    add_cell(folder, "gapo", 1, accuracy=0.99)

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match="No space left"):
        write_report(folder)
    monkeypatch.undo()
    assert [path.read_bytes() for path in (folder / "report.html", folder / "report.md")] == before
    assert not [path for path in folder.iterdir() if ".part" in path.name]


def test_hostile_words_stay_words_in_both_files(tmp_path):
    folder = _sweep(tmp_path, {"gapo": (0.03, -0.01, 0.02)})
    results = read_sweep_results(folder)
    tame = _Page(as_html("t", sections_of(results), ""))
    gapo = results.contenders[1]
    cells = tuple(dataclasses.replace(one, message=HOSTILE) for one in gapo.cells)
    contender = dataclasses.replace(gapo, name=HOSTILE, metric=HOSTILE, cells=cells)
    results = dataclasses.replace(
        results,
        name=HOSTILE,
        model=HOSTILE,
        data=HOSTILE,
        contenders=(results.contenders[0], contender),
        machines=(HOSTILE,),
        decile_metric=HOSTILE,
    )
    html = as_html(HOSTILE, sections_of(results), "")
    page = _Page(html)
    assert set(page.tags) == set(tame.tags)
    assert page.problems == []
    assert not {"\u202e", "\u2066", "\x1b", "\x00", "\ud800"} & set(html)
    html.encode("utf-8")
    text = as_markdown(HOSTILE, sections_of(results), "")
    assert not {"\u202e", "\u2066", "\x1b", "\x00", "\ud800"} & set(text)
    assert "<script" not in text.replace("\\<", "")
    for block in text.split("\n\n"):
        if block.startswith("| "):  # every bar inside a cell is escaped: the columns stay
            bars = {len(re.findall(r"(?<!\\)\|", line)) for line in block.split("\n")}
            assert len(bars) == 1


def test_markdown_makes_no_mention_link_or_formula_of_a_name():
    table = Table(("a",), ((Name("@ada #1 www.b.c http://b.c $x$ a_b _c_ `d`"),),))
    text = as_markdown("t", [Section("", ()), Section("s", (table,))], "")
    for live in ("@ada", "#1", "www.", "://b", "$x", " _c_", " `d`"):
        assert live not in text
    assert "a_b" in text  # inside of a word it is no emphasis, and stays readable


def test_a_name_from_right_to_left_is_kept_apart():
    section = Section("s", (Table(("a",), ((Name("אבג"),),)),))
    assert "<bdi>אבג</bdi>" in as_html("t", [Section("", ()), section], "")
    assert "**\u2068אבג\u2069**" in as_markdown("t", [Section("", ()), section], "")


# --- the command ----------------------------------------------------------------------------------


def test_the_command_writes_both_files_and_says_where(tmp_path):
    folder = _sweep(tmp_path, {"gapo": (0.03, -0.01, 0.02)})
    for argument in ("sweep", str(folder)):
        result = CliRunner().invoke(app, ["report", argument, "--runs-dir", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert result.stdout.split() == [str(folder / "report.html"), str(folder / "report.md")]
    result = CliRunner().invoke(app, ["report", "nothing", "--runs-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "there is no sweep 'nothing'" in result.output


def test_a_report_needs_no_torch(tmp_path):
    import subprocess
    import sys

    folder = forge_sweep(tmp_path)
    code = (
        "import json, sys; from pathlib import Path; from gapo_lite.report import write_report; "
        f"write_report(Path({str(folder)!r})); print(json.dumps('torch' in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) is False
