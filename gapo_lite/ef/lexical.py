"""Jaccard, ROUGE-1, ROUGE-2 and ROUGE-L F1, equal to the rouge-score package's to the last bit.

The naive equivalent of `lexical_scores(chosen, rejected, ["rougeL"])["rougeL"]` is

    scorer = rouge_score.rouge_scorer.RougeScorer(["rougeL"])
    [scorer.score(c, r)["rougeL"].fmeasure for c, r in zip(chosen, rejected)]

Here the texts are cut by a byte table, each word becomes one character, rapidfuzz finds the longest
common subsequence, and numpy counts n-grams for about a thousand pairs at a time. The characters
are given out one by one: unlike with hashes, no two words can share one. What a word is can be told
(`tokenizer`): rouge-score's by default, or one for scripts that rouge-score cannot see.

    python benchmarks/ef_scoring.py    # compares numbers and seconds
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import count

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from gapo_lite.ef.words import TOKENIZERS
from gapo_lite.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Texts = tuple[str, ...]
"""P texts with one character a word."""

CHUNK_PAIRS = 1024
CHUNK_CHARS = 4_000_000
REMEMBERED_WORDS = 1 << 18
CHARACTERS = 0x110000  # that Python's str has


def lexical_scores(
    chosen: Sequence[str],
    rejected: Sequence[str],
    efs: Sequence[str],
    *,
    use_stemmer: bool = False,
    tokenizer: str = "rouge",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Floats]:
    """Scores of all pairs by several evaluation factors, which share one tokenising.

    Args:
        chosen: N texts, ROUGE's targets.
        rejected: N texts, ROUGE's predictions.
        efs: keys of LEXICAL.
        use_stemmer: compare words longer than three letters, ASCII ones only, by their stem (nltk's
            Porter stemmer).
        tokenizer: what a word is, a key of TOKENIZERS.
        progress: called with (pairs done, N) whenever a chunk is finished.

    Returns:
        For each of `efs` an array (N,).
    """
    scores = {ef: np.zeros(len(chosen)) for ef in efs}
    encoder = _Encoder(use_stemmer, tokenizer)
    for place in _slices(chosen, rejected):
        pairs = map(encoder.pair, chosen[place], rejected[place])
        coded_chosen, coded_rejected = zip(*pairs, strict=True)
        for ef in efs:
            scores[ef][place] = LEXICAL[ef](coded_chosen, coded_rejected)
        if progress is not None:
            progress(place.stop, len(chosen))
    return scores


class _Encoder:
    """Turns texts into strings with one character a word; equal words have equal characters.

    rapidfuzz compares a str by its characters, but anything else by hashes. Words and texts are
    remembered, as one response often stands in many pairs, until the memory would get too large.
    """

    def __init__(self, use_stemmer: bool, tokenizer: str):
        self._split = TOKENIZERS[tokenizer]
        self._stem = _memoised_stemmer() if use_stemmer else None
        self._forget()

    def _forget(self) -> None:
        characters: dict[bytes, str] = defaultdict(map(chr, count()).__next__)
        self._words = characters if self._stem is None else _StemmedWords(characters, self._stem)
        self._texts: dict[str, str] = {}

    def pair(self, chosen: str, rejected: str) -> tuple[str, str]:
        """The two texts of one pair; only their own words can be compared.

        Raises:
            DataError: there are fewer characters than different words in this pair.
        """
        most_new_words = (len(chosen) + len(rejected)) // 2 + 1
        if len(self._words) + most_new_words > REMEMBERED_WORDS:
            self._forget()
        try:
            return self._text(chosen), self._text(rejected)
        except ValueError:  # of chr()
            raise DataError(
                f"A pair starting with {chosen[:30]!r} has more than {CHARACTERS:,} different "
                "words, more than can be told apart here. Take the pair out of the data."
            ) from None

    def _text(self, text: str) -> str:
        if text not in self._texts:
            self._texts[text] = "".join(map(self._words.__getitem__, self._split(text)))
        return self._texts[text]


class _StemmedWords(dict[bytes, str]):
    """Gives a word the character of its stem."""

    def __init__(self, characters: dict[bytes, str], stem: Callable[[bytes], bytes]):
        self._characters = characters
        self._stem = stem

    def __missing__(self, word: bytes) -> str:
        has_stem = len(word) > 3 and word.isascii()  # longer than three, as rouge-score does
        character = self[word] = self._characters[self._stem(word) if has_stem else word]
        return character


def _memoised_stemmer() -> Callable[[bytes], bytes]:
    from nltk.stem.porter import PorterStemmer  # slow to import

    stem = PorterStemmer().stem
    return lru_cache(REMEMBERED_WORDS)(lambda word: stem(word.decode("ascii")).encode("ascii"))


def _slices(chosen: Sequence[str], rejected: Sequence[str]) -> Iterator[slice]:
    """Slices of at most CHUNK_PAIRS pairs and, where there is more than one pair, CHUNK_CHARS."""
    start = characters = 0
    for index in range(len(chosen)):
        size = len(chosen[index]) + len(rejected[index])
        full = index - start == CHUNK_PAIRS or characters + size > CHUNK_CHARS
        if full and index > start:
            yield slice(start, index)
            start, characters = index, 0
        characters += size
    if start < len(chosen):
        yield slice(start, len(chosen))


def _rouge_l(chosen: Texts, rejected: Texts) -> Floats:
    common = np.fromiter(map(LCSseq.similarity, chosen, rejected), np.float64, len(chosen))
    return _f1(common, _lengths(chosen), _lengths(rejected))


def _rouge_n(chosen: Texts, rejected: Texts, n: int) -> Floats:
    chosen_grams, in_chosen = _ngrams(chosen, n)
    rejected_grams, in_rejected = _ngrams(rejected, n)
    both, i, j = np.intersect1d(
        chosen_grams, rejected_grams, assume_unique=True, return_indices=True
    )
    counts = np.minimum(in_chosen[i], in_rejected[j])
    common = np.bincount(_pair_of(both, n), counts, minlength=len(chosen))
    lengths = (np.maximum(_lengths(texts) - (n - 1), 0) for texts in (chosen, rejected))
    return _f1(common, *lengths)


def _jaccard(chosen: Texts, rejected: Texts) -> Floats:
    sets = _ngrams(chosen, 1)[0], _ngrams(rejected, 1)[0]
    parts = *sets, np.intersect1d(*sets, assume_unique=True)
    in_chosen, in_rejected, in_both = (
        np.bincount(_pair_of(words, 1), minlength=len(chosen)) for words in parts
    )
    in_either = in_chosen + in_rejected - in_both
    return np.divide(in_both, in_either, out=np.zeros(len(chosen)), where=in_either > 0)


def _ngrams(texts: Texts, n: int) -> tuple[Ints, Ints]:
    """Distinct n-grams of each text, n being 1 or 2, with how often the text has them.

    An n-gram is one integer: the pair's number and its characters as digits to the base CHARACTERS
    (51 bits at most). Without counts np.unique would hash, which is slower here.
    """
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4")
    pair = np.repeat(np.arange(len(texts)), _lengths(texts))
    grams = pair * CHARACTERS + codes
    if n == 2:
        grams = (grams[:-1] * CHARACTERS + codes[1:])[pair[:-1] == pair[1:]]
    return np.unique(grams, return_counts=True)


def _pair_of(ngrams: Ints, n: int) -> Ints:
    return ngrams // CHARACTERS**n


def _lengths(texts: Texts) -> Ints:
    return np.fromiter(map(len, texts), np.int64, len(texts))


def _f1(common: NDArray, in_chosen: Ints, in_rejected: Ints) -> Floats:
    """rouge-score's F1 with its order of operations, so that not a bit differs. All (P,)."""
    precision = common / np.maximum(in_rejected, 1)
    recall = common / np.maximum(in_chosen, 1)
    both = precision + recall
    return np.divide(2 * precision * recall, both, out=np.zeros(len(both)), where=both > 0)


LEXICAL: dict[str, Callable[[Texts, Texts], Floats]] = {
    "jaccard": _jaccard,
    "rouge1": partial(_rouge_n, n=1),
    "rouge2": partial(_rouge_n, n=2),
    "rougeL": _rouge_l,
}
