"""Sources: a file, a `datasets` folder, an embedded name or a Hub id → numbered rows.

`datasets` is imported by folders and the Hub only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gapo_lite.data.files import BATCH_ROWS, READERS, Table, exists, open_table, wanted_columns
from gapo_lite.data.messages import Row
from gapo_lite.embedded import EMBEDDED_DATA, embedded_data_path
from gapo_lite.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

HUB_ID = re.compile(r"\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)


@contextmanager
def open_source(source: str | Path, split: str) -> Iterator[Table]:
    """Open what a person named; what lies on the disk goes before the Hub.

    Args:
        source: path, "embedded:…" name, or Hub id `owner/name`.
        split: which split of a Hub data set or a saved DatasetDict; other sources have none.

    Raises:
        DataError: it isn't there, can't be read, or is no kind of source.
    """
    path = _local_path(source)
    if path is None:
        yield _hub_table(str(source), split)
    elif path.is_dir():
        yield _folder_table(path, split)
    else:
        with open_table(path) as table:
            yield table


# --- Which source a name means ----------------------------------------------------------------


def _local_path(source: str | Path) -> Path | None:
    """The path of a local source, None for a Hub id."""
    name = str(source)
    if isinstance(source, str) and name.startswith("embedded:"):
        return embedded_data_path(name)
    path = Path(source).expanduser() if name.startswith("~/") else Path(source)
    if exists(path):
        return path
    if isinstance(source, str) and _is_hub_id(name):
        return None
    raise DataError(_not_found(name, path))


def _is_hub_id(name: str) -> bool:
    """`owner/name` and nothing else: no builder of `datasets`, script, bucket or mistyped file."""
    if not HUB_ID.fullmatch(name) or ".." in name or "--" in name or name.startswith("buckets/"):
        return False
    return Path(name).suffix.lower() not in {*READERS, ".gz", ".py", ".git"}


def _not_found(name: str, path: Path) -> str:
    if "://" in name:
        return (
            f"{name!r} is an address, and data is not loaded from addresses. "
            "Download the file and name its path, or give a Hub id of the form owner/name."
        )
    return (
        f"{name[:200]!r} is neither a file or folder here nor a Hub id of the form owner/name, so "
        f"there is nothing to load. {_did_you_mean(path) or _known_sources()}"
    )


def _did_you_mean(path: Path) -> str:
    names = [entry.name for entry in _entries(path.parent)]
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names)]
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (OSError, ValueError):  # it isn't there either, or is closed to us
        return []


def _known_sources() -> str:
    return (
        f"Name a file ({' '.join(READERS)}, also with .gz), a folder written by save_to_disk, "
        f"a Hub id of the form owner/name, or one of {', '.join(EMBEDDED_DATA)}."
    )


# --- Folders and the Hub ----------------------------------------------------------------------


def _folder_table(path: Path, split: str) -> Table:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise DataError(_no_dataset(path))
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes of it
        raise DataError(
            f"{str(path)!r} can't be loaded as a `datasets` folder ({_one_line(error)}). "
            "Write it again with save_to_disk."
        ) from error
    if isinstance(data, datasets.Dataset):
        return _dataset_table(data)
    if split not in data:
        found = ", ".join(map(repr, data))
        raise DataError(
            f"{str(path)!r} has no split {split!r}. Choose one of those it has: {found}."
        )
    return _dataset_table(data[split])


def _no_dataset(path: Path) -> str:
    files = [file for file in _entries(path) if file.suffix.lower() in {*READERS, ".gz"}]
    remedy = f"Name a file, such as {str(min(files))!r}." if files else _known_sources()
    return f"{str(path)!r} is a folder, but none that save_to_disk wrote. {remedy}"


def _hub_table(name: str, split: str) -> Table:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split, trust_remote_code=False)
    except Exception as error:  # absent, gated, offline, no such split, a script: it says which
        raise DataError(
            f"{name!r} is not a file or folder here, and its split {split!r} can't be loaded from "
            f"the Hub: {_one_line(error)}. If it is gated, accept its "
            "terms on its page and log in (`hf auth login`); without a network, bring its files "
            f"here and name one of them. {_did_you_mean(Path(name))}".rstrip()
        ) from error
    return _dataset_table(data)


def _dataset_table(data: Dataset) -> Table:
    return Table(data.column_names, enumerate(_dataset_rows(data), start=1))


def _dataset_rows(data: Dataset) -> Iterator[Row]:
    are_numbers = {
        name: str(getattr(feature, "dtype", "")).startswith(("int", "uint", "float"))
        for name, feature in data.features.items()
    }
    plain = data.select_columns(wanted_columns(are_numbers)).with_format(None)
    for batch in plain.iter(BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
