"""Data: any source of preference pairs → `LoadedPairs`, its split by prompt, and its fingerprint.

    sources.py   a name → the file, folder or Hub data set that it means
    files.py     a file's bytes → rows
    formats.py   a row → a pair; messages.py reads and checks its texts
    report.py    what was wrong, and where, for a person

Importing this imports neither torch nor `datasets` nor pyarrow.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from gapo_lite.data.files import NumberedRow
from gapo_lite.data.formats import FORMATS, parse_row
from gapo_lite.data.messages import BadRowError
from gapo_lite.data.report import problem_lines
from gapo_lite.data.sources import open_source
from gapo_lite.errors import DataError
from gapo_lite.types import LoadedPairs, Message, PreferencePair, Problem

__all__ = ["data_fingerprint", "load_pairs", "split_pairs"]


def load_pairs(
    source: str | Path, *, split: str = "train", rating_columns: Sequence[str] = ()
) -> LoadedPairs:
    """Load every usable pair of a source, and say why the other rows are not.

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file (also .gz), a folder written by
            `save_to_disk`, an "embedded:…" name, or a Hub id `owner/name`. What lies on the disk
            goes before the Hub.
        split: which split of a Hub data set or a saved DatasetDict; what has no splits, such as a
            file, is taken whole.
        rating_columns: see `parse_row`.

    Returns:
        The pairs in the order of the source; `shape` is the one that most of them have.

    Raises:
        DataError: the source can't be read, or no row of it is usable.
    """
    with open_source(source, split) as table:
        columns = dict.fromkeys(table.columns)
        parsed, problems = _parse_rows(table.rows, columns, rating_columns)
    if not parsed:
        raise DataError(_nothing_usable(str(source), list(columns), problems))
    pairs = [pair for _, pair in parsed]
    return LoadedPairs(
        pairs=pairs,
        problems=problems,
        source=str(source),
        columns=list(columns),
        shape=Counter(shape for shape, _ in parsed).most_common(1)[0][0],
        num_duplicates=len(pairs) - len({_content(pair) for pair in pairs}),
        num_equal=sum(pair.chosen == pair.rejected for pair in pairs),
    )


def _parse_rows(
    rows: Iterable[NumberedRow], columns: dict[str, None], rating_columns: Sequence[str]
) -> tuple[list[tuple[str, PreferencePair]], list[Problem]]:
    """Shapes and pairs, and the problems; adds the columns of every row to `columns`."""
    parsed: list[tuple[str, PreferencePair]] = []
    problems: list[Problem] = []
    for item in rows:
        if isinstance(item, Problem):
            problems.append(item)
            continue
        line, row = item
        columns.update(dict.fromkeys(row))
        try:
            parsed.append(parse_row(row, line, rating_columns))
        except BadRowError as error:
            problems.append(Problem(line, error.field, error.reason))
    return parsed, problems


def _nothing_usable(source: str, columns: list[str], problems: list[Problem]) -> str:
    if not problems:
        return f"{source!r} holds no rows, so there is nothing to load."
    what = f"{source!r} has no usable row among {len(problems):,}."
    missing = " and ".join(_missing_columns(columns, problems))
    if missing:
        found = ", ".join(map(repr, columns[:20])) + (", …" if len(columns) > 20 else "")
        what = f"{source!r} has no column {missing}, so no row is a pair. Columns found: {found}."
    return "\n".join(
        [
            what,
            problem_lines(source, problems, limit=3),
            "Rename columns or mend rows so that they have one of these shapes:",
            *(f"  {spec.columns}" for spec in FORMATS.values()),
        ]
    )


def _missing_columns(columns: list[str], problems: list[Problem]) -> list[str]:
    """The columns without which no row can be a pair."""
    if not columns:
        return []
    missing = [repr(column) for column in ("chosen", "rejected") if column not in columns]
    asked = any(problem.field == "prompt" for problem in problems)
    return missing or (["'prompt'"] if asked and "prompt" not in columns else [])


# --- Split by prompt --------------------------------------------------------------------------


def split_pairs(
    pairs: Sequence[PreferencePair], *, heldout_fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Split into train and held-out pairs, all pairs of one prompt on the same side.

    Prompts are ranked by a hash of the seed and their text, so the same ones are held out on every
    machine and in whatever order the rows come. From the top of the ranking prompts are looked at
    until some of them hold exactly the wanted number of pairs; if none ever do, those that come
    nearest are taken (of two equally near, the fewer).

    Args:
        pairs: all pairs.
        heldout_fraction: share of the pairs to hold out, in [0, 1); 0 holds out none.
        seed: any whole number; another seed holds out other prompts.

    Returns:
        Train and held-out pairs, each in the order of `pairs`.

    Raises:
        DataError: a side would be empty, or the fraction is out of range.
    """
    if not 0 <= heldout_fraction < 1:
        raise DataError(
            f"The held-out fraction is {heldout_fraction}, which leaves no pairs to train on or is "
            "no share at all. Choose one from 0 up to, but not including, 1."
        )
    if heldout_fraction == 0:
        return list(pairs), []
    prompts = [_prompt_bytes(pair.prompt) for pair in pairs]
    sizes = Counter(prompts)
    if len(sizes) < 2:
        raise DataError(
            f"{len(pairs)} pairs with {len(sizes)} different prompts can't be split by prompt into "
            "training and held-out pairs. Bring more prompts, or set the held-out fraction to 0."
        )
    ranked = sorted(sizes, key=lambda prompt: hashlib.sha256(b"%d:" % seed + prompt).digest())
    wanted = heldout_fraction * len(pairs)
    taken = _nearest_sum([sizes[prompt] for prompt in ranked], wanted)
    heldout = {ranked[index] for index in taken}
    sides: dict[bool, list[PreferencePair]] = defaultdict(list)
    for pair, prompt in zip(pairs, prompts, strict=True):
        sides[prompt in heldout].append(pair)
    return sides[False], sides[True]


