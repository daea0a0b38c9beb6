"""One pair at a time: found, ordered, and with the words marked in which its responses differ.

found = browse(pair_set, view, query="leap year", sort="margin down", index=0)
chosen, rejected = diff_html(found.chosen, found.rejected)
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, groupby

import numpy as np
from rapidfuzz.distance import Indel

from app.gaps import GapView
from app.pairs import Floats, Ints, PairSet
from gapo_lite.errors import ConfigError
from gapo_lite.types import Message, PreferencePair


@dataclass(frozen=True, slots=True)
class BrowsedPair:
    """One pair on the screen; its texts are as they were found, to be escaped wherever shown.

    Attributes:
        index: its place among the `count` pairs that were found, from 0.
        count: how many were found.
        line: 1-based row of the source.
        part: "training", "held out" or "unused"; "" without a view.
        efs: every metric that is known of it.
        reward_margin: the target, None where EF is not known.
        chosen_rating, rejected_rating, strength: the data's own.
    """

    index: int
    count: int
    line: int
    part: str
    prompt: list[Message]
    chosen: str
    rejected: str
    efs: dict[str, float]
    reward_margin: float | None
    chosen_rating: float | None
    rejected_rating: float | None
    strength: float | None


SORTS: dict[str, Callable[[GapView], Floats] | None] = {
    "file": None,
    "margin up": lambda view: view.margin,
    "margin down": lambda view: -view.margin,
    "ef up": lambda view: view.ef,
    "ef down": lambda view: -view.ef,
}
"""Order of the browser → what rises in it; None for the source's own order."""


def browse(
    pair_set: PairSet,
    view: GapView | None,
    *,
    query: str = "",
    sort: str = "file",
    index: int = 0,
) -> BrowsedPair | None:
    """One pair of those whose prompt or responses hold `query`, in an order.

    Args:
        pair_set: N pairs.
        view: of the same set; without one the order is the source's.
        query: letter case, and how accents are encoded, don't matter; "" finds all.
        sort: a key of SORTS; pairs of which the value is not known come last.
        index: from 0; beyond either end it is the pair at that end.

    Returns:
        None if no pair holds the query.

    Raises:
        ConfigError: there is no such order.
    """
    if sort not in SORTS:
        raise ConfigError(f"there is no order {sort!r:.40}: choose one of {', '.join(SORTS)}.")
    order = _search(pair_set, query)
    rising = SORTS[sort]
    if view is not None and rising is not None:
        order = order[np.argsort(rising(view)[order], kind="stable")]
    if not len(order):
        return None
    place = min(max(int(index), 0), len(order) - 1)
    return _browsed(pair_set, view, int(order[place]), place, len(order))


def _browsed(
    pair_set: PairSet, view: GapView | None, number: int, place: int, found: int
) -> BrowsedPair:
    pair = pair_set.pairs[number]

    def known(values: Floats | None) -> float | None:
        return None if values is None or np.isnan(values[number]) else float(values[number])

    efs = {name: known(values) for name, values in view.known.items()} if view else {}
    parts = view.split.parts().items() if view else ()
    return BrowsedPair(
        index=place,
        count=found,
        line=pair.line,
        part=next((name for name, part in parts if number in part), ""),
        prompt=pair.prompt,
        chosen=pair.chosen,
        rejected=pair.rejected,
        efs={name: ef for name, ef in efs.items() if ef is not None},
        reward_margin=known(view.reward_margin if view else None),
        chosen_rating=pair.chosen_rating,
        rejected_rating=pair.rejected_rating,
        strength=pair.strength,
    )


def _search(pair_set: PairSet, query: str) -> Ints:
    """Indices of the pairs that hold the query; the folded texts and the last hits are kept."""
    needle = _folded(query.strip())
    if not needle:
        return np.arange(len(pair_set))
    return pair_set.kept.get(("hits", needle), lambda: _hits(pair_set, needle))


def _hits(pair_set: PairSet, needle: str) -> Ints:
    haystack = pair_set.kept.get("haystack", lambda: [_haystack(pair) for pair in pair_set.pairs])
    hits = [index for index, text in enumerate(haystack) if needle in text]
    return np.array(hits, dtype=np.int64)


def _haystack(pair: PreferencePair) -> str:
    turns = [turn["content"] for turn in pair.prompt]
    return _folded("\0".join([*turns, pair.chosen, pair.rejected]))


def _folded(text: str) -> str:
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


# -- what differs --

MOST_ALIGNED_WORDS = 8000
MARK = '<mark class="only">'

# A Chinese or Japanese character is a word, and so is a mark of punctuation; what belongs to the
# character before it (U+200D joins emoji, accents, variants) is never parted from it.
_CJK = "\u2e80-\u312f\u3190-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_ATTACHED = "\u3099\u309a\ufe00-\ufe0f\U000e0100-\U000e01ef"
_PUNCTUATION = r"!-/:-@\[-`{-~\u00a1\u00ab\u00bb\u00bf\u2010-\u2027\u2030-\u205e"
_WORD = re.compile(
    rf"\s+|[{_CJK}][{_ATTACHED}]*|[{_PUNCTUATION}][{_ATTACHED}]*|[^\s{_CJK}{_PUNCTUATION}]+"
)


def diff_html(chosen: str, rejected: str) -> tuple[str, str]:
    """Both texts as HTML, with what only one of them has in `<mark class="only">`.

    Nothing else is changed: without the marks and unescaped, it is the text again, so it is to be
    shown with its white space (`white-space: pre-wrap`). The words are those of a longest common
    subsequence; in texts of more than MOST_ALIGNED_WORDS, those that the other text doesn't have at
    all.
    """
    texts = _WORD.findall(chosen), _WORD.findall(rejected)
    words = [[part for part in text if not part.isspace()] for text in texts]
    first, second = (
        _marked(text, only) for text, only in zip(texts, _differing(*words), strict=True)
    )
    return first, second


def _differing(chosen: list[str], rejected: list[str]) -> tuple[list[bool], list[bool]]:
    """For each word whether it is marked."""
    if max(len(chosen), len(rejected)) > MOST_ALIGNED_WORDS:
        return _absent(chosen, rejected), _absent(rejected, chosen)
    characters: dict[str, str] = defaultdict(map(chr, count()).__next__)
    coded = ["".join(characters[word] for word in words) for words in (chosen, rejected)]
    only = [True] * len(chosen), [True] * len(rejected)
    for same in Indel.opcodes(*coded):
        if same.tag == "equal":
            for side, start, stop in (
                (0, same.src_start, same.src_end),
                (1, same.dest_start, same.dest_end),
            ):
                only[side][start:stop] = [False] * (stop - start)
    return only


def _absent(words: list[str], others: list[str]) -> list[bool]:
    there = set(others)
    return [word not in there for word in words]


def _marked(parts: list[str], only: list[bool]) -> str:
    """White space between two marked words is marked with them, unless the line ends there."""
    marks = iter(only)
    flags = [next(marks) if not part.isspace() else False for part in parts]
    for place in range(1, len(parts) - 1):
        if parts[place].isspace() and "\n" not in parts[place]:
            flags[place] = flags[place - 1] and flags[place + 1]
    pieces = []
    for is_only, group in groupby(zip(flags, parts, strict=True), key=lambda item: item[0]):
        text = html.escape("".join(part for _, part in group))
        pieces.append(f"{MARK}{text}</mark>" if is_only else text)
    return "".join(pieces)
