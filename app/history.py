"""What a run has logged, read while it grows, by many viewers at once.

`read_history` keeps what it has parsed and reads only what was added, so a poll of an unchanged run
is one `stat`. A resumed run puts a shorter file in the place of the old one; that is noticed and
read anew.
"""

from __future__ import annotations

import csv
import io
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from gapo_lite.config import RunConfig
from gapo_lite.errors import RunError
from gapo_lite.runs import Run

Columns = Mapping[str, np.ndarray]

_MAX_NUMBERS = 16_000_000
"""What the cache may hold: 128 MB, or some 190 runs of 5,000 rows."""
_TAIL_BYTES = 256
_HELDOUT = "eval/"
_WATCHED = ("metrics.jsonl", "status.json", "samples.jsonl", "train.log")


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """What a run has logged so far; the arrays cannot be written to.

    Attributes:
        training: key → (R,) float64, NaN where a row lacks the key; always has step and epoch.
        evaluation: the same of the rows on held-out pairs, keys without their `eval/`.
        problem: what is wrong with the file, "" if nothing; rows from there on are not shown.
    """

    training: Columns
    evaluation: Columns
    problem: str = ""


def read_history(run: Run) -> History:
    """All rows of a run's metrics.jsonl. Any number of threads may ask, as often as they like.

    An unterminated last line is being written and is left out; a damaged line ends reading.

    Raises:
        RunError: the file is there and cannot be read.
    """
    path = run.path / "metrics.jsonl"
    with _lock:
        fresh = _cache[path] = _caught_up(path, _cache.get(path, _NOTHING))
        _cache.move_to_end(path)
        while len(_cache) > 1 and sum(parsed.numbers for parsed in _cache.values()) > _MAX_NUMBERS:
            _cache.popitem(last=False)
    return fresh.history


def version(run: Run) -> str:
    """A token that changes when the run's metrics, status, samples or log have. It does not see a
    killed process: ask `run.is_locked()` too."""
    marks = [_mark(run.path / name) for name in _WATCHED]
    return "/".join("-".join(map(str, mark)) for mark in marks)


def config_of(run: Run) -> RunConfig:
    """`run.config()`, read again only when the file has changed.

    Raises:
        ConfigError: the file is missing or unusable.
    """
    return _config(run.path, _mark(run.path / "config.yaml"))


def to_csv(run: Run) -> str:
    """All rows as CSV (RFC 4180), in the file's order: one column a key, step first.

    Raises:
        RunError: the file is there and cannot be read.
    """
    rows = _parse(_read(run.path / "metrics.jsonl")).rows
    keys = list(dict.fromkeys(["step", *(key for row in rows for key in row)]))
    text = io.StringIO(newline="")
    writer = csv.writer(text)  # its default dialect is the RFC's
    writer.writerow(map(_cell, keys))
    writer.writerows([_cell(row.get(key, "")) for key in keys] for row in rows)
    return text.getvalue()


# -- reading a file that grows --


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of some bytes, how many of these were whole lines, and whether the next one is bad."""

    rows: list[dict[str, Any]]
    used: int
    is_damaged: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Parsed:
    """What is known of a file.

    Attributes:
        mark: of the file when it was read.
        offset: bytes parsed.
        tail: the last of them. A new file may be given an old one's inode, but not its rows.
        history: what they said.
    """

    mark: tuple[int, ...]
    offset: int
    tail: bytes
    history: History

    @property
    def numbers(self) -> int:
        """How many the history holds."""
        parts = (self.history.training, self.history.evaluation)
        return sum(len(columns) * len(columns["step"]) for columns in parts)


def _columns(columns: dict[str, np.ndarray]) -> Columns:
    for values in columns.values():
        values.flags.writeable = False
    return MappingProxyType(columns)


_NO_ROWS = _columns({"step": np.zeros(0), "epoch": np.zeros(0)})
_NOTHING = _Parsed((), 0, b"", History(_NO_ROWS, _NO_ROWS))
_cache: OrderedDict[Path, _Parsed] = OrderedDict()
_lock = threading.Lock()


def _caught_up(path: Path, known: _Parsed) -> _Parsed:
    mark = _mark(path)  # before reading: if the file grows meanwhile, the next call sees that
    if mark == known.mark:
        return known
    data = _read(path, known.offset - len(known.tail))
    if mark[:1] != known.mark[:1] or not data.startswith(known.tail):
        known, data = _NOTHING, _read(path)
    data = data[len(known.tail) :]
    new = _parse(data)
    tail = (known.tail + data[: new.used])[-_TAIL_BYTES:]
    return _Parsed(mark, known.offset + new.used, tail, _grown(known.history, new))


def _grown(history: History, new: _Rows) -> History:
    training, evaluation = [], []
    for row in new.rows:
        if f"{_HELDOUT}loss" in row:
            evaluation.append({key.removeprefix(_HELDOUT): row[key] for key in row})
        else:
            training.append(row)
    problem = ""
    if new.is_damaged:
        line = len(history.training["step"]) + len(history.evaluation["step"]) + len(new.rows) + 1
        problem = f"metrics.jsonl is damaged in line {line}: what follows is not shown."
    return History(
        _extended(history.training, training), _extended(history.evaluation, evaluation), problem
    )


def _extended(columns: Columns, rows: list[dict[str, Any]]) -> Columns:
    if not rows:
        return columns
    missing = np.full(len(columns["step"]), np.nan)
    extended = {}
    for key in dict.fromkeys([*columns, *(key for row in rows for key in row)]):
        values = [row.get(key) for row in rows]
        if not set(map(type, values)) <= {float, type(None)}:  # else numpy alone is 4 times faster
            values = list(map(as_float, values))
        numbers = np.array(values, dtype=np.float64)
        extended[key] = np.concatenate((columns.get(key, missing), numbers))
    return _columns(extended)


def _parse(data: bytes) -> _Rows:
    """Rows of whole lines. Damage is what a power cut leaves: no JSON, or not a row."""
    rows: list[dict[str, Any]] = []
    used = 0
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        try:
            row = json.loads(line)
            if not math.isfinite(as_float(row["step"])):
                return _Rows(rows, used, True)
        except (ValueError, KeyError, TypeError, RecursionError):
            return _Rows(rows, used, True)
        rows.append(row)
        used += len(line)
    return _Rows(rows, used, False)


def as_float(value: Any) -> float:
    """A JSON number; anything else is NaN."""
    if type(value) is float:
        return value
    if type(value) is not int:
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _mark(path: Path) -> tuple[int, ...]:
    """Inode, size and time of a file; empty where there is none."""
    try:
        with _telling(path):
            status = path.stat()
    except FileNotFoundError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path, start: int = 0) -> bytes:
    """A file's bytes from `start`; none where it is not there."""
    try:
        with _telling(path), path.open("rb") as file:
            file.seek(start)
            return file.read()
    except FileNotFoundError:
        return b""


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunError(
            f"cannot read {path}: {error.strerror}. Give the page's user the right to read it."
        ) from None


@lru_cache(maxsize=5000)
def _config(path: Path, mark: tuple[int, ...]) -> RunConfig:
    return Run(path).config()


def _cell(value: Any) -> Any:
    """A value for a CSV. A text that a spreadsheet would run as a formula is marked as text."""
    if type(value) in (int, float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"'{text}" if text[:1] in "=+-@\t\r" and text else text
