"""Every shape in every container gives the same pairs."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gapo_lite.data import load_pairs
from gapo_lite.data.formats import FORMATS
from gapo_lite.errors import DataError
from gapo_lite.types import PreferencePair

ODD = 'naïve “quotes”, 你好 🦙 e\u0301\u2028, tab\t, "quoted", two\r\nlines\nand \x00 NA'
"""Line separators that are none, a NUL, a comma, quotes, composed and astral characters."""


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


TALK = [system("Be kind."), user("Hi"), assistant("Hello"), user(f"{ODD} why?")]
GOOD, BAD = f"Because {ODD} so", f"No, {ODD}."

SHAPES: dict[str, tuple[dict, list[dict]]] = {
    "strings": (
        {"prompt": f" {ODD} \n", "chosen": GOOD, "rejected": BAD, "system": "Be kind."},
        [system("Be kind."), user(f" {ODD} \n")],
    ),
    "text_prompt": (
        {
            "prompt": ODD,
            "chosen": [user(ODD), assistant(GOOD)],
            "rejected": [user(ODD), assistant(BAD)],
        },
        [user(ODD)],
    ),
    "message_prompt": ({"prompt": TALK, "chosen": GOOD, "rejected": BAD}, TALK),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                human("Hi"),
                gpt("Hello"),
                human(f"{ODD} why?"),
            ],
            "chosen": gpt(GOOD),
            "rejected": gpt(BAD),
        },
        TALK,
    ),
    "messages": (
        {"chosen": [*TALK, assistant(GOOD)], "rejected": [*TALK, assistant(BAD)]},
        TALK,
    ),
    "anthropic_hh": (
        {
            "chosen": f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {ODD}\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {ODD}\n\nAssistant: {BAD}",
        },
        [user("Hi"), assistant("Hello"), user(ODD)],
    ),
}


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_columns(path: Path, rows: list[dict]) -> Path:
    return write_json(path, {column: [row[column] for row in rows] for column in rows[0]})


def write_cells(path: Path, rows: list[dict], delimiter: str) -> Path:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(
            value if isinstance(value, str) else json.dumps(value) for value in row.values()
        )
    path.write_bytes(text.getvalue().encode())
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def save_dataset(path: Path, rows: list[dict]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).with_format("numpy").save_to_disk(path)
    return path


def save_splits(path: Path, rows: list[dict]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(test=data.select([0]), train=data).save_to_disk(path)
    return path


def zipped(path: Path) -> Path:
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return target


CONTAINERS: dict[str, Callable[[Path, list[dict]], Path]] = {
    "jsonl": lambda folder, rows: write_jsonl(folder / "x.jsonl", rows),
    "jsonl.gz": lambda folder, rows: zipped(write_jsonl(folder / "x.jsonl", rows)),
    "JSONL.GZ": lambda folder, rows: zipped(write_jsonl(folder / "x.JSONL", rows)),
    "json list": lambda folder, rows: write_json(folder / "x.json", rows),
    "json object": lambda folder, rows: write_json(
        folder / "x.json", {"version": 1, "data": rows, "tags": ["a"]}
    ),
    "json columns": lambda folder, rows: write_columns(folder / "x.json", rows),
    "json.gz": lambda folder, rows: zipped(write_json(folder / "x.json", rows)),
    "csv": lambda folder, rows: write_cells(folder / "x.csv", rows, ","),
    "csv.gz": lambda folder, rows: zipped(write_cells(folder / "x.csv", rows, ",")),
    "tsv": lambda folder, rows: write_cells(folder / "x.tsv", rows, "\t"),
    "parquet": lambda folder, rows: write_parquet(folder / "x.parquet", rows),
    "parquet.gz": lambda folder, rows: zipped(write_parquet(folder / "x.parquet", rows)),
    "Dataset folder": lambda folder, rows: save_dataset(folder / "x", rows),
    "DatasetDict folder": lambda folder, rows: save_splits(folder / "x", rows),
}


def test_every_shape_is_tried() -> None:
    assert list(SHAPES) == list(FORMATS)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_loads_from_every_container(shape: str, container: str, tmp_path: Path) -> None:
    row, prompt = SHAPES[shape]
    rows = [row | {"id": 1, "strength": 0.25}, row | {"id": 2, "strength": 0.5}]
    path = CONTAINERS[container](tmp_path, rows)
    loaded = load_pairs(path)
    assert loaded.problems == []
    assert loaded.shape == shape
    assert sorted(loaded.columns) == sorted(rows[0])
    assert (loaded.num_duplicates, loaded.num_equal) == (1, 0)
    lines = [pair.line for pair in loaded.pairs]
    if path.name.startswith(("x.csv", "x.tsv")):
        texts = [value for value in row.values() if isinstance(value, str)]
        assert lines == [2, 3 + sum(text.count("\n") for text in texts)]
    else:
        assert lines == [1, 2]
    assert [pair.strength for pair in loaded.pairs] == [0.25, 0.5]
    for pair in loaded.pairs:
        assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, GOOD, BAD)


def test_a_file_may_mix_shapes_and_the_most_frequent_one_is_named(tmp_path: Path) -> None:
    rows = [SHAPES["anthropic_hh"][0], *[row for row, _ in SHAPES.values()]]
    loaded = load_pairs(write_jsonl(tmp_path / "mixed.jsonl", rows))
    assert [pair.line for pair in loaded.pairs] == [1, 2, 3, 4, 5, 6, 7]
    assert loaded.shape == "anthropic_hh"
    assert loaded.columns == ["chosen", "rejected", "prompt", "system", "conversations"]


def test_duplicates_and_equal_texts_are_counted_and_kept(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [row, row, row | {"prompt": "a "}, row | {"rejected": "b"}, row | {"strength": 1}]
    loaded = load_pairs(write_jsonl(tmp_path / "x.jsonl", rows))
    assert len(loaded.pairs) == 5
    assert (loaded.num_duplicates, loaded.num_equal) == (2, 1)


def test_the_source_is_the_name_that_was_given(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [SHAPES["strings"][0]])
    assert load_pairs(path).source == load_pairs(str(path)).source == str(path)


def test_a_split_is_chosen_by_name_where_there_are_several(tmp_path: Path) -> None:
    rows = [SHAPES["strings"][0] | {"id": number} for number in range(3)]
    folder = save_splits(tmp_path / "x", rows)
    assert len(load_pairs(folder).pairs) == 3
    assert len(load_pairs(folder, split="test").pairs) == 1
    with pytest.raises(DataError, match=r"no split 'validation'.*'test', 'train'"):
        load_pairs(folder, split="validation")


def test_what_has_no_splits_is_taken_whole(tmp_path: Path) -> None:
    rows = [SHAPES["strings"][0]]
    assert load_pairs(write_jsonl(tmp_path / "x.jsonl", rows), split="test").pairs
    assert load_pairs(save_dataset(tmp_path / "x", rows), split="test").pairs


def test_real_pairs_load_unchanged(real_rows: list[dict], tmp_path: Path) -> None:
    loaded = load_pairs(zipped(write_jsonl(tmp_path / "real.jsonl", real_rows)))
    assert loaded.problems == []
    assert loaded.pairs == [
        PreferencePair(
            prompt=[user(row["prompt"])],
            chosen=row["chosen"],
            rejected=row["rejected"],
            line=line,
            strength=row["strength"],
        )
        for line, row in enumerate(real_rows, start=1)
    ]
    assert loaded.num_equal == sum(row["chosen"] == row["rejected"] for row in real_rows)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, gapo_lite.data;"
        "print([m for m in ('torch', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_text_files_load_without_datasets_and_pyarrow(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [SHAPES["strings"][0]])
    code = (
        f"import sys; from gapo_lite.data import load_pairs; load_pairs({str(path)!r});"
        "print([m for m in ('torch', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
