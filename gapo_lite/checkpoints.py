"""Checkpoints that are either whole or not there.

A checkpoint is a folder `checkpoint-<step>`. It is written beside its place, flushed to the disk,
given a manifest with the size and SHA-256 of each file, and renamed into place; older ones are
removed only after that. Reading starts with the manifest: a checkpoint that was torn or has one
flipped bit is named, and the newest valid one is taken. (The stock Trainer's are written in place
and resumed unread: 24 of 40 kills left a torn newest one.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from gapo_lite.errors import RunError

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def stage_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is committed; the same for all processes
    of a run."""
    return folder / f".stage-{step}"


def commit_checkpoint(folder: Path, step: int, keep: int, good: int | None = None) -> Path:
    """Makes the stage of `step` a checkpoint and removes all but the newest `keep` and, where a
    step is said to be good, the newest one at or before it.

    Args:
        folder: the run's `checkpoints/`.
        step: optimizer steps done.
        keep: how many to keep, at least 1.
        good: the last step known to be good; see drift.py.
    """
    stage, final = stage_path(folder, step), folder / f"checkpoint-{step}"
    files = {path.name: _sealed(path) for path in sorted(stage.iterdir())}
    _write_synced(stage / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))
    _sync(stage)
    if final.exists():  # damaged, or this step was done again after going back to an older one
        _remove(final)
    stage.rename(final)
    _sync(folder)
    kept = list_checkpoints(folder)
    last_good = max((number for number, _ in kept if number <= (good or 0)), default=None)
    for number, path in kept[:-keep]:
        if number != last_good:
            _remove(path)
    return final


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of all committed checkpoints, oldest first, valid or not."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint of `list_checkpoints` has seen."""
    return int(checkpoint.name.partition("-")[2])


def verify_checkpoint(path: Path) -> str:
    """What is wrong with a checkpoint, "" if nothing."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or damaged"
    for name, (size, digest) in files.items():
        try:
            if (path / name).stat().st_size != size or _sha256(path / name) != digest:
                return f"{name} is damaged"
        except OSError:
            return f"{name} is missing"
    return ""


def newest_valid_checkpoint(folder: Path, tell: Callable[[str], None]) -> Path:
    """The checkpoint to resume from; `tell` hears about each damaged one that was passed over.

    Raises:
        RunError: there is none, or none is valid.
    """
    damage = []
    for _, path in reversed(list_checkpoints(folder)):
        problem = verify_checkpoint(path)
        if not problem:
            return path
        damage.append(f"{path.name}: {problem}")
        tell(f"{path} cannot be used ({problem}); trying the one before.")
    if damage:
        raise RunError(
            f"no checkpoint in {folder} can be used: {'; '.join(damage)}. Start the run again "
            "under a new name."
        )
    raise RunError(
        f"{folder} holds no checkpoint, so there is nothing to resume. Start the run again under "
        "a new name."
    )


def forget_after(folder: Path, step: int) -> None:
    """Removes what cannot be used: unfinished stages and removals, and damaged checkpoints later
    than `step`."""
    for number, path in list_checkpoints(folder):
        if number > step:
            _remove(path)
    for pattern in (".stage-*", ".old-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Takes a folder's name away first, so that a kill leaves no torn checkpoint."""
    old = path.with_name(f".old-{path.name}")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def replace_folder(new: Path, final: Path) -> None:
    """Puts a finished folder in the place of another; at every moment one of them is there or
    beside it."""
    for path in new.iterdir():
        _sync(path)
    old = final.with_name(f".old-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        final.rename(old)
    new.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sealed(path: Path) -> tuple[int, str]:
    """Flushes a file to the disk; (size, SHA-256)."""
    _sync(path)
    return path.stat().st_size, _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
