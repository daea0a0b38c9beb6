"""Which source a name means; no name reaches a builder, an address or a script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from gapo_lite.data import load_pairs
from gapo_lite.embedded import EMBEDDED_DATA
from gapo_lite.errors import DataError

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}
LINE = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.fixture
def hub_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[tuple, dict]]:
    """What load_dataset was called with; it answers with two rows. Runs in an empty folder."""
    calls: list[tuple[tuple, dict]] = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        calls.append((args, options))
        return datasets.Dataset.from_list([ROW, ROW | {"chosen": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize(
    "name", ["owner/name", "princeton-nlp/llama3-ultrafeedback-armorm", "a_1/b.c"]
)
def test_owner_and_name_is_a_hub_id(hub_calls: list, name: str) -> None:
    loaded = load_pairs(name, split="train_prefs")
    assert hub_calls == [((name,), {"split": "train_prefs", "trust_remote_code": False})]
    assert loaded.source == name
    assert [pair.line for pair in loaded.pairs] == [1]
    assert [(problem.line, problem.field) for problem in loaded.problems] == [(2, "chosen")]


@pytest.mark.parametrize(
    "name",
    [
        "json", "csv", "parquet", "text", "arrow", "a", "", " ", ".", "..", "/", "./a", "../x",
        "a/..", "a/../b", "/owner/name", "owner/name/", "owner//name", "owner/name/extra",
        "owner/name@main", "n" * 5000,
        "owner/name\n", "\nowner/name", "owner /name", "öwner/name", "owner/na me", "-owner/name",
        "owner/.name", "owner/name-", "owner/na--me", "owner/na..me", "owner/" + "n" * 97,
        "http://example.org/x.jsonl", "https://example.org/owner/name", "hf://datasets/owner/name",
        "hf://owner/name", "s3://bucket/x.jsonl", "file:///etc/passwd", "zip://x.jsonl::y.zip",
        "buckets/name", "owner/name.py", "owner/name.git", "data/train.jsonl", "data/train.csv.gz",
        "data/train.PARQUET", "a\x00b", "owner/\x00name", "~nobody/name", "\\\\host\\share",
        "C:\\x\\y", "owner\\name", "embedded", "datasets:json",
    ],
)  # fmt: skip
def test_no_other_name_reaches_the_hub(hub_calls: list, name: str) -> None:
    with pytest.raises(DataError):
        load_pairs(name)
    assert hub_calls == []


def test_a_path_never_reaches_the_hub(hub_calls: list) -> None:
    with pytest.raises(DataError, match="neither a file or folder"):
        load_pairs(Path("owner/name"))
    assert hub_calls == []


def test_what_lies_on_the_disk_goes_before_the_hub(hub_calls: list, tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([ROW] * 3).save_to_disk(tmp_path / "owner" / "name")
    assert len(load_pairs("owner/name").pairs) == 3
    (tmp_path / "owner" / "other").mkdir()
    with pytest.raises(DataError, match="'owner/other' is a folder"):
        load_pairs("owner/other")
    assert hub_calls == []


def test_a_file_named_like_a_builder_is_a_file(hub_calls: list, tmp_path: Path) -> None:
    (tmp_path / "json").write_text(LINE)
    with pytest.raises(DataError, match="no file of a kind"):
        load_pairs("json")
    (tmp_path / "json").rename(tmp_path / "json.jsonl")
    assert len(load_pairs("json.jsonl").pairs) == 1
    assert hub_calls == []


def test_without_a_network_the_hub_is_an_error() -> None:
    with pytest.raises(
        DataError, match=r"'no-such-owner/no-such-name' is not a file.*offline|Offline"
    ):
        load_pairs("no-such-owner/no-such-name")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub"),
            "exist",
        ),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' is a gated dataset"), "gated"),
        (ValueError("Unknown split \"train\". Should be one of\n['test']."), r"one of \['test'\]"),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts"),
        (ConnectionError("Couldn't reach 'o/n' on the Hub"), "reach"),
    ],
)
def test_what_the_hub_says_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def load_dataset(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=rf"'o/n'.*'train'.*{said}.*hf auth login.*without a network"
    ):
        load_pairs("o/n")


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(LINE)
    with pytest.raises(DataError, match=r"Did you mean '.*train\.jsonl'\?"):
        load_pairs(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"nothing to load\. Name a file \(\.jsonl"):
        load_pairs(tmp_path / "no-folder" / "trian.jsonl")


def test_an_address_says_to_download() -> None:
    with pytest.raises(DataError, match=r"is an address.*Download"):
        load_pairs("https://example.org/x.jsonl")


def test_a_folder_that_is_no_dataset_names_a_file_in_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder, but none that save_to_disk wrote\. Name a"):
        load_pairs(tmp_path)
    (tmp_path / "part.jsonl").write_text(LINE)
    with pytest.raises(DataError, match=r"such as '.*part\.jsonl'"):
        load_pairs(tmp_path)


def test_a_damaged_dataset_folder_is_an_error(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([ROW]).save_to_disk(tmp_path / "x")
    (tmp_path / "x" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"x' can't be loaded as a `datasets` folder"):
        load_pairs(tmp_path / "x")


def test_a_dataset_folder_without_rows_is_an_error(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}).save_to_disk(
        tmp_path / "x"
    )
    with pytest.raises(DataError, match="x' can't be loaded as a `datasets` folder"):
        load_pairs(tmp_path / "x")


def test_a_home_folder_may_be_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.jsonl").write_text(LINE)
    assert len(load_pairs("~/x.jsonl").pairs) == 1


def test_an_embedded_set_goes_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(LINE)
    monkeypatch.setitem(EMBEDDED_DATA, "embedded:everyday", tmp_path / "x.jsonl")
    loaded = load_pairs("embedded:everyday")
    assert len(loaded.pairs) == 1
    assert loaded.source == "embedded:everyday"
    with pytest.raises(DataError, match="embedded:everyday"):
        load_pairs("embedded:evryday")
