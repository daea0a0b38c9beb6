"""What the Data tab knows is what training will do, of any text, and quickly."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from checkout import REAL_DATA, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from app import pair_views, worker
from app import pairs as page
from app.browser import MARK, MOST_ALIGNED_WORDS, SORTS, browse, diff_html
from app.gaps import GapView, gaps, to_csv
from app.measures import lengths, measure_lengths, measure_scores, scores
from app.pairs import MAX_PROBLEMS, Kept, PairSet, PairSets, overview, split_of
from gapo_lite.config import RunConfig, parse_config
from gapo_lite.ef import cache, score_pairs
from gapo_lite.errors import ConfigError, DataError, ModelError, RunError
from gapo_lite.lengths import count_tokens
from gapo_lite.model import load_tokenizer
from gapo_lite.preparation import prepare
from gapo_lite.records import _margins_record

REAL = REAL_DATA / "alpaca_pairs_test.jsonl.gz"
LEXICAL = ("jaccard", "rouge1", "rouge2", "rougeL")
BERT = {"bertscore_model": "embedded:all-minilm-l6-v2"}

NASTY = [
    "plain words",
    "👩‍👩‍👧‍👦 family 1️⃣ 👍🏽",
    "مرحبا بالعالم \u202eright to left\u202c",
    "日本語のテキスト、と漢字。",
    '<script>alert("x")</script> & <mark class="only">',
    "NUL \0 inside",
    "e\u0301 naïve ﬁ İstanbul Straße ΣΊΣΥΦΟΣ",
    "\u3000 wide\u00a0spaces\r\n\tand\x1clines \n\n",
    "big " * 250_000,
]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("GAPO_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


def everyday() -> PairSet:
    return PairSets().load("embedded:everyday")


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made_of(path: Path, texts: list[tuple[str, str, str]]) -> PairSet:
    names = ("prompt", "chosen", "rejected")
    write(path, [dict(zip(names, row, strict=True)) for row in texts])
    return PairSets().load(str(path))


def measured(pair_set: PairSet, metric: str, config: RunConfig) -> list[tuple[int, int]]:
    return list(measure_scores(pair_set, metric, config))


# -- opening --


def test_a_set_is_opened_once_and_again_when_its_file_changes(tmp_path):
    sets, path = PairSets(), tmp_path / "p.jsonl"
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    write(path, [row])
    first = sets.load(str(path))
    assert sets.load(str(path)) is first
    write(path, [row, row])
    assert len(sets.load(str(path))) == 2
    assert sets.load("embedded:everyday") is sets.load("embedded:everyday")


def test_a_saved_folder_is_opened_again_when_it_changes(tmp_path):
    import datasets

    sets, folder = PairSets(), tmp_path / "saved"
    columns = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)}).save_to_disk(folder)
    first = sets.load(str(folder), "test")
    assert sets.load(str(folder), "test") is first
    columns = {name: values * 3 for name, values in columns.items()}
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)}).save_to_disk(folder)
    assert len(sets.load(str(folder), "test")) == 3


def test_only_the_last_sets_are_kept(tmp_path):
    sets = PairSets(capacity=2)
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    paths = [str(write(tmp_path / f"{number}.jsonl", [row])) for number in range(3)]
    first = [sets.load(path) for path in paths]
    assert sets.load(paths[2]) is first[2]
    assert sets.load(paths[1]) is first[1]
    assert sets.load(paths[0]) is not first[0]


def test_many_threads_open_a_set_once(monkeypatch):
    sets, loads, found = PairSets(), [], []
    real = page.load_pairs
    monkeypatch.setattr(page, "load_pairs", lambda *a, **k: (loads.append(a), real(*a, **k))[1])
    threads = [
        threading.Thread(target=lambda: found.append(sets.load("embedded:everyday")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert len({id(each) for each in found}) == 1


def test_what_fails_is_tried_again():
    kept, calls = Kept(2), []

    def make() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise DataError("not yet")
        return 7

    with pytest.raises(DataError):
        kept.get("key", make)
    assert kept.find("key") is None
    assert kept.get("key", make) == kept.get("key", make) == 7
    assert len(calls) == 2


def test_a_hub_id_that_is_not_there_tells_nothing_of_files_here(tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "secrets").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as refusal:
        PairSets().load("owner/secret")
    assert "Hub" in str(refusal.value)
    assert "secrets" not in str(refusal.value)


# -- overview --


def test_the_overview_counts_what_is_there(tmp_path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c", "strength": 0.5, "chosen_rating": 3}
    rows = [good, good | {"rejected_rating": 1}, good | {"rejected": "b"}]
    rows += [{"prompt": "a", "chosen": "<b>", "rejected": None}] * (MAX_PROBLEMS + 5)
    seen = overview(PairSets().load(str(write(tmp_path / "p.jsonl", rows))))
    assert (seen.num_pairs, seen.num_problems, len(seen.problems)) == (3, 205, MAX_PROBLEMS)
    assert (seen.problems[0].line, seen.problems[0].field) == (4, "rejected")
    assert (seen.num_duplicates, seen.num_equal) == (1, 1)
    assert (seen.num_rated, seen.num_with_strength) == (1, 3)
    assert seen.shape_columns == "prompt, chosen, rejected: texts"
    assert seen.columns[:3] == ["prompt", "chosen", "rejected"]


def test_the_overview_of_the_embedded_and_the_real_sets():
    assert overview(everyday()).num_pairs == 264
    if not REAL.is_file():
        pytest.skip(f"real preference pairs are not on this machine: {REAL}")
    seen = overview(PairSets().load(str(REAL)))
    assert (seen.num_pairs, seen.num_with_strength, seen.num_problems) == (405, 405, 0)


# -- scores --


def test_lexical_scores_are_measured_all_at_once_for_training_to_find(monkeypatch, tokenizer):
    pair_set, config = everyday(), parse_config({"data": {"max_pairs": 100}})
    assert scores(pair_set, "rougeL", config) is None
    signs = measured(pair_set, "rougeL", config)
    assert signs[-1] == (264, 264)
    chosen = [pair.chosen for pair in pair_set.pairs]
    rejected = [pair.rejected for pair in pair_set.pairs]
    for metric in LEXICAL:
        expected = score_pairs(chosen, rejected, metric)
        np.testing.assert_array_equal(scores(pair_set, metric, config), expected)
    assert measured(pair_set, "jaccard", config) == []

    monkeypatch.setattr(cache, "score_pairs", None)  # whoever computes them again fails
    for metric in LEXICAL:
        prepare(parse_config({"data": {"max_pairs": 100}, "ef": {"metric": metric}}), tokenizer)
    another = everyday()  # the server was started again
    np.testing.assert_array_equal(
        scores(another, "rouge2", config), scores(pair_set, "rouge2", config)
    )


def test_lexical_scores_serve_any_split(monkeypatch):
    pair_set = everyday()
    measured(pair_set, "rougeL", parse_config({}))
    assert scores(pair_set, "rougeL", parse_config({"data": {"split_seed": 9}})) is not None
    stemmed = parse_config({"ef": {"use_stemmer": True}})
    assert scores(pair_set, "rougeL", stemmed) is None
    measured(pair_set, "rougeL", stemmed)
    expected = score_pairs(*_all_texts(pair_set), "rougeL", use_stemmer=True)
    np.testing.assert_array_equal(scores(pair_set, "rougeL", stemmed), expected)


def test_measuring_that_was_stopped_can_begin_again(tmp_path):
    pair_set = made_of(tmp_path / "p.jsonl", [(f"p{n}", f"a {n}", f"b {n}") for n in range(1500)])
    config = parse_config({})
    signs = measure_scores(pair_set, "rouge1", config)
    assert next(signs) == (512, 1500)
    signs.close()
    assert scores(pair_set, "rouge1", config) is None
    assert measured(pair_set, "rouge1", config) == [(512, 1500), (1024, 1500), (1500, 1500)]


def test_who_asks_while_another_measures_waits_and_measures_nothing(tmp_path):
    pair_set = made_of(tmp_path / "p.jsonl", [(f"p{n}", f"a {n}", f"b {n}") for n in range(600)])
    config = parse_config({})
    first, second = (measure_scores(pair_set, "rouge1", config) for _ in range(2))
    assert next(first) == (512, 600)
    assert next(second) == (0, 600)
    assert list(first) == [(600, 600)]
    assert list(second) == []


def test_a_cache_that_cannot_be_written_costs_no_lexical_scores(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GAPO_LITE_CACHE", str(tmp_path / "file"))
    pair_set, config = everyday(), parse_config({})
    measured(pair_set, "rougeL", config)
    assert scores(pair_set, "rougeL", config) is not None
    assert "cannot be kept" in caplog.text


def test_an_unknown_metric_is_refused_calmly():
    for ask in (scores, measured):
        with pytest.raises(ConfigError, match="no evaluation factor 'rouge3'"):
            ask(everyday(), "rouge3", parse_config({}))


def test_bertscores_are_measured_by_the_worker_for_training_to_find(monkeypatch, tokenizer):
    settings = {"ef": {"metric": "bertscore_f1", **BERT}, "data": {"max_pairs": 40}}
    pair_set, config = everyday(), parse_config(settings)
    assert gaps(pair_set, config) is None
    signs = measured(pair_set, "bertscore_f1", config)
    used = split_of(pair_set, config)
    total = 40 + len(used.held_out)
    assert signs[-1] == (total, total)

    monkeypatch.setattr(cache, "score_pairs", None)
    for metric in ("bertscore_p", "bertscore_r", "bertscore_f1"):
        prepared = prepare(parse_config(settings | {"ef": {"metric": metric, **BERT}}), tokenizer)
        found = scores(pair_set, metric, config)
        np.testing.assert_array_equal(found[used.training], prepared.train.ef)
        np.testing.assert_array_equal(found[used.held_out], prepared.heldout.ef)
        assert np.isnan(found[used.unused]).all()
        np.testing.assert_array_equal(scores(everyday(), metric, config), found)

    view = gaps(pair_set, config)
    assert view.mean_gap == prepared.train.margins.mean_gap
    assert np.isnan(view.margin[used.unused]).all()
    assert view.warning == ""
    down = [browse(pair_set, view, sort="margin down", index=n) for n in (0, total - 1, total)]
    assert down[0].reward_margin > down[1].reward_margin
    assert (down[2].reward_margin, down[2].part, down[2].efs) == (None, "unused", {})
    other_split = parse_config(settings | {"data": {"max_pairs": 41}})
    assert scores(pair_set, "bertscore_f1", other_split) is None


def test_an_encoder_that_cannot_be_loaded_is_told_calmly(tmp_path):
    config = parse_config({"ef": {"bertscore_model": str(tmp_path / "none"), "bertscore_layer": 1}})
    with pytest.raises(ModelError, match="looks like a folder"):
        measured(everyday(), "bertscore_p", config)


# -- gaps --

CONFIGS = [
    {},
    {"data": {"heldout_fraction": 0.0}, "margin": {"mapping": "linear"}},
    {"data": {"heldout_fraction": 0.3, "split_seed": 3}, "margin": {"normalization": "shift"}},
    {"data": {"heldout_source": "embedded:everyday-heldout", "max_pairs": 50}},
    {"data": {"max_pairs": 7}, "margin": {"normalization": "none", "gamma": 2}},
    {"objective": {"margin_scale": "one", "beta": 2.5}, "margin": {"ef_floor": 0.2}},
    {"objective": {"name": "simpo"}, "margin": {"gamma": 0.5}},
    {"objective": {"name": "simpo"}, "margin": {"source": "ef"}},
    {"objective": {"name": "dpo"}},
    {"objective": {"name": "dpo"}, "margin": {"source": "ef", "normalization": "shift"}},
    {"objective": {"name": "slic"}, "margin": {"source": "constant", "gamma": 2}},
    {"objective": {"name": "kto"}},
    {"objective": {"name": "orpo"}, "data": {"max_pairs": 30}},
    {"margin": {"source": "rating"}, "data": {"rating_columns": ["strength"]}},
    {
        "objective": {"name": "rdpo"},
        "margin": {"source": "rating", "normalization": "shift"},
        "data": {"rating_columns": ["strength"], "heldout_fraction": 0.3},
    },
    {"data": {"source": "REAL"}, "ef": {"metric": "rouge2", "use_stemmer": True}},
    {"data": {"source": "REAL"}, "ef": {"tokenizer": "unicode"}},
    {"data": {"source": "REAL", "max_pairs": 100}, "margin": {"mapping": "sqrt"}},
]


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_margins_are_those_that_a_run_records(number, tokenizer):
    config = parse_config(json.loads(json.dumps(CONFIGS[number]).replace("REAL", str(REAL))))
    if config.data.source == str(REAL) and not REAL.is_file():
        pytest.skip(f"real preference pairs are not on this machine: {REAL}")
    prepared = prepare(config, tokenizer)
    record = _margins_record(config, prepared)
    pair_set = PairSets().load(config.data.source, rating_columns=config.data.rating_columns)
    measured(pair_set, config.ef.metric, config)
    view = gaps(pair_set, config)

    train = view.split.training
    if config.margin.source is None:
        assert np.isnan(view.margin).all()
        assert np.isnan(view.mean_reward_margin)
        return
    assert [pair_set.pairs[index] for index in train] == prepared.train.pairs
    np.testing.assert_array_equal(view.margin[train], prepared.train.margins.values)
    held_out = view.split.held_out
    if not config.data.heldout_source and prepared.heldout:
        np.testing.assert_array_equal(view.margin[held_out], prepared.heldout.margins.values)
    else:
        assert len(held_out) == 0
    if config.margin.source == "ef":
        np.testing.assert_array_equal(view.ef[train], prepared.train.ef)
    if config.margin.source != "constant":
        np.testing.assert_array_equal(view.gap[train], prepared.train.margins.gaps)
    for key in ("mean_gap", "num_floored", "num_negative"):
        assert (key, getattr(view, key)) == (key, record[key])
    assert view.mean_reward_margin == record["mean_margin_in_reward_units"]
    assert sum(len(part) for part in view.split.parts().values()) == len(pair_set)


def test_units_by_hand(tmp_path):
    pair_set = made_of(
        tmp_path / "p.jsonl",
        [("p", "a b c d", "a b x y"), ("q", "same", "same"), ("r", "one", "two")],
    )
    whole = {"data": {"heldout_fraction": 0}, "ef": {"metric": "rouge1"}}
    config = parse_config(whole | {"margin": {"mapping": "linear"}})
    measured(pair_set, "rouge1", config)
    view = gaps(pair_set, config)
    assert view.ef.tolist() == [0.5, 1.0, 0.0]
    assert view.gap.tolist() == [0.5, 0.0, 0.99]  # the third at the floor
    assert view.margin.mean() == pytest.approx(0.3)
    assert view.mean_reward_margin == pytest.approx(3.0)
    assert view.reward_margin.tolist() == (view.margin * 10).tolist()
    assert view.gamma_beta_ratio == pytest.approx(0.3)
    assert (view.num_zero, view.num_equal, view.num_floored, view.num_negative) == (1, 1, 1, 0)
    assert view.mean_ef == 0.5
    assert set(view.known) == set(LEXICAL)
    one = parse_config(whole | {"objective": {"margin_scale": "one"}})
    assert gaps(pair_set, one).gamma_beta_ratio == pytest.approx(0.03)


def test_constant_margins_need_no_scores():
    config = parse_config({"objective": {"name": "simpo"}})
    view = gaps(everyday(), config)
    assert set(view.margin) == {0.3}
    assert np.isnan(view.ef).all()
    assert view.mean_reward_margin == pytest.approx(3)
    assert view.gamma_beta_ratio == pytest.approx(0.3)


RATED = [
    {"prompt": "p", "chosen": "a b c d", "rejected": "a b x y", "good": 5, "bad": 2},
    {"prompt": "q", "chosen": "one", "rejected": "two", "good": 4, "bad": 5},
    {"prompt": "r", "chosen": "same", "rejected": "same"},
    {"prompt": "s", "chosen": "yes", "rejected": "no", "good": 9, "bad": 5},
]


def rating_config(**margin) -> RunConfig:
    data = {"heldout_fraction": 0, "rating_columns": ["good", "bad"]}
    return parse_config({"data": data, "margin": {"source": "rating", **margin}})


def test_margins_of_ratings_by_hand(tmp_path):
    path = str(write(tmp_path / "p.jsonl", RATED))
    config = rating_config()
    pair_set = PairSets().load(path, rating_columns=["good", "bad"])
    view = gaps(pair_set, config)  # no score is needed
    assert view.known == {}
    np.testing.assert_array_equal(view.gap, [3, -1, np.nan, 4])
    assert view.mean_gap == 2
    np.testing.assert_allclose(view.margin, [0.45, -0.15, 0.3, 0.6])  # the third has the mean
    np.testing.assert_allclose(view.reward_margin, 10 * view.margin)
    assert (view.num_unrated, view.num_negative, view.num_floored) == (1, 1, 0)
    assert view.gamma_beta_ratio == pytest.approx(0.3)
    measured(pair_set, "rougeL", config)
    view = gaps(pair_set, config)
    said, drawn = pair_views.margins(view, config), pair_views.figures(view, config)
    assert "without ratings, at the mean</span> <b>1</b>" in said
    assert "Gap: ratings" in drawn
    assert "rougeL" in drawn  # EF stands beside
    assert "nan" not in (said + drawn).lower()
    rows = list(csv.DictReader(io.StringIO(to_csv(pair_set, view), newline="")))
    assert [row["gap"] for row in rows] == ["3.0", "-1.0", "", "4.0"]
    assert browse(pair_set, view, sort="margin down").line == 4


def test_ratings_that_are_not_there_are_told(tmp_path):
    path = str(write(tmp_path / "p.jsonl", RATED))
    with pytest.raises(DataError, match="none of 4 pairs has ratings of both responses"):
        gaps(PairSets().load(path), rating_config())


def test_a_set_is_opened_anew_for_other_columns_of_ratings(tmp_path):
    sets, path = PairSets(), str(write(tmp_path / "p.jsonl", RATED))
    plain, rated = sets.load(path), sets.load(path, rating_columns=["good", "bad"])
    assert sets.load(path, rating_columns=["good", "bad"]) is rated
    assert sets.load(path) is plain
    assert [np.isnan(each.pairs[0].rating_gap) for each in (plain, rated)] == [True, False]
    assert page.named(plain) == page.named(rated)  # the worker takes either


def test_is_open_says_nothing_of_columns(tmp_path):
    sets, path = PairSets(), str(write(tmp_path / "p.jsonl", RATED))
    assert not sets.is_open(path)
    sets.load(path)
    sets.load(path, rating_columns=["good", "bad"])
    assert sets.is_open(path)


@pytest.mark.parametrize("objective", ["kto", "orpo", "ipo", "rrhf"])
def test_an_objective_without_a_margin_shows_evaluation_factors_only(tmp_path, objective):
    pair_set = PairSets().load(str(write(tmp_path / "p.jsonl", RATED)))
    config = parse_config({"objective": {"name": objective}, "data": {"heldout_fraction": 0}})
    measured(pair_set, "rougeL", config)
    view = gaps(pair_set, config)
    assert view.gamma_beta_ratio is None
    assert f"{objective} has no target margin" in pair_views.margins(view, config)
    drawn = pair_views.figures(view, config)
    assert "rougeL" in drawn
    assert "Target margin" not in drawn
    assert "nan" not in drawn.lower()
    assert browse(pair_set, view, sort="margin down").reward_margin is None
    rows = list(csv.DictReader(io.StringIO(to_csv(pair_set, view), newline="")))
    assert {(row["gap"], row["margin"], row["reward_margin"]) for row in rows} == {("", "", "")}


def test_a_plain_method_has_nothing_to_draw_of_its_margin():
    config = parse_config({"objective": {"name": "dpo"}})
    view = gaps(everyday(), config)
    assert set(view.margin) == {0}
    assert "this is plain dpo" in pair_views.margins(view, config)
    assert "Target margin" not in pair_views.figures(view, config)


@pytest.mark.parametrize("is_measured", [False, True])
def test_constant_margins_have_no_gap(tmp_path, is_measured):
    config = parse_config({"objective": {"name": "simpo"}, "data": {"heldout_fraction": 0}})
    pair_set = made_of(tmp_path / "p.jsonl", [("p", "a b c d", "a b x y"), ("q", "one", "two")])
    if is_measured:
        measured(pair_set, "rougeL", config)
    view = gaps(pair_set, config)
    assert np.isnan(view.gap).all()
    rows = list(csv.DictReader(io.StringIO(to_csv(pair_set, view), newline="")))
    assert [(row["gap"], float(row["margin"])) for row in rows] == [("", 0.3), ("", 0.3)]
    assert [row.get("rougeL") for row in rows] == (["0.5", "0.0"] if is_measured else [None] * 2)
    assert "Every pair has the same target margin" in pair_views.margins(view, config)
    figures = pair_views.figures(view, config)
    assert "Target margin" in figures
    assert "Gap" not in figures
    assert "nan" not in figures.lower()
    assert browse(pair_set, view, sort="margin up").reward_margin == 3.0


def test_texts_that_a_metric_cannot_see_are_warned_of(tmp_path):
    texts = [("q", "你好", "再见"), ("r", "Привет", "hello"), ("s", "yes", "no"), ("t", "a", "b c")]
    pair_set = made_of(tmp_path / "p.jsonl", texts)
    config = parse_config({"data": {"heldout_fraction": 0}, "ef": {"metric": "jaccard"}})
    measured(pair_set, "jaccard", config)
    view = gaps(pair_set, config)
    assert view.warning.startswith("jaccard sees no word at all in a text of 2 of 4 training pairs")
    assert "ef.tokenizer: unicode" in view.warning
    seen = parse_config(config.model_dump() | {"ef": {"metric": "jaccard", "tokenizer": "unicode"}})
    assert gaps(pair_set, seen) is None  # these are other scores
    measured(pair_set, "jaccard", seen)
    assert gaps(pair_set, seen).warning == ""
    assert gaps(everyday(), parse_config({"objective": {"name": "simpo"}})).warning == ""


def test_what_training_would_refuse_is_refused(tmp_path):
    config = parse_config({"data": {"heldout_fraction": 0}})
    same = made_of(tmp_path / "same.jsonl", [("p", "a", "a"), ("q", "b", "b")])
    measured(same, "rougeL", config)
    with pytest.raises(DataError, match="every gap is 0"):
        gaps(same, config)
    one = made_of(tmp_path / "one.jsonl", [("p", "a", "b")])
    with pytest.raises(DataError, match="can't be split"):
        gaps(one, parse_config({}))


def test_sixty_thousand_pairs_are_redrawn_and_searched_at_once(tmp_path):
    words = re.findall(r"\w+", "the cat sat on a mat and looked at the old moon")
    rows = [
        (f"prompt {n}", " ".join(words[: 3 + n % 8]), " ".join(words[n % 5 :]))
        for n in range(60000)
    ]
    pair_set, config = made_of(tmp_path / "p.jsonl", rows), parse_config({})
    measured(pair_set, "rougeL", config)
    gaps(pair_set, config)
    browse(pair_set, None, query="build the haystack")

    def redraw(number: int) -> None:
        gaps(pair_set, parse_config({"margin": {"gamma": number / 10}}))

    def search(number: int) -> None:
        view = gaps(pair_set, config)
        assert browse(pair_set, view, query=f"OLD {number}", sort="margin up") is None

    assert min(_seconds(redraw, number) for number in (1, 2, 3)) < 0.1
    assert min(_seconds(search, number) for number in (1, 2, 3)) < 0.2


def _seconds(action, number: int) -> float:
    start = time.perf_counter()
    action(number)
    return time.perf_counter() - start


def _all_texts(pair_set: PairSet) -> tuple[list[str], list[str]]:
    return [pair.chosen for pair in pair_set.pairs], [pair.rejected for pair in pair_set.pairs]


# -- lengths, and the process that measures --


def children() -> set[int]:
    """Processes that this one has started and that still run (or wait to be buried)."""
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for file in found for pid in file.read_text().split()}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_lengths_are_measured_once_by_the_worker(tiny_model, tokenizer, cache_folder):
    pair_set, model = everyday(), str(tiny_model)
    assert lengths(pair_set, model) is None
    assert list(measure_lengths(pair_set, model))[-1] == (264, 264)
    expected = count_tokens(pair_set.pairs, tokenizer)
    np.testing.assert_array_equal(lengths(pair_set, model), expected)
    np.testing.assert_array_equal(lengths(everyday(), model), expected)
    assert list(measure_lengths(everyday(), model)) == []
    assert lengths(pair_set, model, "a-branch") is None

    (path,) = (cache_folder / "lengths").iterdir()
    content = path.read_bytes()
    for damaged in (b"", content[:-30], content.replace(content[80:90], bytes(10)), b"PK\x03\x04"):
        path.write_bytes(damaged)
        assert lengths(everyday(), model) is None
    assert worker.read_lengths(path, 264) is None
    path.write_bytes(content)
    assert worker.read_lengths(path, 263) is None
    (tiny_model / "tokenizer_config.json").touch()  # another state of the model
    assert lengths(everyday(), model) is None


def test_a_tokenizer_that_cannot_be_loaded_is_told_calmly(tmp_path):
    with pytest.raises(ModelError, match="neither an existing folder nor a Hub id"):
        list(measure_lengths(everyday(), str(tmp_path / "none")))


def test_data_that_changed_since_they_were_opened_are_not_measured(tmp_path, tiny_model):
    path = tmp_path / "p.jsonl"
    pair_set = made_of(path, [("p", "a", "b"), ("q", "c", "d")])
    made_of(path, [("p", "a", "other")])
    with pytest.raises(DataError, match="has changed since it was opened"):
        list(measure_lengths(pair_set, str(tiny_model)))


def test_closing_ends_the_process(tiny_model):
    before = children()
    signs = measure_lengths(everyday(), str(tiny_model))
    next(signs)
    (pid,) = children() - before
    start = time.monotonic()
    signs.close()
    assert time.monotonic() - start < 2
    assert not is_running(pid)
    assert children() == before
    assert lengths(everyday(), str(tiny_model)) is None


def test_a_process_that_is_killed_is_told_of_and_nothing_stays_locked(tiny_model):
    before, pair_set = children(), everyday()
    signs = measure_lengths(pair_set, str(tiny_model))
    next(signs)
    (pid,) = children() - before
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RunError, match=r"ended unexpectedly \(status -9\)"):
        list(signs)
    assert not pair_set.locks["lengths"].locked()


def test_an_error_of_ours_in_the_process_is_told_without_a_traceback():
    with pytest.raises(RunError, match=r"ended unexpectedly \(status 1\)") as error:
        list(worker.run_task("nothing", {}))
    assert "Traceback" not in str(error.value)


def test_the_process_ends_with_the_server(tiny_model):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from app.measures import *; from app.pairs import *\n"
        "signs = measure_lengths(PairSets().load('embedded:everyday'), sys.argv[1])\n"
        "next(signs)\n"
        "print(Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text(), flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_model)], stdout=subprocess.PIPE, cwd=ROOT
    ) as server:
        pid = int(server.stdout.readline())
        server.kill()
    assert wait_until(lambda: not is_running(pid), 10)


def test_the_server_imports_nothing_heavy():
    code = (
        "import sys, app.browser, app.gaps, app.measures, app.pairs, app.places, app.worker\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'datasets', 'gradio'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


# -- browsing --


@pytest.fixture
def five(tmp_path) -> tuple[PairSet, GapView | None]:
    texts = [
        ("Who?", "a b c d", "a b c d"),
        ("What is Café?", "a b c d", "a b c x"),
        ("Where?", "a b c d", "a b x y"),
        ("When?", "a b c d", "a x y z"),
        ("WHY, straße", "a b c d", "w x y z"),
    ]
    pair_set = made_of(tmp_path / "five.jsonl", texts)
    config = parse_config({"data": {"heldout_fraction": 0.2}, "ef": {"metric": "rouge1"}})
    measured(pair_set, "rouge1", config)
    return pair_set, gaps(pair_set, config)


def lines(pair_set: PairSet, view: GapView | None, **how) -> list[int]:
    first = browse(pair_set, view, **how)
    count = first.count if first else 0
    return [browse(pair_set, view, index=index, **how).line for index in range(count)]


def test_pairs_come_in_any_order(five):
    assert lines(*five) == [1, 2, 3, 4, 5]
    assert lines(*five, sort="margin up") == lines(*five, sort="ef down") == [1, 2, 3, 4, 5]
    assert lines(*five, sort="margin down") == lines(*five, sort="ef up") == [5, 4, 3, 2, 1]
    assert lines(five[0], None, sort="margin down") == [1, 2, 3, 4, 5]
    with pytest.raises(ConfigError, match="no order 'sideways'"):
        browse(*five, sort="sideways")


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", [1, 2, 3, 4, 5]),
        ("   ", [1, 2, 3, 4, 5]),
        ("WH", [1, 2, 3, 4, 5]),
        ("a x", [4]),
        ("cafe\u0301", [2]),
        ("CAFÉ", [2]),
        ("STRASSE", [5]),
        ("w x y", [5]),
        ("Who? a", []),
        ("nothing of the kind", []),
        (".*", []),
        ("\0", [1, 2, 3, 4, 5]),
    ],
)
def test_search_does_not_mind_case_and_accents(five, query, found):
    assert lines(*five, query=query) == found


def test_a_browsed_pair_tells_all_that_is_known(five):
    pair_set, view = five
    pair = browse(pair_set, view, query="where")
    assert (pair.index, pair.count, pair.line) == (0, 1, 3)
    assert pair.prompt == [{"role": "user", "content": "Where?"}]
    assert (pair.chosen, pair.rejected) == ("a b c d", "a b x y")
    assert set(pair.efs) == set(LEXICAL)
    assert pair.efs["rouge1"] == 0.5
    place = pair.line - 1
    assert view.gap[place] == pytest.approx(np.log(2))
    assert pair.reward_margin == view.margin[place] * 10
    assert {browse(pair_set, view, index=n).part for n in range(5)} == {"training", "held out"}
    assert (pair.chosen_rating, pair.rejected_rating, pair.strength) == (None, None, None)
    without = browse(pair_set, None, query="where")
    assert (without.part, without.efs, without.reward_margin) == ("", {}, None)


def test_an_index_beyond_an_end_is_that_end(five):
    assert [browse(*five, index=n).line for n in (-7, 0, 4, 5, 10**9)] == [1, 1, 5, 5, 5]


def test_every_order_is_usable(five):
    for sort in SORTS:
        assert sorted(lines(*five, sort=sort)) == [1, 2, 3, 4, 5]


def test_nasty_texts_go_all_the_way(tmp_path, tiny_model, tokenizer):
    rows = [(f"Ask {n}: {text[:50]}", text, text[::-1]) for n, text in enumerate(NASTY)]
    pair_set = made_of(tmp_path / "nasty.jsonl", [row for row in rows])
    assert len(pair_set) == len(NASTY)
    config = parse_config({"data": {"heldout_fraction": 0}})
    measured(pair_set, "rougeL", config)
    view = gaps(pair_set, config)
    for index, text in enumerate(NASTY):
        pair = browse(pair_set, view, index=index)
        assert (pair.chosen, pair.rejected) == (text, text[::-1])
        assert text_of(diff_html(pair.chosen, pair.rejected)[0]) == text
    assert lines(pair_set, view, query="strasse") == [7]
    assert lines(pair_set, view, query="日本語の") == [4]
    list(measure_lengths(pair_set, str(tiny_model)))
    expected = count_tokens(pair_set.pairs, tokenizer)
    np.testing.assert_array_equal(lengths(pair_set, str(tiny_model)), expected)


# -- what differs --


def text_of(marked: str) -> str:
    """The text of a page that has no tags but ours."""
    plain = marked.replace(MARK, "").replace("</mark>", "")
    assert not re.search("[<>]", plain)
    return html.unescape(plain)


def marked_words(marked: str) -> list[str]:
    return [html.unescape(text) for text in re.findall(f"{MARK}(.*?)</mark>", marked, re.DOTALL)]


def test_words_that_differ_are_marked():
    chosen, rejected = diff_html("The cat sat down.", "The dog sat up, too.")
    assert chosen == f"The {MARK}cat</mark> sat {MARK}down</mark>."
    assert rejected == f"The {MARK}dog</mark> sat {MARK}up, too</mark>."


@pytest.mark.parametrize(
    ("chosen", "rejected", "only_chosen", "only_rejected"),
    [
        ("same", "same", [], []),
        ("", "new words", [], ["new words"]),
        ("a  b", "a\nb", [], []),  # white space is no difference
        ("a x\ny b", "a b", ["x", "y"], []),  # a mark ends with the line
        ("我喜欢猫。", "我喜欢狗。", ["猫"], ["狗"]),
        ("가나다 라마", "가나다 바사", ["라마"], ["바사"]),
        ("Café", "Cafe", ["Café"], ["Cafe"]),
        ("हिन्दी में", "हिन्दी से", ["में"], ["से"]),
        ("hi 👩‍👩‍👧‍👦", "hi 👩‍👧", ["👩‍👩‍👧‍👦"], ["👩‍👧"]),
        ("かが", "かか\u3099", ["が"], ["か\u3099"]),
        ("مرحبا بك", "مرحبا يا", ["بك"], ["يا"]),
        ("f(x)", "f(y)", ["x"], ["y"]),
        ("<b>", "<i>", ["b"], ["i"]),
        ("Yes", "yes", ["Yes"], ["yes"]),
    ],
)
def test_words_of_any_script(chosen, rejected, only_chosen, only_rejected):
    marked = diff_html(chosen, rejected)
    assert [marked_words(side) for side in marked] == [only_chosen, only_rejected]
    assert [text_of(side) for side in marked] == [chosen, rejected]


def test_nothing_in_a_text_becomes_a_tag():
    evil = f'<script>alert("1")</script>{MARK}x</mark>&lt;&amp;\'"'
    for side in diff_html(evil, ""), diff_html(evil, evil), diff_html("", evil):
        assert "<script" not in "".join(side)
        assert "".join(map(text_of, side)) in (evil, evil * 2)


TEXTS = st.text(st.sampled_from("ab <>&\"'\n\t。猫が\u3099\u200d👍🏽é\u0301\0") | st.characters())


@given(TEXTS, TEXTS)
@settings(deadline=None)
def test_without_the_marks_it_is_the_text_again(chosen, rejected):
    marked = diff_html(chosen, rejected)
    assert (text_of(marked[0]), text_of(marked[1])) == (chosen, rejected)


@given(st.lists(st.sampled_from("abcde"), max_size=12), st.lists(st.sampled_from("abcde")))
@settings(deadline=None)
def test_what_is_not_marked_is_a_longest_common_subsequence(chosen, rejected):
    sides = diff_html("\n".join(chosen), "\n".join(rejected))  # no mark reaches over a line
    left = [re.sub(f"{MARK}.*?</mark>", "", side).split() for side in sides]
    assert left[0] == left[1]
    assert len(left[0]) == _longest_common(tuple(chosen), tuple(rejected))


def _longest_common(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    row = [0] * (len(second) + 1)
    for one in first:
        before = row
        row = [0]
        for place, other in enumerate(second):
            same = before[place] + 1 if one == other else 0
            row.append(max(same, before[place + 1], row[-1]))
    return row[-1]


def test_long_texts_do_not_hang():
    numbers = np.random.default_rng(0).integers(0, 3000, (2, 20_000))
    chosen, rejected = (" ".join(f"w{number}" for number in side) for side in numbers)
    start = time.perf_counter()
    marked = diff_html(chosen, f"{rejected} unheard")
    assert time.perf_counter() - start < 1
    assert text_of(marked[0]) == chosen
    assert "unheard" in marked_words(marked[1])[-1]
    few = (" ".join(side.split()[:MOST_ALIGNED_WORDS]) for side in (chosen, rejected))
    aligned = diff_html(*few)
    assert time.perf_counter() - start < 2
    assert len(marked_words(aligned[0])) > len(marked_words(marked[0]))


def test_a_megabyte_of_one_word_does_not_hang():
    start = time.perf_counter()
    for text in ("a" * 1_000_000, "猫" * 1_000_000, "a" + " " * 1_000_000, "<" * 1_000_000):
        assert text_of(diff_html(text, "a b c")[0]) == text
    assert time.perf_counter() - start < 10
