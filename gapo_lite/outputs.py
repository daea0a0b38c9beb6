"""Files and folders that a command leaves: whole or not at all.

They are written beside their place and renamed. After Ctrl-C, an error or a full disk the place is
as it was before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gapo_lite.disk import discard, part_of
from gapo_lite.errors import GapoError, RunError

if TYPE_CHECKING:
    import numpy as np


def check_out(out: Path, source: str | Path = "", suffixes: Collection[str] = ()) -> None:
    """Refuses a file that could not be written, before any work is done for it.

    Args:
        out: the file to be written.
        source: what is read, and must not be overwritten; "" for nothing.
        suffixes: which endings decide the format; none if it is always the same.

    Raises:
        RunError: `out` is a folder, has none, is what is read, or has another ending.
    """
    if suffixes and out.suffix not in suffixes:
        raise RunError(
            f"--out {out}: its name must end with {', '.join(suffixes)}, which decides the format."
        )
    if out.is_dir():
        raise RunError(f"{out} is a folder: name a file in it.")
    if not out.parent.is_dir():
        raise RunError(
            f"there is no folder {out.parent} for {out.name}. Make it first, or choose another "
            "place."
        )
    if str(source) and out.exists() and Path(source).exists() and out.samefile(source):
        raise RunError(f"{out} is what is read, and would be overwritten. Choose another name.")


@contextlib.contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A path to write to, which becomes `out` in the end.

    Raises:
        RunError: the disk is full, read-only or not this user's.
    """
    part = part_of(out)
    try:
        with _explaining_disk_errors(out):
            yield part
            _settle(part)
            part.replace(out)
    finally:
        discard(part)


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` in the end; its parents are made.

    Raises:
        RunError: `out` is in use, or the disk is full, read-only or not this user's.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(
            f"{out} is there already and not empty; nothing was written. Choose another folder "
            "with --out."
        )
    part = part_of(out)
    new_parents = [path for path in part.parents if not path.exists()]
    try:
        with _explaining_disk_errors(out):
            part.mkdir(parents=True)
            yield part
            for path in part.iterdir():
                _settle(path)
            part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        for path in new_parents:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _settle(path: Path) -> None:
    """Flushes a file to the disk and lets others read it, which safetensors does not."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _explaining_disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = _disk_trouble(error)
        if reason is None:
            raise
        raise RunError(
            f"cannot write {out}: {reason}. Nothing was left there. Make room or choose another "
            "place, then try again."
        ) from None


def _disk_trouble(error: Exception) -> str | None:
    """The system's words where the error came from a write, in Python or in a Rust library."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors and tokenizers are Rust; the latter raises a bare Exception.
    from_rust = re.search(r"([^:]+) \(os error \d+\)", str(error))
    return from_rust[1].strip() if from_rust and not isinstance(error, GapoError) else None


# -- scores --


def _write_jsonl_scores(path: Path, lines: list[int], scores: np.ndarray) -> None:
    rows = zip(lines, scores.tolist(), strict=True)
    path.write_text("".join(json.dumps({"line": line, "ef": ef}) + "\n" for line, ef in rows))


def _write_csv_scores(path: Path, lines: list[int], scores: np.ndarray) -> None:
    rows = zip(lines, scores.tolist(), strict=True)
    path.write_text("line,ef\n" + "".join(f"{line},{ef!r}\n" for line, ef in rows))


def _write_npy_scores(path: Path, lines: list[int], scores: np.ndarray) -> None:
    import numpy as np

    with path.open("wb") as file:
        np.save(file, scores, allow_pickle=False)


SCORE_FILES: dict[str, Callable[[Path, list[int], np.ndarray], None]] = {
    ".jsonl": _write_jsonl_scores,
    ".csv": _write_csv_scores,
    ".npy": _write_npy_scores,
}
"""Suffix → writer of the scores (N,) of pairs from the lines `lines`."""
