"""Lexical scores: equal to rouge-score to the last bit, and fractions one can work out by hand."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from plain_words import any_script, plain_words
from rouge_score import tokenizers
from rouge_score.rouge_scorer import RougeScorer

from gapo_lite.ef import lexical, score_pairs
from gapo_lite.ef.lexical import LEXICAL, lexical_scores
from gapo_lite.errors import DataError

ROUGE = ["rouge1", "rouge2", "rougeL"]


class RememberingTokenizer:
    """rouge-score's own tokenizer, asked once a text, as its stemmer is slow."""

    def __init__(self, use_stemmer: bool):
        self.tokenize = functools.cache(tokenizers.DefaultTokenizer(use_stemmer).tokenize)


class PlainTokenizer:
    """The tokenizer "unicode" as a plain loop, for rouge-score to count with."""

    def __init__(self, use_stemmer: bool):
        self._stem = PorterStemmer().stem if use_stemmer else str

    def tokenize(self, text: str) -> list[str]:
        words = plain_words(text)
        return [self._stem(word) if word.isascii() and len(word) > 3 else word for word in words]


TOKENIZERS = {"rouge": RememberingTokenizer, "unicode": PlainTokenizer}


def reference(
    chosen: list[str],
    rejected: list[str],
    efs: list[str],
    use_stemmer: bool,
    tokenizer: str = "rouge",
) -> dict:
    """What rouge-score says, and the same kind of fraction of its tokens for Jaccard."""
    return counted(chosen, rejected, efs, TOKENIZERS[tokenizer](use_stemmer))


def counted(
    chosen: list[str],
    rejected: list[str],
    efs: list[str],
    tokenizer: RememberingTokenizer | PlainTokenizer,
) -> dict:
    scorer = RougeScorer([ef for ef in efs if ef != "jaccard"], tokenizer=tokenizer)
    rows = [
        scorer.score(target, prediction)
        for target, prediction in zip(chosen, rejected, strict=True)
    ]
    scores = {ef: np.array([row[ef].fmeasure for row in rows]) for ef in efs if ef != "jaccard"}
    if "jaccard" in efs:
        sets = [
            [set(tokenizer.tokenize(t)) for t in pair]
            for pair in zip(chosen, rejected, strict=True)
        ]
        scores["jaccard"] = np.array([len(a & b) / max(len(a | b), 1) for a, b in sets])
    return scores


