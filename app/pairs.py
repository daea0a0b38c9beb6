"""Sets of pairs as the Data tab opens them: read once, shared by all browsers, with what has been
found out about them.

    sets = PairSets()
    pair_set = sets.load("embedded:everyday", "train")
    overview(pair_set).num_pairs, split_of(pair_set, config).training

What takes time to find out is in `measures`, what follows from it in `gaps`; one pair at a time is
shown by `browser`. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapo_lite.config import RunConfig
from gapo_lite.data import data_fingerprint, load_pairs, split_pairs
from gapo_lite.data.formats import FORMATS
from gapo_lite.data.sources import HUB_ID
from gapo_lite.errors import DataError
from gapo_lite.types import LoadedPairs, PreferencePair, Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_PROBLEMS = 200
_SECONDS_A_SIGN = 0.5


# -- pair sets --


class PairSets:
    """The sets that were opened last, shared by all browsers; safe to use from any thread."""

    def __init__(self, capacity: int = 4):
        self._sets = Kept(capacity)
        self._loading = threading.Lock()  # the csv module's size limit is the whole process's

    def load(
        self, source: str, split: str = "train", rating_columns: Sequence[str] = ()
    ) -> PairSet:
        """A set, read again where its file has changed.

        Args:
            source: as `Places.check_source` returns it.
            split: of a Hub data set or a saved DatasetDict.
            rating_columns: `data.rating_columns`.

        Raises:
            DataError: it can't be read, or no row of it is usable.
        """
        columns = tuple(rating_columns)
        key = (source, split, columns, _file_state(source))
        return self._sets.get(key, lambda: self._load(source, split, columns))

    def is_open(self, source: str, split: str = "train") -> bool:
        """Whether it was loaded (by its own ratings) and is still here."""
        return self._sets.find((source, split, (), _file_state(source))) is not None

    def _load(self, source: str, split: str, columns: Sequence[str]) -> PairSet:
        is_local = Path(source).exists()  # a download, which may take long, keeps nobody waiting
        with self._loading if is_local else contextlib.nullcontext():
            return _load(source, split, columns)


@dataclass(frozen=True, slots=True, eq=False)
class PairSet:
    """N pairs and what has been found out about them.

    Attributes:
        loaded: pairs, problems, columns, shape and counts.
        split: of the source.
        kept: results by what they depend on.
        locks: so that nothing is measured twice at a time.
    """

    loaded: LoadedPairs
    split: str
    kept: Kept
    locks: dict[str, threading.Lock]

    @property
    def pairs(self) -> list[PreferencePair]:
        """The N pairs, in the order of the source."""
        return self.loaded.pairs

    def __len__(self) -> int:
        return len(self.loaded.pairs)


class Kept:
    """The last `capacity` results by key, each made once however many threads ask for it."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._lock = threading.Lock()
        self._results: OrderedDict[Hashable, Future[Any]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result, made by the first to ask; what `make` raises is raised and not kept."""
        with self._lock:
            result = self._results.get(key)
            if is_new := result is None:
                result = self._insert(key)
            self._results.move_to_end(key)
        if is_new:
            try:
                result.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._results.pop(key, None)
                result.set_exception(error)
        return result.result()

    def find(self, key: Hashable) -> Any:
        """The result, None if it is not there (yet)."""
        with self._lock:
            result = self._results.get(key)
            if result is None or not result.done():
                return None
            self._results.move_to_end(key)
        return result.result()

    def put(self, key: Hashable, value: Any) -> None:
        """Keeps a result that is there already."""
        with self._lock:
            self._insert(key).set_result(value)
            self._results.move_to_end(key)

    def _insert(self, key: Hashable) -> Future[Any]:
        result = self._results[key] = Future()
        while len(self._results) > self._capacity:
            self._results.popitem(last=False)
        return result


def _load(source: str, split: str, rating_columns: Sequence[str]) -> PairSet:
    try:
        loaded = load_pairs(source, split=split, rating_columns=rating_columns)
    except DataError as error:
        if not HUB_ID.fullmatch(source):
            raise
        # The core's hint at near names would tell of files that are none of the browser's business.
        raise DataError(str(error).partition(" Did you mean")[0]) from None
    locks = {what: threading.Lock() for what in ("lexical", "semantic", "lengths")}
    return PairSet(loaded, split, Kept(128), locks)


def _file_state(source: str) -> tuple[tuple[int, int], ...]:
    """Tells two states of a file or folder apart; empty for what is no path."""
    path = Path(source)
    saved = [*path.glob("state.json"), *path.glob("*/state.json")]  # by save_to_disk
    stats = [each.stat() for each in [path, *sorted(saved)] if each.exists()]
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)


# -- overview --


@dataclass(frozen=True, slots=True)
class Overview:
    """What a set holds.

    Attributes:
        num_pairs: usable rows.
        columns: as found.
        shape_columns: the shape that was recognised, in words.
        problems: the first MAX_PROBLEMS unusable rows of `num_problems`.
        num_duplicates: pairs that repeat an earlier one.
        num_equal: pairs whose chosen and rejected are the same text.
        num_rated: pairs with the data's own scores of both responses.
        num_with_strength: pairs with the data's own sureness.
    """

    num_pairs: int
    columns: list[str]
    shape_columns: str
    problems: list[Problem]
    num_problems: int
    num_duplicates: int
    num_equal: int
    num_rated: int
    num_with_strength: int


def overview(pair_set: PairSet) -> Overview:
    """What a set holds, by the numbers."""
    loaded = pair_set.loaded
    rated = [None not in (pair.chosen_rating, pair.rejected_rating) for pair in loaded.pairs]
    return Overview(
        num_pairs=len(pair_set),
        columns=loaded.columns,
        shape_columns=FORMATS[loaded.shape].columns,
        problems=loaded.problems[:MAX_PROBLEMS],
        num_problems=len(loaded.problems),
        num_duplicates=loaded.num_duplicates,
        num_equal=loaded.num_equal,
        num_rated=sum(rated),
        num_with_strength=sum(pair.strength is not None for pair in loaded.pairs),
    )


# -- the split that training will make --


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Which pairs a configuration trains on, holds out, and leaves out; indices, in order."""

    training: Ints
    held_out: Ints
    unused: Ints

    def parts(self) -> dict[str, Ints]:
        """Those that are not empty, by their words."""
        parts = {"training": self.training, "held out": self.held_out, "unused": self.unused}
        return {name: part for name, part in parts.items() if len(part)}


def split_of(pair_set: PairSet, config: RunConfig) -> Split:
    """The split that a run of `config` on this set makes (preparation.prepare).

    Raises:
        DataError: it can't be split so.
    """
    return pair_set.kept.get(("split", split_key(config)), lambda: _split(pair_set, config))


def _split(pair_set: PairSet, config: RunConfig) -> Split:
    data, pairs = config.data, pair_set.pairs
    held_out: list[PreferencePair] = []
    if not data.heldout_source:
        pairs, held_out = split_pairs(
            pairs, heldout_fraction=data.heldout_fraction, seed=data.split_seed
        )
    index_of = {id(pair): index for index, pair in enumerate(pair_set.pairs)}
    training, held = (
        np.array([index_of[id(pair)] for pair in part], dtype=np.int64)
        for part in (pairs[: data.max_pairs], held_out)
    )
    unused = np.setdiff1d(np.arange(len(pair_set)), np.concatenate((training, held)))
    return Split(training, held, unused)


def split_key(config: RunConfig) -> Hashable:
    """What a configuration's split depends on."""
    data = config.data
    how = None if data.heldout_source else (data.heldout_fraction, data.split_seed)
    return data.max_pairs, how


# -- for what is found out about a set --


def texts_of(pair_set: PairSet, part: Ints) -> tuple[list[str], list[str]]:
    """Chosen and rejected of some pairs, by their indices."""
    pairs = [pair_set.pairs[index] for index in part]
    return [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]


def named(pair_set: PairSet) -> dict[str, Any]:
    """How the worker finds the same pairs."""
    fingerprint = pair_set.kept.get("fingerprint", lambda: data_fingerprint(pair_set.pairs))
    source = pair_set.loaded.source
    return {"source": source, "split": pair_set.split, "fingerprint": fingerprint}


def alone(
    pair_set: PairSet,
    what: str,
    is_known: Callable[[], bool],
    measure: Callable[[], Iterator[tuple[int, int]]],
) -> Iterator[tuple[int, int]]:
    """Measures what another thread is not measuring already, or waits for it."""
    lock = pair_set.locks[what]
    while not lock.acquire(timeout=_SECONDS_A_SIGN):
        yield 0, len(pair_set)
    try:
        if not is_known():
            yield from measure()
    finally:
        lock.release()
