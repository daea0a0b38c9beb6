"""Kept scores: found again, never trusted when damaged, and never in the way."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from gapo_lite.ef import cache, score_pairs
from gapo_lite.ef.cache import cache_path, cached_scores
from gapo_lite.errors import ConfigError, DataError

CHOSEN = ["the cat sat", "yes", "\ud800 odd", ""]
REJECTED = ["the cat ran", "no", "odd", "x"]
EXPECTED = score_pairs(CHOSEN, REJECTED)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("GAPO_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ef"


@pytest.fixture
def times_scored(monkeypatch) -> list[str]:
    """Grows by one whenever scores are really computed."""
    calls: list[str] = []

    def counting(chosen, rejected, ef, **options):
        calls.append(ef)
        return score_pairs(chosen, rejected, ef, **options)

    monkeypatch.setattr(cache, "score_pairs", counting)
    return calls


def scores() -> np.ndarray:
    return cached_scores(CHOSEN, REJECTED, "rougeL", {})


def path_of_scores() -> Path:
    return cache_path(CHOSEN, REJECTED, "rougeL", {})


def test_scores_are_computed_once_and_then_found(times_scored, folder):
    for _ in range(3):
        np.testing.assert_array_equal(scores(), EXPECTED)
    assert times_scored == ["rougeL"]
    assert list(folder.iterdir()) == [path_of_scores()]


def test_found_scores_may_be_changed_by_their_user():
    scores()[0] = 0.5
    found = scores()
    found[0] = 0.5
    np.testing.assert_array_equal(scores(), EXPECTED)


def test_numpy_can_read_the_file():
    scores()
    np.testing.assert_array_equal(np.load(path_of_scores()), EXPECTED)


def test_no_pairs_are_kept_too(times_scored):
    for _ in range(2):
        assert cached_scores([], [], "rouge1", {}).shape == (0,)
    assert times_scored == ["rouge1"]


def test_every_change_of_texts_or_settings_has_a_file_of_its_own():
    paths = [
        cache_path(*arguments)
        for arguments in [
            (["ab", "c"], ["d", "e"], "rougeL", {}),
            (["a", "bc"], ["d", "e"], "rougeL", {}),
            (["ab", "cd"], ["", "e"], "rougeL", {}),
            (["d", "e"], ["ab", "c"], "rougeL", {}),
            (["c", "ab"], ["e", "d"], "rougeL", {}),
            (["ab"], ["d"], "rougeL", {}),
            ([], [], "rougeL", {}),
            (["ab", "c"], ["d", "e"], "rouge1", {}),
            (["ab", "c"], ["d", "e"], "rougeL", {"use_stemmer": True}),
            (["ab", "c"], ["d", "e"], "rougeL", {"tokenizer": "unicode"}),
            (["ab", "c"], ["d", "e"], "rougeL", {"tokenizer": "unicode", "use_stemmer": True}),
            (["ab", "c"], ["d", "e"], "bertscore_p", {}),
            (["ab", "c"], ["d", "e"], "bertscore_p", {"layer": 3}),
            (["ab", "c"], ["d", "e"], "bertscore_p", {"batch_size": 3}),
            (["ab", "c"], ["d", "e"], "bertscore_p", {"model": "embedded:all-minilm-l6-v2"}),
            (["\ud800"], ["d"], "rougeL", {}),
            (["\udfff"], ["d"], "rougeL", {}),
            (["?"], ["d"], "rougeL", {}),
        ]
    ]
    assert len(set(paths)) == len(paths)


def test_settings_that_leave_the_scores_alone_do_not_change_the_file():
    pair = ["a"], ["b"]
    assert cache_path(*pair, "rougeL", {}) == cache_path(*pair, "rougeL", {"use_stemmer": False})
    assert cache_path(*pair, "rougeL", {}) == cache_path(*pair, "rougeL", {"tokenizer": "rouge"})
    plain = cache_path(*pair, "bertscore_p", {})
    assert plain == cache_path(*pair, "bertscore_p", {"batch_size": 64, "device": "cpu"})


@pytest.mark.parametrize(
    ("ef", "options", "name"),
    [
        ("rougeL", {}, "40557563fc55767cfc4a8fd64b5d6e362d2a52484a3cf3bdc0b77c242d8b7a34"),
        (
            "jaccard",
            {"use_stemmer": True},
            "6d3d0651ff5d8059d8f9db0a01c0f50a5ca49596145f1307c2d44a50f0462e3b",
        ),
    ],
)
def test_scores_kept_before_there_was_a_tokenizer_are_still_found(ef, options, name):
    options = {"tokenizer": "rouge", **options}
    assert cache_path(["a b", "é"], ["a c", "e"], ef, options).stem == name


def test_another_state_of_a_local_model_has_another_file(tmp_path):
    pair = ["a"], ["b"]
    options = {"model": str(tmp_path), "layer": 1}
    (tmp_path / "model.safetensors").write_bytes(b"old")
    before = cache_path(*pair, "bertscore_p", options)
    assert before == cache_path(*pair, "bertscore_p", options)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert cache_path(*pair, "bertscore_p", options) != before


def test_another_format_version_has_another_file(monkeypatch):
    before = path_of_scores()
    monkeypatch.setattr(cache, "FORMAT_VERSION", cache.FORMAT_VERSION + 1)
    assert path_of_scores() != before


def flip_a_bit(content: bytes) -> bytes:
    place = len(content) - 40  # in the last score
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"not scores at all",
        lambda content: content[:-1],
        lambda content: content[:60],
        lambda content: content + b"\x00",
        lambda content: b"\x00" * len(content),
        flip_a_bit,
        lambda content: content.replace(b"(4,)", b"(2,)"),
        lambda content: cache._pack(np.ones(3)),
        lambda content: cache._pack(np.ones((4, 1))),
        lambda content: cache._pack(np.ones(4, np.float32)),
    ],
)
def test_a_damaged_file_is_computed_again_and_mended(damage, times_scored, caplog):
    scores()
    path = path_of_scores()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    np.testing.assert_array_equal(scores(), EXPECTED)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "damaged" in caplog.text
    assert times_scored == ["rougeL"] * 2
    assert path.read_bytes() == whole


def test_a_folder_in_the_place_of_the_file_costs_a_warning_only(caplog):
    path_of_scores().mkdir(parents=True)
    np.testing.assert_array_equal(scores(), EXPECTED)
    assert "cannot be read" in caplog.text
    assert "cannot be kept" in caplog.text


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GAPO_LITE_CACHE", str(tmp_path / "file"))
    np.testing.assert_array_equal(scores(), EXPECTED)
    assert "GAPO_LITE_CACHE" in caplog.text


def test_a_full_disk_costs_a_warning_only_and_leaves_nothing(monkeypatch, caplog, folder):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    np.testing.assert_array_equal(scores(), EXPECTED)
    assert "No space left" in caplog.text
    assert list(folder.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(monkeypatch, folder):
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        scores()
    assert list(folder.iterdir()) == []


def test_progress_ends_at_the_total_whether_computed_or_found():
    for _ in range(2):
        calls: list[tuple[int, int]] = []
        cached_scores(CHOSEN, REJECTED, "rouge2", {}, lambda *call, calls=calls: calls.append(call))
        assert calls == [(4, 4)]


def test_what_score_pairs_refuses_is_refused_before_anything_is_written(folder):
    with pytest.raises(ConfigError):
        cached_scores(["a"], ["b"], "rougel", {})
    with pytest.raises(ConfigError):
        cached_scores(["a"], ["b"], "rougeL", {"use_stemer": True})
    with pytest.raises(DataError, match="index 1"):
        cached_scores(["a"], ["b", "c"], "rougeL", {})
    with pytest.raises(DataError, match=r"chosen\[0\]"):
        cached_scores([None], ["b"], "rougeL", {})
    assert not folder.exists()
