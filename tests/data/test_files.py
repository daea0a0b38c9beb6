"""Files: exact lines, damaged bytes, and containers that are not what their name says."""

from __future__ import annotations

import csv
import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapo_lite.data import files, load_pairs
from gapo_lite.errors import DataError
from gapo_lite.types import LoadedPairs, Problem

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}
GOOD = json.dumps(ROW).encode()
HEADER = b"prompt,chosen,rejected\n"


@pytest.fixture
def load(tmp_path: Path):
    def write_and_load(name: str, data: bytes) -> LoadedPairs:
        path = tmp_path / name
        path.write_bytes(data)
        return load_pairs(path)

    return write_and_load


def lines(loaded: LoadedPairs) -> list[int]:
    return [pair.line for pair in loaded.pairs]


# --- .jsonl -----------------------------------------------------------------------------------


def test_every_bad_line_has_its_number_and_the_others_load(load) -> None:
    bad: dict[int, tuple[bytes, str]] = {
        2: (b'{"prompt": "a", ', "the line is not valid JSON (Expecting property name enclosed"),
        4: (b"[1]", "the row is a list, not an object with columns"),
        5: (b"null", "the row is null, not an object with columns"),
        6: (b'"text"', "the row is text, not an object with columns"),
        7: (GOOD + b" " + GOOD, "the line is not valid JSON (Extra data at character"),
        8: (b'{"prompt": "\xff"}', "the line is not valid UTF-8 (0xff at byte 13)"),
        10: (b"[" * 100_000, "the line is nested too deeply"),
        11: (b'{"n": ' + b"9" * 5000 + b"}", "the line is not usable (a number in it has"),
        12: (b'{"prompt": "a\tb"}', "the line is not valid JSON (Invalid control character"),
        13: (b"{'prompt': 'a'}", "the line is not valid JSON"),
        15: (GOOD[:-2], "the line is not valid JSON (Unterminated string"),
    }
    text = b"".join(
        bad.get(line, (GOOD if line % 3 else b"  ",))[0] + b"\n" for line in range(1, 16)
    )
    loaded = load("x.jsonl", text)
    assert [problem.line for problem in loaded.problems] == list(bad)
    for problem in loaded.problems:
        assert problem.field == ""
        assert problem.reason.startswith(bad[problem.line][1])
    assert lines(loaded) == [1, 14]


def test_bad_columns_are_named_with_their_line(load) -> None:
    rows = [
        ROW,
        ROW | {"chosen": " "},
        {"prompt": "a", "chosen": "b"},
        ROW | {"rejected": "\ud800"},
    ]
    loaded = load("x.jsonl", b"\n\n".join(json.dumps(row).encode() for row in rows))
    assert lines(loaded) == [1]
    assert [(problem.line, problem.field) for problem in loaded.problems] == [
        (3, "chosen"),
        (5, "rejected"),
        (7, "rejected"),
    ]


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + GOOD,
        GOOD + b"\n\xef\xbb\xbf \n" + GOOD + b"\n",
        GOOD + b"\n\t\n" + GOOD + b"\n\n\n",
    ],
)
def test_marks_line_ends_and_blank_lines_do_not_disturb(load, data: bytes) -> None:
    loaded = load("x.jsonl", data)
    assert loaded.problems == []
    assert lines(loaded) == [1, 3]


def test_lines_end_at_newlines_only(load) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    row = json.dumps(ROW | {"chosen": text}, ensure_ascii=False).replace("\x0b", "\\u000b")
    row = row.replace("\x0c", "\\f").replace("\x1c", "\\u001c")
    loaded = load("x.jsonl", row.encode() + b"\n" + GOOD)
    assert lines(loaded) == [1, 2]
    assert loaded.pairs[0].chosen == text


def test_of_equal_keys_the_last_wins_and_nan_is_no_score(load) -> None:
    row = GOOD[:-1] + b', "chosen": "last", "strength": NaN, "chosen_rating": -Infinity}'
    (pair,) = load("x.jsonl", row).pairs
    assert (pair.chosen, pair.strength, pair.chosen_rating) == ("last", None, None)


def test_a_surrogate_pair_is_one_character_and_nul_is_text(load) -> None:
    row = GOOD.replace(b'"b"', rb'"\ud83e\udd99\u0000"')
    assert load("x.jsonl", row).pairs[0].chosen == "🦙\x00"