def assert_same_bits(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for ef in theirs:
        np.testing.assert_array_equal(ours[ef], theirs[ef], err_msg=ef)


def of_one(ef: str, chosen: str, rejected: str, **options: bool | str) -> float:
    return float(score_pairs([chosen], [rejected], ef, **options)[0])


def texts_of(rows: list[dict]) -> tuple[list[str], list[str]]:
    return [row["chosen"] for row in rows], [row["rejected"] for row in rows]


def test_every_score_equals_rouge_score_on_all_real_pairs(real_rows):
    chosen, rejected = texts_of(real_rows)
    assert len(chosen) == 3101
    ours = lexical_scores(chosen, rejected, list(LEXICAL))
    assert_same_bits(ours, reference(chosen, rejected, list(LEXICAL), use_stemmer=False))


def test_stemmed_ngram_scores_equal_rouge_score_on_all_real_pairs(real_rows):
    chosen, rejected = texts_of(real_rows)
    efs = ["jaccard", "rouge1", "rouge2"]
    ours = lexical_scores(chosen, rejected, efs, use_stemmer=True)
    assert_same_bits(ours, reference(chosen, rejected, efs, use_stemmer=True))


def test_stemmed_rouge_l_equals_rouge_score_on_a_sample_of_real_pairs(real_rows):
    # All of them take rouge-score some ten seconds more: `benchmarks/ef_scoring.py` compares them.
    chosen, rejected = texts_of(random.Random(0).sample(real_rows, 500))
    ours = lexical_scores(chosen, rejected, ["rougeL"], use_stemmer=True)
    assert_same_bits(ours, reference(chosen, rejected, ["rougeL"], use_stemmer=True))


any_character = st.characters(exclude_categories=())  # lone surrogates too
any_text = st.text(any_character, max_size=60)
wordy_text = st.lists(
    st.sampled_from(
        ["\u0130", "ß", "\u212a", "ſ", "ﬁ", "Ａ", "１", "²", "ǅ", "Σ", "ς", "ı", "e\u0307"]
    )
    | st.sampled_from(["a", "A", "b", "0", "9", "_", "'", "the", "The", "running", "runs", "flies"])
    | st.sampled_from([" ", "\n", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2028", "\x00"])
    | st.sampled_from(["\ud800", "\udfff", "\ud83d\ude00", "😀", "日本語", "yyyy", "sses", "ional"])
    | st.text("aiesyngd", max_size=9)
    | any_character,
    max_size=40,
).map("".join)
text = any_text | wordy_text


@settings(max_examples=400, deadline=None)
@given(text, text, st.booleans())
@example("\u0130stanbul", "istanbul", False)
@example("5 \u212aelvin", "5 Kelvin", True)
@example("straße", "strasse", False)
@example("\ud800a b\udfff", "a b", False)
@example("caresses flying dying skies", "caress fly die sky", True)
@example("a b a b a", "b a b", False)
@example("", "", True)
def test_every_score_equals_rouge_score_for_any_text(chosen, rejected, use_stemmer):
    ours = lexical_scores([chosen], [rejected], list(LEXICAL), use_stemmer=use_stemmer)
    assert_same_bits(ours, reference([chosen], [rejected], list(LEXICAL), use_stemmer))


@pytest.mark.parametrize(
    ("ef", "expected"),
    [
        ("jaccard", 3 / 6),  # the, cat, mat of the, cat, sat, on, mat, ate
        ("rouge1", 8 / 11),  # 4 common words of 6 and 5
        ("rouge2", 4 / 9),  # "the cat" and "the mat" of 5 and 4
        ("rougeL", 8 / 11),  # "the cat the mat"
    ],
)
def test_scores_are_the_fractions_one_gets_by_hand(ef, expected):
    score = of_one(ef, "The cat sat on the mat.", "the cat ate the mat")
    assert score == pytest.approx(expected, rel=1e-15)


def test_a_repeated_word_counts_as_often_as_both_have_it():
    assert of_one("rouge1", "no no no", "no") == 0.5  # P = 1/1, R = 1/3
    assert of_one("jaccard", "no no no", "no") == 1.0


def test_order_matters_to_rouge_2_and_rouge_l_only():
    scores = {ef: of_one(ef, "a b c d", "d c b a") for ef in LEXICAL}
    assert scores == {"jaccard": 1.0, "rouge1": 1.0, "rouge2": 0.0, "rougeL": 0.25}


def test_the_stemmer_joins_words_of_more_than_three_letters():
    assert of_one("rouge1", "walking", "walked") == 0.0
    assert of_one("rouge1", "walking", "walked", use_stemmer=True) == 1.0
    assert of_one("rouge1", "its", "it", use_stemmer=True) == 0.0


@pytest.mark.parametrize("ef", LEXICAL)
@pytest.mark.parametrize("blank", ["", " \n\t", "…!?", "你好", "\ud800"])
def test_a_text_without_a_word_scores_zero_even_against_itself(ef, blank):
    assert of_one(ef, blank, blank) == 0.0
    assert of_one(ef, blank, "word by word") == 0.0
    assert of_one(ef, "word by word", blank) == 0.0


@pytest.mark.parametrize("ef", LEXICAL)
def test_the_same_text_scores_exactly_one(ef):
    assert of_one(ef, "One, two and three!", "one two AND three") == 1.0


def test_one_word_has_no_bigram():
    assert of_one("rouge2", "yes", "yes") == 0.0


@pytest.mark.parametrize("ef", LEXICAL)
def test_swapping_chosen_and_rejected_changes_no_score(ef, real_rows):
    chosen, rejected = texts_of(real_rows[:300])
    there, back = score_pairs(chosen, rejected, ef), score_pairs(rejected, chosen, ef)
    np.testing.assert_allclose(there, back, rtol=1e-15)


def test_a_score_does_not_depend_on_the_pairs_beside_it(real_rows, monkeypatch):
    chosen, rejected = texts_of(real_rows[:200])
    together = lexical_scores(chosen, rejected, list(LEXICAL))
    monkeypatch.setattr(lexical, "CHUNK_PAIRS", 7)
    monkeypatch.setattr(lexical, "CHUNK_CHARS", 9000)
    monkeypatch.setattr(lexical, "REMEMBERED_WORDS", 500)
    assert_same_bits(lexical_scores(chosen, rejected, list(LEXICAL)), together)


def test_slices_cover_all_pairs_in_order_and_keep_their_limits(monkeypatch):
    monkeypatch.setattr(lexical, "CHUNK_PAIRS", 3)
    monkeypatch.setattr(lexical, "CHUNK_CHARS", 10)
    chosen = ["", "12345678901", "", "", "", "", "12345", "12345", "1"]
    slices = list(lexical._slices(chosen, [""] * len(chosen)))
    assert [(place.start, place.stop) for place in slices] == [
        (0, 1),
        (1, 2),
        (2, 5),
        (5, 8),
        (8, 9),
    ]


def test_tens_of_thousands_of_different_words_are_told_apart():
    words = [f"w{number}" for number in range(70_000)]  # passes 2^8, the surrogates and 2^16
    turned = words[40_000:] + words[:40_000]
    text, other = " ".join(words), " ".join(turned)
    assert of_one("rouge1", text, other) == 1.0
    assert of_one("rougeL", text, other) == pytest.approx(4 / 7, rel=1e-12)
    assert of_one("rouge1", text, " ".join(f"v{number}" for number in range(70_000))) == 0.0


def test_more_different_words_than_characters_are_refused():
    words = " ".join(f"{number:x}" for number in range(0x110000))
    assert of_one("rouge1", words, "0 1") > 0
    with pytest.raises(DataError, match="more than 1,114,112 different words"):
        of_one("rougeL", words, "some other words")


def test_progress_is_told_after_each_chunk(monkeypatch):
    monkeypatch.setattr(lexical, "CHUNK_PAIRS", 4)
    calls: list[tuple[int, int]] = []
    score_pairs(["a"] * 10, ["b"] * 10, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(4, 10), (8, 10), (10, 10)]


@settings(max_examples=300, deadline=None)
@given(any_script, any_script, st.booleans())
@example("Straße İstanbul", "STRASSE i\u0307stanbul", False)
@example("flying flies наглые", "fly fly нагл", True)
def test_unicode_scores_equal_rouge_scores_of_plainly_cut_words(chosen, rejected, use_stemmer):
    settings = {"use_stemmer": use_stemmer, "tokenizer": "unicode"}
    ours = lexical_scores([chosen], [rejected], list(LEXICAL), **settings)
    assert_same_bits(ours, reference([chosen], [rejected], list(LEXICAL), **settings))


def test_unicode_scores_of_a_sample_of_real_pairs_equal_those_of_plainly_cut_words(real_rows):
    chosen, rejected = texts_of(random.Random(0).sample(real_rows, 200))
    ours = lexical_scores(chosen, rejected, list(LEXICAL), tokenizer="unicode")
    expected = reference(chosen, rejected, list(LEXICAL), use_stemmer=False, tokenizer="unicode")
    assert_same_bits(ours, expected)


def test_both_tokenizers_agree_to_the_last_bit_on_all_real_pairs_in_ascii(real_rows):
    rows = [row for row in real_rows if (row["chosen"] + row["rejected"]).isascii()]
    assert len(rows) == 2111
    for use_stemmer in (False, True):
        rouge, unicode = (
            lexical_scores(
                *texts_of(rows), list(LEXICAL), use_stemmer=use_stemmer, tokenizer=tokenizer
            )
            for tokenizer in ("rouge", "unicode")
        )
        assert_same_bits(unicode, rouge)


def test_both_tokenizers_nearly_agree_on_real_english_with_other_characters(real_rows):
    # They differ by words such as "naïve", which ROUGE's cuts in two, by "m²" and by other scripts;
    # most (0.16) where a response is phonetic spelling, "[ɪnˈtɜːrprɪˈteɪʃənz]".
    rows = [row for row in real_rows if not (row["chosen"] + row["rejected"]).isascii()]
    rouge, unicode = (
        score_pairs(*texts_of(rows), tokenizer=tokenizer) for tokenizer in ("rouge", "unicode")
    )
    apart = abs(unicode - rouge)
    assert apart.mean() < 0.002
    assert (apart > 0.03).mean() < 0.005


@settings(max_examples=200, deadline=None)
@given(any_script, any_script)
def test_unicode_scores_lie_in_0_to_1_whichever_text_is_the_first(chosen, rejected):
    there, back = (
        lexical_scores([a], [b], list(LEXICAL), tokenizer="unicode")
        for a, b in ((chosen, rejected), (rejected, chosen))
    )
    for ef in LEXICAL:
        assert 0 <= there[ef][0] <= 1
        assert there[ef][0] == pytest.approx(back[ef][0], rel=1e-15)


@settings(max_examples=200, deadline=None)
@given(any_script)
def test_the_same_text_of_any_script_scores_one_where_there_is_a_word(text):
    words = len(plain_words(text))
    scores = lexical_scores([text], [text], list(LEXICAL), tokenizer="unicode")
    needed = {"jaccard": 1, "rouge1": 1, "rouge2": 2, "rougeL": 1}
    assert {ef: float(score[0]) for ef, score in scores.items()} == {
        ef: float(words >= needed[ef]) for ef in LEXICAL
    }


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("我喜欢吃苹果。", "我喜欢吃香蕉。", 8 / 12),  # 4 of 6 letters
        ("猫が好き", "犬が好き", 6 / 8),
        ("Я люблю чай", "я ЛЮБЛЮ кофе", 4 / 6),
        ("أحب الشاي", "أحب القهوة", 2 / 4),
        ("मुझे चाय पसंद है", "मुझे कॉफ़ी पसंद है", 6 / 8),
        ("น้ำชา", "น้ำตา", 6 / 8),  # น้ํ า and า of four each
        ("I ♥ 東京 2020", "i love 東京!", 6 / 8),
        ("très déjà", "tre\u0300s de\u0301ja\u0300", 1.0),
        ("ＡＢＣ １２３", "abc 123", 1.0),
        ("Straße", "STRASSE", 1.0),
        ("İstanbul", "i\u0307stanbul", 1.0),
        ("İstanbul", "istanbul", 0.0),  # the dot is a mark of its own
        ("die Straße 😀😀", "die Straße", 1.0),
        ("😀", "😀", 0.0),
    ],
)
def test_unicode_scores_are_the_fractions_one_gets_by_hand(chosen, rejected, expected):
    score = of_one("rougeL", chosen, rejected, tokenizer="unicode")
    assert score == pytest.approx(expected, rel=1e-15)


def test_the_stemmer_leaves_words_of_other_scripts_alone():
    both = {"tokenizer": "unicode", "use_stemmer": True}
    assert of_one("rouge1", "walking über", "walked über", **both) == 1.0
    assert of_one("rouge1", "naïves", "naïve", **both) == 0.0


def test_rouge_sees_nothing_in_scripts_that_unicode_sees():
    assert (
        of_one("rougeL", "你好", "你好")
        == of_one("rougeL", "你好", "你好", tokenizer="rouge")
        == 0.0
    )
    assert of_one("rougeL", "你好", "你好", tokenizer="unicode") == 1.0
