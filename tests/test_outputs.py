"""Files and folders that are whole or not there."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from gapo_lite.errors import RunError
from gapo_lite.outputs import SCORE_FILES, check_out, whole_file, whole_folder

FULL = OSError(28, "No space left on device")


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_file_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "out.txt"
    with whole_file(out) as part:
        part.write_text("half")
        assert not out.exists()
        part.write_text("whole")
    assert out.read_text() == "whole"
    assert names(tmp_path) == ["out.txt"]


def fail_halfway(out, trouble):
    with whole_file(out) as part:
        part.write_text("half")
        raise trouble


@pytest.mark.parametrize("trouble", [FULL, KeyboardInterrupt(), ZeroDivisionError()])
def test_a_file_is_as_it_was_when_writing_fails(tmp_path, trouble):
    out = tmp_path / "out.txt"
    out.write_text("before")
    expected = RunError if trouble is FULL else type(trouble)
    with pytest.raises(expected):
        fail_halfway(out, trouble)
    assert out.read_text() == "before"
    assert names(tmp_path) == ["out.txt"]


def test_a_disk_that_is_full_at_the_last_moment_is_explained(tmp_path, monkeypatch):
    def full(descriptor):
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(RunError, match=r"cannot write .*out.txt: No space left on device"),
        whole_file(tmp_path / "out.txt") as part,
    ):
        part.write_text("whole")
    assert names(tmp_path) == []


def test_a_folder_appears_when_it_is_complete_and_may_replace_an_empty_one(tmp_path):
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)
    with whole_folder(out) as part:
        (part / "a").write_text("a")
        assert names(out) == []
    assert names(out) == ["a"]
    assert names(out.parent) == ["out"]


def test_folders_made_for_an_output_that_failed_are_removed(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(RunError), whole_folder(tmp_path / "old" / "new" / "out"):
        raise FULL
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["old"]


@pytest.mark.parametrize(
    ("name", "source", "suffixes", "says"),
    [
        ("folder", "", (), "is a folder"),
        ("missing/out.csv", "", (), "there is no folder"),
        ("data.csv", "data.csv", (), "would be overwritten"),
        ("out.txt", "", SCORE_FILES, r"must end with \.jsonl, \.csv, \.npy"),
    ],
)
def test_an_output_that_cannot_be_is_refused_beforehand(tmp_path, name, source, suffixes, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "data.csv").write_text("x")
    with pytest.raises(RunError, match=says):
        check_out(tmp_path / name, tmp_path / source if source else "", suffixes)


def test_an_output_beside_its_source_is_fine(tmp_path):
    (tmp_path / "data.jsonl").write_text("x")
    check_out(tmp_path / "out.csv", tmp_path / "data.jsonl", SCORE_FILES)
    check_out(tmp_path / "out.csv", "owner/name")


def test_each_format_keeps_scores_to_the_last_bit(tmp_path):
    lines, scores = [1, 4], np.array([1 / 3, 0.1 + 0.2])
    for suffix, write in SCORE_FILES.items():
        write(tmp_path / f"s{suffix}", lines, scores)
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert rows == [{"line": 1, "ef": 1 / 3}, {"line": 4, "ef": 0.1 + 0.2}]
    header, *records = (tmp_path / "s.csv").read_text().splitlines()
    assert header == "line,ef"
    assert [float(record.split(",")[1]) for record in records] == scores.tolist()
    assert np.array_equal(np.load(tmp_path / "s.npy"), scores)