@settings(deadline=None)
@given(st.text(min_size=1), st.text(min_size=1), st.booleans())
def test_any_text_comes_back_as_it_was_or_is_reported(
    tmp_path_factory: pytest.TempPathFactory, chosen: str, rejected: str, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("any") / "x.jsonl"
    row = {"prompt": "a", "chosen": chosen, "rejected": rejected}
    data = json.dumps(row, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    path.write_bytes(GOOD + b"\n" + data)
    loaded = load_pairs(path)
    if loaded.problems:
        assert not chosen.strip() or not rejected.strip()
    else:
        assert (loaded.pairs[1].chosen, loaded.pairs[1].rejected) == (chosen, rejected)


# --- .json ------------------------------------------------------------------------------------


def test_problems_of_a_json_file_count_records(load) -> None:
    loaded = load("x.json", json.dumps([ROW, 3, ROW | {"chosen": ""}, ROW], indent=2).encode())
    assert lines(loaded) == [1, 4]
    assert loaded.problems == [
        Problem(2, "", "the row is a number, not an object with columns"),
        Problem(3, "chosen", "the response is empty"),
    ]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (GOOD + b"\n" + GOOD, r"not valid JSON \(Extra data at line 2\).*named \.jsonl"),
        (GOOD, r"one object, whose 'prompt' is text, not a list"),
        (b'"text"', "is text, not a list of objects"),
        (b"[", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'[\n"\xff"]', r"not valid UTF-8 \(0xff at line 2\)"),
        (b'{"a": [{}], "b": [{}]}', "an object with 2 lists of objects"),
        (b'{"prompt": {"0": "a"}}', "an object with 0 lists of objects"),
        (b'{"prompt": ["a"], "chosen": [], "rejected": ["a"]}', "differ in length"),
        (b"[]", "holds no rows"),
        (b"[[1], [2]]", "no usable row among 2"),
    ],
)
def test_a_json_file_that_holds_no_rows_says_what_it_is(load, data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)x\.json.*{reason}"):
        load("x.json", data)


# --- .csv -------------------------------------------------------------------------------------


def test_a_record_is_at_its_first_line_however_many_it_has(load) -> None:
    records = b'a,"b\n\nb2",c\n\n"a\r\n",b,c\n"","x\ny",c\na,b,\na,b,"c"\n'
    loaded = load("x.csv", HEADER + records)
    assert lines(loaded) == [2, 6, 11]
    assert loaded.pairs[0].chosen == "b\n\nb2"
    assert loaded.pairs[1].prompt[0]["content"] == "a\r\n"
    assert loaded.problems == [
        Problem(8, "prompt", "the prompt is empty"),
        Problem(10, "rejected", "the response is empty"),
    ]


def test_nothing_in_a_cell_is_magic(load) -> None:
    for word in ("NA", "null", "None", "nan", "1", "TRUE", "[]", "{}", "[1, 2]", '{"a": 1}', "[x"):
        cell = '"' + word.replace('"', '""') + '"'
        loaded = load("x.csv", HEADER + f"a,{cell},c\n".encode())
        assert loaded.pairs[0].chosen == word


def test_big_cells_load_and_the_process_keeps_its_limit(load) -> None:
    limit = csv.field_size_limit(4321)
    try:
        big = "x" * 1_000_000
        assert load("x.csv", HEADER + f"a,{big},c\n".encode()).pairs[0].chosen == big
        assert csv.field_size_limit() == 4321
    finally:
        csv.field_size_limit(limit)


def test_a_mark_and_windows_line_ends_do_not_disturb(load) -> None:
    loaded = load("x.csv", b"\xef\xbb\xbf" + HEADER[:-1] + b"\r\n\r\na,b,c\r\nd,e,f\r\n")
    assert lines(loaded) == [3, 4]
    assert loaded.columns == ["prompt", "chosen", "rejected"]


def test_damaged_records_are_reported_and_the_others_load(load) -> None:
    records = [
        b"a,b,c",
        b"a,b,c,d",
        b"a,b",
        b"a,b,c,,",
        b'a,"b"x,c',
        b"a,\xff,c",
        b"\xff\xfe unused,b,c",
        b'a,"b,c',
        b"a,b,c",
    ]
    loaded = load("x.csv", HEADER + b"\n".join(records))
    assert lines(loaded) == [2, 5]
    assert [(problem.line, problem.field) for problem in loaded.problems] == [
        (3, ""),
        (4, "rejected"),
        (6, ""),
        (7, "chosen"),
        (8, "prompt"),
        (9, ""),
    ]
    assert "4 cells under 3 columns" in loaded.problems[0].reason
    assert "U+DCFF" in loaded.problems[3].reason
    assert "reaches to line 10" in loaded.problems[5].reason


