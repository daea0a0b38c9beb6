"""Results that were dear to get, kept as they come, so that work that was killed goes on.

    <file>.journal.jsonl      one row a result: {"key": digest of all that it depends on, …}

A row is written in one system call; a last line that was torn is dropped when it is read again.
Rows of other settings have other keys, and lie there without effect.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gapo_lite.disk import file_lock, read_jsonl
from gapo_lite.errors import RunError


def digest(*parts: Any) -> str:
    """SHA-256 of values that JSON can express."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Journal:
    """Rows by their key; `add` may be called from several threads. See `open_journal`."""

    def __init__(self, path: Path):
        self.path = path
        self._rows = {row["key"]: row for row in read_jsonl(path) if _is_row(row)}
        self._lock = threading.Lock()
        _drop_torn_line(path)

    def get(self, key: str) -> dict[str, Any] | None:
        """The row that was added under that key."""
        return self._rows.get(key)

    def add(self, key: str, row: dict[str, Any]) -> dict[str, Any]:
        """Keeps a row, on the disk before in memory; returns it with its key.

        Raises:
            RunError: the disk is full, read-only or not this user's.
        """
        row = {"key": key, **row}
        line = (json.dumps(row) + "\n").encode()
        with self._lock, _telling_disk_errors(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                size = os.fstat(descriptor).st_size
                if os.write(descriptor, line) != len(line):
                    os.ftruncate(descriptor, size)
                    raise OSError("no room is left for a row")
            finally:
                os.close(descriptor)
            self._rows[key] = row
        return row


@contextmanager
def open_journal(out: Path) -> Iterator[Journal]:
    """The journal of a file that is being made, for one process at a time; it is removed when all
    went well, since then `out` is there.

    Raises:
        RunError: another process is making the same file, or the disk is full or read-only.
    """
    path = out.with_name(f"{out.name}.journal.jsonl")
    try:
        with _telling_disk_errors(path), path.open("a"):
            pass
        with file_lock(path):
            try:
                yield Journal(path)
            except BaseException:
                if path.is_file() and not path.stat().st_size:
                    path.unlink()  # nothing was done, so nothing need be kept
                raise
            path.unlink(missing_ok=True)
    except BlockingIOError:
        raise RunError(
            f"another process is making {out}. Wait for it, or choose another --out."
        ) from None


@contextmanager
def _telling_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. What it holds is kept: make room, "
            "then give the same command again; or choose another place."
        ) from None


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("key"), str)


def _drop_torn_line(path: Path) -> None:
    """Cuts what a full disk or a lost machine left after the last whole line, so that the next row
    does not grow onto it."""
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
