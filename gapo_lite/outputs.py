"""Files and folders that a command leaves: whole or not at all.

They are written beside their place and renamed. After Ctrl-C, an error or a full disk the place is
as it was before.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from gapo_lite.errors import GapoError, RunError


def check_out(out: Path, source: str | Path = "") -> None:
    """Refuses a file that could not be written, before any work is done for it.

    Args:
        out: the file to be written.
        source: what is read, and must not be overwritten; "" for nothing.

    Raises:
        RunError: `out` is a folder, has none, or is what is read.
    """
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
    part = _beside(out)
    try:
        with _explaining_disk_errors(out):
            yield part
            _settle(part)
            part.replace(out)
    finally:
        part.unlink(missing_ok=True)


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
    part = _beside(out)
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


def _beside(out: Path) -> Path:
    return out.with_name(f".{out.name}.part-{os.getpid()}")


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
    from_rust = re.search(
        r"([^:]+) \(os error \d+\)", str(error)
    )  # tokenizers raises a bare Exception
    return from_rust[1].strip() if from_rust and not isinstance(error, GapoError) else None