def test_bad_bytes_in_a_column_that_is_not_read_do_no_harm(load) -> None:
    assert lines(load("x.csv", b"id,prompt,chosen,rejected\n\xff,a,b,c\n")) == [2]


def test_messages_in_cells_are_json_and_python_lists_are_refused(load) -> None:
    messages = [{"role": "assistant", "content": 'it\'s "b"'}]
    cell = '"' + json.dumps(messages).replace('"', '""') + '"'
    python = '"' + str(messages).replace('"', '""') + '"'
    loaded = load("x.csv", HEADER + f"a,{cell},c\na,{python},c\n".encode())
    assert [pair.chosen for pair in loaded.pairs] == ['it\'s "b"']
    assert [(problem.line, problem.field) for problem in loaded.problems] == [(3, "chosen")]
    assert "as Python prints them" in loaded.problems[0].reason


def test_score_lists_in_cells_are_json(load) -> None:
    header = b"prompt,chosen,rejected,all_generated_responses,all_rm_scores\n"
    (pair,) = load("x.csv", header + b'a,b,c,"[""c"", ""b""]","[1, 2]"\n').pairs
    assert (pair.chosen_rating, pair.rejected_rating) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (HEADER, "holds no rows"),
        (b"\n\n", "holds no rows"),
        (b"prompt,chosen,chosen,rejected\na,b,c,d\n", "more than one column 'chosen'"),
        (b'"prompt,chosen\na,b\n', "no usable header row: line 1"),
        (
            b"prompt;chosen;rejected\na;b;c\n",
            "no column 'chosen' and 'rejected'.*'prompt;chosen;rejected'",
        ),
    ],
)
def test_a_csv_file_without_usable_columns_says_so(load, data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=rf"x\.csv.*{reason}"):
        load("x.csv", data)


# --- .parquet ---------------------------------------------------------------------------------


def test_problems_of_a_parquet_file_count_records(tmp_path: Path) -> None:
    rows = [ROW] * 1500 + [ROW | {"chosen": None}] + [ROW]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    loaded = load_pairs(tmp_path / "x.parquet")
    assert len(loaded.pairs) == 1501
    assert loaded.pairs[-1].line == 1502
    assert loaded.problems == [Problem(1501, "chosen", "is null")]


def test_text_in_parquet_that_is_no_utf8_costs_its_row_only(tmp_path: Path) -> None:
    raw = pyarrow.array([b"b", b"\xff", b"d"])
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    plain = pyarrow.array(["x", "y", "z"])
    table = pyarrow.table({"prompt": plain, "chosen": broken, "rejected": plain})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    loaded = load_pairs(tmp_path / "x.parquet")
    assert lines(loaded) == [1, 3]
    assert loaded.problems == [Problem(2, "", "the row is not valid UTF-8")]


def test_columns_that_are_not_read_are_named_but_not_decoded(tmp_path: Path) -> None:
    raw = pyarrow.array([b"\xff"])
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 1, raw.buffers())
    columns = {name: pyarrow.array([name]) for name in ROW} | {"image": broken}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    loaded = load_pairs(tmp_path / "x.parquet")
    assert lines(loaded) == [1]
    assert loaded.columns == ["prompt", "chosen", "rejected", "image"]


