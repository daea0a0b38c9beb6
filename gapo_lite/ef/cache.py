"""Scores that are kept on disk, by the texts and the settings that they depend on.

    <cache>/ef/<sha256 of both>.npy    # (N,) float64 as numpy writes it, then 32 bytes: its sha256

A file is written whole or not at all, and one that is not as it was written is computed again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapo_lite.ef import check_options, check_pairs, score_pairs
from gapo_lite.embedded import cache_dir, model_state

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when the scores of the same texts and settings change
_WITHOUT_EFFECT = ("device",)  # options that leave the scores as they are
_ADDED_LATER = {"tokenizer": "rouge"}  # with these, scores are those of before there was the option


def cached_scores(
    chosen: Sequence[str],
    rejected: Sequence[str],
    ef: str,
    options: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """`score_pairs(chosen, rejected, ef, **options)`, computed once.

    A cache that cannot be read or written costs a warning, never the scores.

    Args:
        progress: called with (pairs done, N) as chunks finish, and once if the scores were kept.

    Returns:
        (N,) in [0, 1].

    Raises:
        ConfigError, DataError, ModelError: as score_pairs.
        RunError: there is no folder for the cache (see cache_dir).
    """
    chosen, rejected = check_pairs(chosen, rejected)
    path = cache_path(chosen, rejected, ef, options)
    scores = read_scores(path, len(chosen))
    if scores is None:
        scores = score_pairs(chosen, rejected, ef, progress=progress, **options)
        write_scores(path, scores)
    elif progress is not None:
        progress(len(chosen), len(chosen))
    return scores


def cached_bert_scores(
    chosen: Sequence[str],
    rejected: Sequence[str],
    options: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """BERTScore's precision, recall and F1 as `cached_scores` has them, computed in one pass.

    Returns:
        Factor → (N,) in [0, 1].

    Raises:
        ConfigError, DataError, ModelError, RunError: as cached_scores.
    """
    chosen, rejected = check_pairs(chosen, rejected)
    factors = ("bertscore_p", "bertscore_r", "bertscore_f1")  # the columns of bert_scores
    paths = [cache_path(chosen, rejected, ef, options) for ef in factors]
    known = [scores for path in paths if (scores := read_scores(path, len(chosen))) is not None]
    if len(known) < len(factors):
        from gapo_lite.ef.semantic import bert_scores  # imports torch

        settings = check_options(factors[0], options)
        table = bert_scores(chosen, rejected, progress=progress, **settings)
        known = [column.copy() for column in table.T]
        for path, scores in zip(paths, known, strict=True):
            write_scores(path, scores)
    elif progress is not None:
        progress(len(chosen), len(chosen))
    return dict(zip(factors, known, strict=True))


def cache_path(
    chosen: Sequence[str], rejected: Sequence[str], ef: str, options: Mapping[str, Any]
) -> Path:
    """Where the scores of these pairs are kept; the name is a digest of all that they depend on.

    Raises:
        ConfigError: as score_pairs.
        RunError: there is no folder for the cache.
    """
    digest = hashlib.sha256(_settings(ef, options))
    for texts in (chosen, rejected):
        digest.update(len(texts).to_bytes(8))
        for text in texts:
            content = text.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8))
            digest.update(content)
    return cache_dir() / "ef" / f"{digest.hexdigest()}.npy"


def _settings(ef: str, options: Mapping[str, Any]) -> bytes:
    settings = check_options(ef, options)
    relevant = {
        name: value
        for name, value in settings.items()
        if name not in _WITHOUT_EFFECT and (name, value) not in _ADDED_LATER.items()
    }
    if "model" in relevant:
        relevant["model files"] = model_state(relevant["model"])
    return json.dumps([FORMAT_VERSION, ef, relevant], sort_keys=True).encode() + b"\n"


def read_scores(path: Path, num_pairs: int) -> NDArray[np.float64] | None:
    """The scores (N,) kept at `path`, a `cache_path`; None if they have to be computed."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("The cached scores cannot be read and are computed again: %s", error)
        return None
    scores = _unpack(content, num_pairs)
    if scores is None:
        logger.warning("The cached scores in %s are damaged and are computed again.", path)
    return scores


def write_scores(path: Path, scores: NDArray[np.float64]) -> None:
    """Keeps the scores (N,) at `path`; where that fails it costs a warning, never the scores."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, _pack(scores))
    except OSError as error:
        logger.warning(
            "The scores cannot be kept in the cache and will be computed again next time: %s. "
            "Free some space, or set GAPO_LITE_CACHE to a folder that can be written to.",
            error,
        )


def _write_whole(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _pack(scores: NDArray[np.float64]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, scores, allow_pickle=False)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


def _unpack(content: bytes, num_pairs: int) -> NDArray[np.float64] | None:
    """The scores in `content`, or None if it is not, to the last byte, what _pack makes of them."""
    blank = np.zeros(num_pairs)
    packed = _pack(blank)
    if len(content) != len(packed):
        return None
    offset = len(packed) - hashlib.sha256().digest_size - blank.nbytes
    scores = np.frombuffer(content, np.float64, num_pairs, offset).copy()
    return scores if _pack(scores) == content else None
