"""What takes time to find out about a set of pairs: evaluation factors, and lengths in tokens.

Both are measured once and kept where training looks for them. What needs torch is done by `worker`,
a process of its own.

    for done, total in measure_scores(pair_set, "rougeL", config): ...    # nothing if it is known
    scores(pair_set, "rougeL", config)                                    # (N,)
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.pairs import Floats, Ints, PairSet, alone, named, split_key, split_of, texts_of
from app.worker import lengths_path, read_lengths, run_task
from gapo_lite.config import RunConfig
from gapo_lite.ef import EVALUATION_FACTORS, check_options
from gapo_lite.ef import cache as ef_cache
from gapo_lite.ef.lexical import lexical_scores
from gapo_lite.errors import RunError

_PAIRS_A_SIGN = 512


def scores(pair_set: PairSet, metric: str, config: RunConfig) -> Floats | None:
    """Evaluation factors of all pairs, where they are known; see `measure_scores`.

    Args:
        pair_set: N pairs.
        metric: a key of EVALUATION_FACTORS.
        config: for the metric's options, and the split by which they are kept on the disk.

    Returns:
        (N,) before any floor, or None if they have to be measured. NaN for pairs that a BERTScore
        has not been measured of because training doesn't use them.

    Raises:
        ConfigError: there is no such metric.
        DataError: the set can't be split so.
        RunError: there is no folder for the cache.
    """
    key = _score_key(metric, config)
    found = pair_set.kept.find(key)
    if found is None:
        found = _scores_on_disk(pair_set, metric, config)
        if found is not None:
            pair_set.kept.put(key, found)
    return found


def measure_scores(pair_set: PairSet, metric: str, config: RunConfig) -> Iterator[tuple[int, int]]:
    """Finds out the scores of a metric and its whole family, and keeps them where training looks.

    Lexical metrics are computed here, for all pairs; BERTScores by the worker, for the pairs that
    training and evaluation use, and apart, because the rest of a batch has a part in them.

    Yields:
        (done, total) now and then; nothing if the scores are known. Closing it stops the measuring.

    Raises:
        GapoError: as `scores`; or the encoder can't be used, or the disk is full.
    """
    metric_options(metric, config)
    family = EVALUATION_FACTORS[metric].family
    measure = _measure_lexical if family == "lexical" else _measure_semantic
    yield from alone(
        pair_set,
        family,
        lambda: scores(pair_set, metric, config) is not None,
        lambda: measure(pair_set, metric, config),
    )


def _measure_lexical(
    pair_set: PairSet, metric: str, config: RunConfig
) -> Iterator[tuple[int, int]]:
    chosen, rejected = texts_of(pair_set, np.arange(len(pair_set)))
    family = _family(metric)
    options = metric_options(metric, config)
    found = {name: np.zeros(len(pair_set)) for name in family}
    for start in range(0, len(pair_set), _PAIRS_A_SIGN):
        place = slice(start, start + _PAIRS_A_SIGN)
        some = lexical_scores(chosen[place], rejected[place], family, **options)
        for name, values in some.items():
            found[name][place] = values
        yield min(place.stop, len(pair_set)), len(pair_set)
    for name, values in found.items():
        pair_set.kept.put(_score_key(name, config), values)
        for part in split_of(pair_set, config).parts().values():
            ef_cache.write_scores(_path(pair_set, part, name, config), values[part])


def _measure_semantic(
    pair_set: PairSet, metric: str, config: RunConfig
) -> Iterator[tuple[int, int]]:
    used = split_of(pair_set, config)
    parts = [part.tolist() for part in (used.training, used.held_out) if len(part)]
    arguments = {**named(pair_set), "options": metric_options(metric, config), "parts": parts}
    yield from run_task("scores", arguments)
    for name in _family(metric):
        found = _scores_on_disk(pair_set, name, config, is_new=True)
        if found is None:
            raise RunError(
                "the scores could not be kept in the cache, so they are lost. Free some space, or "
                "set GAPO_LITE_CACHE to a folder that can be written to, then try again."
            )
        pair_set.kept.put(_score_key(name, config), found)


def _scores_on_disk(
    pair_set: PairSet, metric: str, config: RunConfig, is_new: bool = False
) -> Floats | None:
    """The scores of a metric if the cache has those of all pairs that training uses.

    The names of the files, which take all texts to find out, are remembered, unless `is_new`.
    """
    found = np.full(len(pair_set), np.nan)
    is_lexical = EVALUATION_FACTORS[metric].family == "lexical"
    for name, part in split_of(pair_set, config).parts().items():
        key = ("path", name, _score_key(metric, config), split_key(config))
        path = None if is_new else pair_set.kept.find(key)
        if path is None:
            path = _path(pair_set, part, metric, config)
            pair_set.kept.put(key, path)
        values = ef_cache.read_scores(path, len(part))
        if values is not None:
            found[part] = values
        elif is_lexical or name != "unused":
            return None
    return found


def _path(pair_set: PairSet, part: Ints, metric: str, config: RunConfig) -> Path:
    texts = texts_of(pair_set, part)
    return ef_cache.cache_path(*texts, metric, metric_options(metric, config))


def _score_key(metric: str, config: RunConfig) -> Hashable:
    """Lexical scores don't depend on which pairs are scored together, so they serve any split."""
    options = json.dumps(metric_options(metric, config), sort_keys=True)
    is_lexical = EVALUATION_FACTORS[metric].family == "lexical"
    return "scores", metric, options, None if is_lexical else split_key(config)


def metric_options(metric: str, config: RunConfig) -> dict[str, Any]:
    """What `score_pairs` is given in training; ConfigError for a metric that does not exist."""
    check_options(metric, {})
    return config.ef.model_copy(update={"metric": metric}).options()


def _family(metric: str) -> list[str]:
    family = EVALUATION_FACTORS[metric].family
    return [name for name, factor in EVALUATION_FACTORS.items() if factor.family == family]


# -- lengths --


def lengths(pair_set: PairSet, model: str, revision: str | None = None) -> NDArray[np.int32] | None:
    """Tokens of prompt, chosen and rejected (N, 3) as a model counts them, before any cut; what
    limits do to them says `gapo_lite.lengths.cut`.

    Returns:
        None if they have to be measured.

    Raises:
        RunError: there is no folder for the cache.
    """
    path = lengths_path(named(pair_set)["fingerprint"], model, revision)
    found = pair_set.kept.find(path)
    if found is None:
        found = read_lengths(path, len(pair_set))
        if found is not None:
            pair_set.kept.put(path, found)
    return found


def measure_lengths(
    pair_set: PairSet, model: str, revision: str | None = None
) -> Iterator[tuple[int, int]]:
    """Has the worker count the tokens.

    Args:
        pair_set: N pairs.
        model: as `Places.check_model` returns it.
        revision: of a model on the Hub.

    Yields:
        (pairs done, N) now and then; nothing if the lengths are known. Closing it stops the worker.

    Raises:
        GapoError: the tokenizer can't be used, the data have changed, or the disk is full.
    """
    arguments = {**named(pair_set), "model": model, "revision": revision}
    yield from alone(
        pair_set,
        "lengths",
        lambda: lengths(pair_set, model, revision) is not None,
        lambda: run_task("lengths", arguments),
    )