def test_parquet_without_a_known_column_names_those_it_has(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column 'chosen' and 'rejected'.*found: 'text'"):
        load_pairs(tmp_path / "x.parquet")


@pytest.mark.parametrize("data", [b"PAR1", b"no parquet at all", b"PAR1" + b"\x00" * 50 + b"PAR1"])
def test_damaged_parquet_is_an_error(load, data: bytes) -> None:
    with pytest.raises(DataError, match=r"x\.parquet.*as Parquet"):
        load("x.parquet", data)
    with pytest.raises(DataError, match=r"x\.parquet\.gz.*as Parquet"):
        load("x.parquet.gz", gzip.compress(data))


def test_parquet_damaged_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    rows = [ROW | {"chosen": f"{n} {os.urandom(8).hex()}"} for n in range(2000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    data = bytearray(path.read_bytes())
    data[200 : len(data) // 2] = b"\xff" * (len(data) // 2 - 200)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.parquet.*as Parquet"):
        load_pairs(path)


# --- Any file ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.json", "x.csv", "x.tsv", "x.parquet", "x.jsonl.gz", "x.csv.gz"]
)
def test_an_empty_file_is_an_error(load, name: str) -> None:
    with pytest.raises(DataError, match=r"is empty"):
        load(name, b"")
    if name.endswith(".gz"):
        with pytest.raises(DataError, match=r"is empty"):
            load(name, gzip.compress(b""))


def test_a_file_of_blank_lines_is_an_error(load) -> None:
    with pytest.raises(DataError, match=r"holds no rows"):
        load("x.jsonl", b"\n \r\n\xef\xbb\xbf\n")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz", "x.csv.gz", "x.parquet.gz"])
def test_damaged_gzip_is_an_error(load, name: str) -> None:
    rows = [{"prompt": os.urandom(40).hex(), "chosen": "b", "rejected": "c"} for _ in range(3000)]
    data = gzip.compress(b"\n".join(json.dumps(row).encode() for row in rows))
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    for damaged in (data[: len(data) // 2], data[:-4], bytes(flipped), b"no gzip", b"\x1f\x8b"):
        with pytest.raises(DataError, match=rf"{name}.*gzip file"):
            load(name, damaged)


# --- More than fits into memory -----------------------------------------------------------------


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 1000)
    monkeypatch.setattr(files, "MAX_RECORD", 1_000_000)
    monkeypatch.setattr(files, "MAX_UNPACKED", 3_000_000)


def refused_within(path: Path, reason: str, memory: int) -> None:
    """Loading fails for this reason before it has used so many bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"{path.name}.*{reason}"):
            load_pairs(path)
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()


BOMB = b"x" * 50_000_000
NO_LINES = r"holds more than 1,000,000 bytes.*Save its rows as \.jsonl"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("x.jsonl", BOMB, "more than 1,000,000 bytes at line 1,"),
        ("x.jsonl", GOOD + b"\n\n{\n" + BOMB, "more than 1,000,000 bytes at line 4,"),
        ("x.csv", BOMB, "more than 1,000,000 bytes at line 1,"),
        ("x.csv", HEADER + b'a,"b\n",c\n\na,' + BOMB, "more than 1,000,000 bytes at line 5,"),
        ("x.csv", HEADER + b'"\n' + b"x\n" * 25_000_000, "more than 1,000,000 bytes at line 2,"),
        ("x.tsv", b'"x\n"\t' * 10_000_000, "more than 1,000,000 bytes at line 1,"),
        ("x.json", b'["' + BOMB, NO_LINES),
        ("x.parquet", b"PAR1" + BOMB + b"PAR1", "1,000,000 bytes.*unpack it"),
    ],
)
def test_a_record_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, small_limits: None, name: str, data: bytes, reason: str
) -> None:
    zipped = tmp_path / f"{name}.gz"
    zipped.write_bytes(gzip.compress(data, 1))
    assert zipped.stat().st_size < 500_000
    refused_within(zipped, reason, 20_000_000)
    if name != "x.parquet":  # which is not read whole
        (tmp_path / name).write_bytes(data)
        refused_within(tmp_path / name, reason, 20_000_000)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz"])
def test_short_lines_without_end_are_refused_too(
    tmp_path: Path, small_limits: None, name: str
) -> None:
    (tmp_path / name).write_bytes(gzip.compress(HEADER + b"\n" * 50_000_000, 1))
    refused_within(tmp_path / name, "unpacks to more than 3,000,000 bytes", 5_000_000)


def test_gzip_members_count_together(load, small_limits: None) -> None:
    member = gzip.compress((GOOD + b"\n") * 1000 + b" " * 900_000 + b"\n")
    assert lines(load("x.jsonl.gz", member * 3))[-1] == 3002
    with pytest.raises(DataError, match=r"x\.jsonl\.gz.*unpacks to more than 3,000,000 bytes"):
        load("x.jsonl.gz", member * 4)


def test_what_is_not_zipped_may_be_as_long_as_the_disk_has_it(load, small_limits: None) -> None:
    assert len(load("x.jsonl", (GOOD + b"\n") * 80_000).pairs) == 80_000


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_lines_keep_their_numbers_and_texts_below_the_limits(
    load, small_limits: None, ending: str
) -> None:
    pack = gzip.compress if ending else bytes
    long = json.dumps(ROW | {"chosen": "é" * 150_000}).encode()  # 900,000 bytes
    loaded = load(f"x.jsonl{ending}", pack(b"\n\n".join([long, b"{", long, GOOD])))
    assert lines(loaded) == [1, 5, 7]
    assert loaded.pairs[1].chosen == "é" * 150_000
    assert [problem.line for problem in loaded.problems] == [3]
    cell = b'"' + b"b\n" * 400_000 + b'"'
    records = b"a," + cell + b",c\n\na,,c\na," + cell + b",c\n"
    loaded = load(f"x.csv{ending}", pack(HEADER + records))
    assert lines(loaded) == [2, 400_005]
    assert loaded.pairs[1].chosen == "b\n" * 400_000
    assert [problem.line for problem in loaded.problems] == [400_004]
    assert lines(load(f"x.json{ending}", pack(json.dumps([ROW] * 15_000).encode())))[-1] == 15_000


def test_parquet_is_refused_for_what_its_read_columns_declare(
    tmp_path: Path, small_limits: None
) -> None:
    path = tmp_path / "x.parquet"
    texts = [f"{n}" + "x" * 1000 for n in range(4000)]
    rows = {name: ["a"] * 4000 for name in ROW}
    pyarrow.parquet.write_table(pyarrow.table(rows | {"image": texts}), path, compression="zstd")
    assert len(load_pairs(path).pairs) == 4000
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    for chosen in (texts, messages):
        table = pyarrow.table(rows | {"chosen": chosen})
        pyarrow.parquet.write_table(table, path, row_group_size=500, compression="zstd")
        with pytest.raises(DataError, match=r"x\.parquet.*unpacks to more than 3,000,000 bytes"):
            load_pairs(path)


# --- Any file, again ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_utf16_is_named(load, name: str) -> None:
    with pytest.raises(DataError, match="UTF-16"):
        load(name, GOOD.decode().encode("utf-16"))


@pytest.mark.parametrize(
    "name", ["x.txt", "x", "x.gz", "jsonl", "x.jsonl.bz2", "x.arrow", ".jsonl"]
)
def test_a_file_of_an_unknown_kind_is_an_error(load, name: str) -> None:
    with pytest.raises(DataError, match=r"no file of a kind.*\.jsonl, \.json, \.csv"):
        load(name, GOOD)


def test_a_file_that_is_not_there_is_told_of_so(tmp_path: Path) -> None:
    for name in ("answers.jsonl", "answers.txt", "a" * 300 + ".jsonl"):
        missing = pytest.raises(DataError, match=rf"^there is no file \S*/{name}\.$")
        with missing, files.open_table(tmp_path / name):
            pass


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="no file of a kind"):
        load_pairs(tmp_path / "x.jsonl")


def test_a_set_without_a_usable_row_shows_the_first_three(load) -> None:
    data = b"\n".join([b"{", GOOD.replace(b'"b"', b'""'), b"3", b"4", b"5"])
    with pytest.raises(DataError) as caught:
        load("x.jsonl", data)
    message = str(caught.value)
    assert "no usable row among 5" in message
    assert "x.jsonl:1: the line is not valid JSON" in message
    assert "x.jsonl:2: chosen: the response is empty" in message
    assert "x.jsonl:3: the row is a number" in message
    assert "x.jsonl:4" not in message
    assert "… and 2 more" in message


@pytest.mark.parametrize(
    ("columns", "missing"),
    [
        (["prompt", "response", "rejected"], "'chosen'"),
        (["prompt", "chosen", "answer"], "'rejected'"),
        (["prompt", "answer", "other"], "'chosen' and 'rejected'"),
        (["question", "chosen", "rejected"], "'prompt'"),
    ],
)
def test_a_column_missing_everywhere_is_named_with_those_found(
    load, columns: list[str], missing: str
) -> None:
    rows = [json.dumps(dict.fromkeys(columns, "a")).encode()] * 2
    with pytest.raises(DataError) as caught:
        load("x.jsonl", b"{\n" + b"\n".join(rows))
    message = str(caught.value)
    assert f"no column {missing}" in message
    assert f"Columns found: {', '.join(map(repr, columns))}." in message
    assert "prompt, chosen, rejected: texts" in message
    assert "Human:" in message