def _nearest_sum(sizes: list[int], wanted: float) -> list[int]:
    """Which of `sizes`, taken from the front, add up nearest to `wanted`, but to neither 0 nor all.

    `reached` is a set of sums as the bits of one integer (bit s: some sizes so far add up to s),
    and `last[s]` the index that first made s possible. The naive equivalent tries every subset.
    """
    total = sum(sizes)
    goal = round(wanted)
    within = (1 << min(total, goal + max(sizes) + 1)) - 1
    reached = 1
    last: dict[int, int] = {}
    for index, size in enumerate(sizes):
        new = (reached << size) & within & ~reached
        reached |= new
        while new:
            highest = new.bit_length() - 1
            last[highest] = index
            new ^= 1 << highest
        if goal in last:
            break
    rest = min(last, key=lambda reachable: (abs(reachable - wanted), reachable))
    taken = []
    while rest:
        taken.append(last[rest])
        rest -= sizes[last[rest]]
    return taken


# --- Identity ---------------------------------------------------------------------------------


def data_fingerprint(pairs: Iterable[PreferencePair]) -> str:
    """SHA-256, in hex, of all prompts, chosen and rejected, in order; not of lines and scores."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(_prompt_bytes(pair.prompt) + _sized(pair.chosen) + _sized(pair.rejected))
    return digest.hexdigest()


def _content(pair: PreferencePair) -> tuple[object, ...]:
    prompt = tuple((message["role"], message["content"]) for message in pair.prompt)
    return prompt, pair.chosen, pair.rejected


def _prompt_bytes(prompt: list[Message]) -> bytes:
    """One string of bytes a conversation: with lengths before the texts, no two give the same."""
    texts = (_sized(message["role"]) + _sized(message["content"]) for message in prompt)
    return b"%d:" % len(prompt) + b"".join(texts)


def _sized(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"%d:" % len(data) + data
