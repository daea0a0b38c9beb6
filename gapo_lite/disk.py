"""Files that other processes read meanwhile: replaced in one step, appended by the line, locked;
and what a full disk says. Imports nothing of the project but its errors."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gapo_lite.errors import RunError

_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
}


@contextlib.contextmanager
def telling_disk_errors(place: Path) -> Iterator[None]:
    """Turns a full, failing or read-only disk into a message.

    Raises:
        RunError: the disk is full, fails, is read-only or not this user's.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        reason = os.strerror(error.errno)
    except SafetensorError as error:  # it hides the system's error in its text
        if "os error" not in str(error):
            raise
        reason = str(error)
    else:
        return
    raise RunError(
        f"cannot write {place}: {reason}. What was saved before is untouched: make room (or write "
        "elsewhere with --runs-dir), then go on with --resume."
    )


def replace_text(path: Path, text: str) -> None:
    """Replaces a file in one step.

    Raises:
        RunError: the disk is full, fails, is read-only or not this user's.
    """
    part = part_of(path)
    try:
        with telling_disk_errors(path):
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        discard(part)


def discard(part: Path) -> None:
    """Removes what is left of a file that could not be written; on a read-only disk that fails even
    where there is nothing."""
    with contextlib.suppress(OSError):
        part.unlink()


def part_of(path: Path) -> Path:
    """A hidden place beside a file or folder, where nobody else writes, another thread neither."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")


@contextlib.contextmanager
def file_lock(path: Path, *, probe: bool = False, patience: float = 0.0) -> Iterator[int]:
    """A lock on a file, as the descriptor that holds it; BlockingIOError where another has it.

    Args:
        path: made where it is missing, unless this is a probe; another user's will do.
        probe: a shared lock, which does not disturb other probes.
        patience: seconds to wait, for a probe to pass.
    """
    descriptor = _open_lock(path, create=not probe)
    kind = fcntl.LOCK_SH if probe else fcntl.LOCK_EX
    deadline = time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        yield descriptor
    finally:
        os.close(descriptor)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file that is being appended to; nothing where it is not there yet. Lines
    that are none are left out: the disk was full or lost power while they were written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    rows = []
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _open_lock(path: Path, *, create: bool) -> int:
    """A descriptor to lock. Reading is enough for that, so another user's file serves too."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        if not create:
            raise
    with telling_disk_errors(path):
        descriptor = os.open(path, flags | os.O_CREAT, 0o666)
        with contextlib.suppress(PermissionError):
            os.fchmod(descriptor, 0o666)
        return descriptor
