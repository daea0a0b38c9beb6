"""What a browser may name, and what becomes of an upload."""

from __future__ import annotations

import errno
import gzip
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import places
from app.places import MAX_FILES, Places, clean_name
from gapo_lite.config import parse_config
from gapo_lite.data import load_pairs, sources
from gapo_lite.embedded import EMBEDDED_DATA, EMBEDDED_MODELS
from gapo_lite.errors import ConfigError, DataError, ModelError, RunError

PAIR = b'{"prompt": "Hi", "chosen": "yes", "rejected": "no"}\n'


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The folder that the server runs in, with data, models, and what is none of a browser's
    business."""
    folder = tmp_path / "here"
    for name in ("data/sub", "data/.hidden", "models/tiny", "secret/pairs"):
        (folder / name).mkdir(parents=True)
    for name in ("data/a.jsonl", "data/sub/b.jsonl", "data/.hidden/c.jsonl", "secret/s.jsonl"):
        (folder / name).write_bytes(PAIR)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def own(here) -> Places:
    return Places(Path("data"), Path("models"))


# -- names --


@pytest.mark.parametrize("name", EMBEDDED_DATA)
def test_embedded_data_may_be_named(own, name):
    assert own.check_source(name) == name


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_embedded_models_may_be_named(own, name):
    assert own.check_model(name) == own.check_encoder(name) == name


@pytest.mark.parametrize(
    "name", ["princeton-nlp/llama3-ultrafeedback-armorm", "a/b", "Owner_1/name.v2"]
)
def test_hub_ids_may_be_named(own, name):
    assert own.check_source(name) == own.check_model(name) == own.check_encoder(name) == name


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("data/a.jsonl", "data/a.jsonl"),
        ("a.jsonl", "data/a.jsonl"),
        ("./data/../data/a.jsonl", "data/a.jsonl"),
        ("sub/b.jsonl", "data/sub/b.jsonl"),
        ("data/sub", "./data/sub"),  # without ./ it would be a Hub id once the folder is gone
        ("sub", "./data/sub"),
    ],
)
def test_paths_below_the_folder_may_be_named(own, name, found):
    assert own.check_source(name) == found
    assert own.check_source(found) == found
    assert own.check_source(str(Path(found).absolute())) == found


def test_a_path_outside_the_working_folder_is_absolute(own, here, monkeypatch):
    absolute = Places(here / "data", here / "models")
    monkeypatch.chdir(here / "secret")
    assert absolute.check_source("a.jsonl") == str((here / "data" / "a.jsonl").resolve())


FORBIDDEN = [
    "",
    " ",
    ".",
    "..",
    "/",
    "data",
    "data/.",
    "data/../data",
    "/etc/passwd",
    "data/../secret/s.jsonl",
    "../here/secret/s.jsonl",
    "secret/s.jsonl",
    "secret/pairs",
    "secret/nothing.jsonl",
    "data/nothing.jsonl",
    "nothing",
    "data/.hidden/c.jsonl",
    ".hidden/c.jsonl",
    "~/x.jsonl",
    "~root/x.jsonl",
    "~nobody-of-that-name/x",
    "data/a.jsonl\0",
    "\0",
    "x" * 5000,
    "a/" * 3000,
    "\ud800",
    "file:///etc/passwd",
    "https://example.org/pairs.jsonl",
    "hf://datasets/a/b",
    "embedded:nothing",
    "embedded:../x",
    "json",
    "a/b/c",
    "a/..",
    "a--b/c",
    "owner/name\n",
    "/proc/self/environ",
    "/dev/stdin",
    None,
    7,
    ["data/a.jsonl"],
]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_everything_else_is_refused_in_one_calm_sentence(own, name):
    for check, error in ((own.check_source, DataError), (own.check_model, ModelError)):
        with pytest.raises(error) as refusal:
            check(name)
        text = str(refusal.value)
        assert "can't be opened as" in text
        assert "\n" not in text
        assert len(text) < 400


def test_a_refusal_does_not_tell_whether_the_path_exists(own, here):
    texts = []
    for name in ("secret/s.jsonl", "secret/t.jsonl", f"{here}/secret", f"{here}/absent"):
        with pytest.raises(DataError) as refusal:
            own.check_source(name)
        texts.append(str(refusal.value).replace(name, "NAME"))
    assert len(set(texts)) == 1


@pytest.mark.parametrize("name", ["a/b.jsonl", "a/b.json.gz", "a/b.py", "buckets/b"])
def test_what_the_core_would_look_for_among_files_is_no_hub_id(own, name):
    with pytest.raises(DataError):
        own.check_source(name)


@given(st.text(st.sampled_from("ab-._/~:\0 é") | st.characters(), max_size=20))
def test_a_hub_id_is_exactly_what_the_core_takes_for_one(name):
    assert places._is_hub_id(name) == sources._is_hub_id(name)


def test_links_are_followed_before_they_are_judged(own, here):
    (here / "data" / "out.jsonl").symlink_to(here / "secret" / "s.jsonl")
    (here / "data" / "outside").symlink_to(here / "secret")
    (here / "data" / "in.jsonl").symlink_to(here / "data" / "sub" / "b.jsonl")
    (here / "data" / "round").symlink_to(here / "data" / "round")
    for name in ("out.jsonl", "outside/s.jsonl", "outside", "round"):
        with pytest.raises(DataError):
            own.check_source(name)
    assert own.check_source("in.jsonl") == "data/sub/b.jsonl"
    (here / "elsewhere").symlink_to(here / "data")
    assert Places(Path("elsewhere"), Path()).check_source("a.jsonl") == "data/a.jsonl"


def test_models_are_looked_for_in_their_own_folder(own):
    assert own.check_model("tiny") == own.check_model("models/tiny") == "./models/tiny"
    for name in ("data/a.jsonl", "data/sub", "secret/pairs", "roberta-large"):
        with pytest.raises(ModelError):
            own.check_model(name)


def test_encoders_may_have_old_hub_names(own, here):
    assert own.check_encoder("roberta-large") == "roberta-large"
    (here / "roberta-large").mkdir()
    for name in ("roberta-large", "secret", "..", "a..b", "-x"):
        with pytest.raises(ModelError):
            own.check_encoder(name)


def test_folders_that_are_not_there_allow_nothing_and_break_nothing(tmp_path):
    none = Places(tmp_path / "no", tmp_path / "none")
    assert none.check_source("a/b") == "a/b"
    assert none.files() == []
    with pytest.raises(DataError):
        none.check_source(str(tmp_path))


# -- configurations --


def test_a_configuration_comes_back_with_paths_that_train_can_take(own):
    config = parse_config(
        {
            "data": {"source": "a.jsonl", "heldout_source": "sub/b.jsonl", "max_pairs": 3},
            "model": {"name": "tiny", "revision": "refs/pr/1"},
        }
    )
    checked = own.check_config(config)
    assert (checked.data.source, checked.data.heldout_source) == (
        "data/a.jsonl",
        "data/sub/b.jsonl",
    )
    assert checked.model.name == "./models/tiny"
    assert checked.ef.bertscore_model == "roberta-large"
    assert checked.data.max_pairs == 3
    assert own.check_config(checked) == checked
    assert own.check_config(parse_config({})) == parse_config({})


def test_all_forbidden_names_of_a_configuration_are_told_at_once(own):
    config = parse_config(
        {
            "data": {"source": "secret/s.jsonl", "heldout_source": "/etc/passwd"},
            "model": {"name": "secret/pairs", "revision": "../../x"},
            "ef": {"bertscore_model": "/etc"},
        }
    )
    with pytest.raises(ConfigError) as refusal:
        own.check_config(config)
    keys = [line.partition(":")[0] for line in str(refusal.value).splitlines()]
    assert keys == [
        *("data.source", "data.heldout_source", "model.name"),
        *("model.revision", "ef.bertscore_model"),
    ]


# -- uploads --


@pytest.fixture
def upload(tmp_path):
    """A file where the server puts what comes in."""

    def make(content: bytes) -> Path:
        path = tmp_path / "incoming"
        path.write_bytes(content)
        return path

    return make


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("pairs.jsonl", "pairs.jsonl"),
        ("Pairs v2 (new).JSONL.GZ", "Pairs v2 (new).jsonl.gz"),
        ("../../etc/cron.d/x.csv", "x.csv"),
        ("C:\\Users\\me\\пары.tsv", "пары.tsv"),
        ("...hidden.json", "hidden.json"),
        (".jsonl", "upload.jsonl"),
        ("-rf.csv", "rf.csv"),
        ("偏好 数据.parquet", "偏好 数据.parquet"),
        ("हिन्दी.jsonl", "हिन्दी.jsonl"),
        ("e\u0301te\u0301.jsonl", "été.jsonl"),
        ("a\u202egpj.jsonl", "a-gpj.jsonl"),
        ("<script>alert(1)</script>.jsonl", "script.jsonl"),
        ("a\0b\nc\ud800.jsonl", "a-b-c.jsonl"),
        ("😀😀.jsonl", "upload.jsonl"),
        ("a.b.json.gz", "a.b.json.gz"),
    ],
)
def test_names_are_cleaned(name, clean):
    assert clean_name(name) == clean


@given(st.text(max_size=300))
def test_any_name_becomes_one_that_a_disk_takes(name):
    clean = clean_name(name + ".jsonl.gz")
    assert clean == Path(clean).name
    assert not clean.startswith(".")
    assert len(clean) <= 100
    assert len(os.fsencode(clean)) < 250
    assert clean_name(clean) == clean


@pytest.mark.parametrize("name", ["x.exe", "x", "", "x.gz", "x.jsonl.zip", "x.jsonl/", "..", 7])
def test_kinds_that_cannot_be_read_are_refused(own, upload, name):
    with pytest.raises(DataError, match="of no kind that can be read"):
        own.keep_upload(upload(PAIR), name)


def test_an_upload_lies_below_the_folder_and_can_be_loaded(own, upload):
    kept = own.keep_upload(upload(PAIR), "my pairs.jsonl")
    assert kept == "data/uploads/my pairs.jsonl"
    assert own.check_source(kept) == kept
    assert len(load_pairs(kept).pairs) == 1
    zipped = own.keep_upload(upload(gzip.compress(PAIR)), "my pairs.jsonl.gz")
    assert len(load_pairs(zipped).pairs) == 1
    assert Path(kept).stat().st_mode & 0o777 == Path("data/uploads").stat().st_mode & 0o666


def test_the_same_file_is_kept_once_and_another_gets_a_number(own, upload, here):
    names = [
        own.keep_upload(upload(content), "p.jsonl.gz")
        for content in map(gzip.compress, (PAIR, PAIR, PAIR * 2, PAIR * 3, PAIR * 2))
        for content in [content[:4] + bytes(4) + content[8:]]  # without the time
    ]
    stem = "data/uploads/p"
    assert names == [
        *(f"{stem}.jsonl.gz", f"{stem}.jsonl.gz", f"{stem}-2.jsonl.gz"),
        *(f"{stem}-3.jsonl.gz", f"{stem}-2.jsonl.gz"),
    ]
    left = {path.name for path in (here / "data" / "uploads").iterdir()}
    assert left == {"p.jsonl.gz", "p-2.jsonl.gz", "p-3.jsonl.gz", ".lock"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.parquet", b"PK\x03\x04 a zip", "is not .parquet"),
        ("x.jsonl.gz", PAIR, "is not .gz"),
        ("x.jsonl", b"\x7fELF\0\0", "NUL"),
        ("x.csv", "prompt".encode("utf-16"), "NUL"),
        ("x.json", b" " * (1 << 21) + b"\0", "NUL"),
        ("x.csv", b"", "is empty"),
        ("x.parquet", b"", "is empty"),
    ],
)
def test_content_that_is_not_what_the_name_says_is_refused(
    own, upload, here, name, content, reason
):
    with pytest.raises(DataError, match=reason):
        own.keep_upload(upload(content), name)
    assert list((here / "data" / "uploads").iterdir()) == []


def test_a_full_disk_is_told_calmly_and_leaves_nothing(own, upload, here, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(places.os, "fsync", full)
    with pytest.raises(RunError, match="No space left.*Make room"):
        own.keep_upload(upload(PAIR), "x.jsonl")
    assert list((here / "data" / "uploads").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told_calmly(own, upload, here):
    (here / "data" / "uploads").write_text("in the way")
    with pytest.raises(RunError, match="could not be kept"):
        own.keep_upload(upload(PAIR), "x.jsonl")


def test_uploads_of_one_name_at_a_time_do_not_overwrite_each_other(own, here, tmp_path):
    names: list[str] = []
    contents = [b'{"n": %d}\n' % (number % 5) for number in range(20)]

    def keep(number: int) -> None:
        path = tmp_path / f"incoming-{number}"
        path.write_bytes(contents[number])
        names.append(own.keep_upload(path, "x.jsonl"))

    threads = [threading.Thread(target=keep, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 20
    assert len(set(names)) == 5
    assert {Path(name).read_bytes() for name in names} == set(contents)


# -- the list --


def touch(path: Path, age: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PAIR)
    os.utime(path, (1e9 - age, 1e9 - age))


def test_the_list_has_what_can_be_chosen_newest_first(own, here):
    for path in (here / "data").rglob("*.jsonl"):
        path.unlink()
    touch(here / "data" / "old.csv", 3)
    touch(here / "data" / "uploads" / "new.jsonl.gz", 1)
    for name in ("notes.txt", ".hidden.jsonl", ".hidden/c.jsonl", "uploads/.part.jsonl"):
        touch(here / "data" / name, 0)
    (here / "data" / "out.jsonl").symlink_to(here / "secret" / "s.jsonl")
    (here / "data" / "broken.jsonl").symlink_to(here / "nothing")
    (here / "data" / "folder").symlink_to(here / "secret")
    for name in ("state.json", "dataset_info.json"):
        touch(here / "data" / "saved" / name, 0)
    os.utime(here / "data" / "saved", (1e9 - 2, 1e9 - 2))
    files = own.files()
    assert files == ["uploads/new.jsonl.gz", "saved", "old.csv"]
    for name in files:
        own.check_source(name)


def test_a_listed_name_means_the_listed_file_also_where_another_is_nearer(own, here):
    touch(here / "data" / "data" / "a.jsonl", 0)
    meant = {own.check_source(name) for name in own.files()}
    assert meant == {"data/a.jsonl", "data/data/a.jsonl", "data/sub/b.jsonl"}


def test_the_list_is_bounded(own, here):
    for number in range(MAX_FILES + 20):
        touch(here / "data" / "many" / f"{number}.jsonl", number)
    files = own.files()
    assert len(files) == MAX_FILES
    assert "many/0.jsonl" in files
    assert f"many/{MAX_FILES + 19}.jsonl" not in files


def test_local_models_are_offered_and_nothing_else(tmp_path):
    models, outside = tmp_path / "models", tmp_path / "outside"
    for folder in (models / "one", models / "owner" / "two", models / ".hidden", outside):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (models / "empty").mkdir()
    (models / "link").symlink_to(outside)
    offered = Places(tmp_path / "data", models).models()
    assert [Path(name).name for name in offered] == ["one", "two"]
    assert Places(tmp_path, tmp_path / "absent").models() == []
