"""What is a word: ROUGE's to the last character, and any script's as a plain loop finds them."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain_words import any_script, plain_words
from rouge_score import tokenize

from gapo_lite.ef import count_unseen, find_unseen, share_unseen
from gapo_lite.ef.words import rouge_words, unicode_words


def cut(text: str) -> list[str]:
    return [word.decode() for word in unicode_words(text)]


def test_every_character_of_unicode_is_cut_as_rouge_score_cuts_it():
    for start in range(0, 0x110000, 0x1000):
        block = "xY".join(map(chr, range(start, start + 0x1000)))
        words = [word.decode("ascii") for word in rouge_words(block)]
        assert words == tokenize.tokenize(block, None), hex(start)


def test_every_character_of_unicode_is_cut_as_the_plain_loop_cuts_it():
    # Characters that this Python does not know yet are left out: `regex` may be newer.
    for start in range(0, 0x110000, 0x1000):
        known = [
            c for c in map(chr, range(start, start + 0x1000)) if unicodedata.category(c) != "Cn"
        ]
        for joint in ("xY", " ", "ก", "क"):
            block = joint.join(known)
            assert cut(block) == plain_words(block), (hex(start), joint)


@settings(max_examples=400, deadline=None)
@given(any_script)
@example("\u0301a\u0301 \u0301")
@example("ΐ Ϊ́ ΐ")
@example("a\u200d\u0301")
@example("กa\u0301ก\u0301")
def test_any_text_is_cut_as_the_plain_loop_cuts_it(text):
    assert cut(text) == plain_words(text)


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_text_is_cut_alike_by_both(text):
    assert unicode_words(text) == rouge_words(text)
    assert cut(text) == plain_words(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("我爱你，2026年！", ["我", "爱", "你", "2026", "年"]),
        ("二〇二六年", ["二", "〇", "二", "六", "年"]),
        ("ラーメンを食べる。", [*"ラーメンを食べる"]),
        ("ﾗｰﾒﾝ", [*"ラーメン"]),  # half-width
        ("Мама мыла раму.", ["мама", "мыла", "раму"]),
        ("мʼята", ["мʼята"]),  # the apostrophe that is a letter
        ("مرحبا بالعالم ٣", ["مرحبا", "بالعالم", "٣"]),
        ("می\u200cخواهم", ["میخواهم"]),
        ("हिन्दी में लिखो", ["हिन्दी", "में", "लिखो"]),
        ("ที่นี่ ๑๒๓", ["ที่", "นี่", "๑๒๓"]),
        ("ລາວ", ["ລ", "າ", "ວ"]),
        ("ខ្មែរ", ["ខ្", "មែ", "រ"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("བོད་ཡིག", ["བོ", "ད", "ཡི", "ག"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("GPT-4模型と3つのAIモデル", ["gpt", "4", *"模型と", "3", *"つの", "ai", *"モデル"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("ΣΊΣΥΦΟΣ Σίσυφος", ["σίσυφοσ", "σίσυφοσ"]),
        ("İ i", ["i\u0307", "i"]),
        ("Ｆｕｌｌ　ｗｉｄｔｈ１２", ["full", "width12"]),
        ("ﬁve m² it’s", ["five", "m2", "it", "s"]),
        ("snake_case so\u00adft zero\u200bwidth", ["snake", "case", "soft", "zero", "width"]),
        ("👩‍👩‍👧‍👦 👍🏽 ❤️ 🇩🇪 …!?", []),
        ("1️⃣ 2", ["1", "2"]),
        ("\u0301 \ud800", []),
    ],
)
def test_words_of_any_script(text, words):
    assert cut(text) == words


@pytest.mark.parametrize("text", ["é ü ñ", "Việt Nam", "가각", "ガギ", "ΐ", "क़"])
def test_composed_and_decomposed_text_have_the_same_words(text):
    forms = {form: cut(unicodedata.normalize(form, text)) for form in ("NFC", "NFD", "NFKD")}
    assert forms["NFC"] == forms["NFD"] == forms["NFKD"] != []


def test_unseen_texts_are_exactly_those_without_a_token_of_rouge_score():
    for start in range(0, 0x110000):
        character = chr(start)
        seen = count_unseen([character], ["a"]) == 0
        assert seen == (
            character.isspace()
            or any("0" <= c <= "9" or "a" <= c <= "z" for c in character.lower())
        )


def test_pairs_with_a_text_that_the_tokenizer_cannot_see_are_counted():
    chosen = ["Привет", "hello", "", " \n", "مرحبا", "5 \u212aelvin", "…", "\u0130", "\u212a"]
    rejected = ["hello", "你好", "", "hello", "مرحبا", "5 K", "hello", "i", "k"]
    assert count_unseen(chosen, rejected) == 4
    assert count_unseen(chosen, rejected, "unicode") == 1  # …


@settings(deadline=None)
@given(any_script)
def test_a_text_is_unseen_if_it_has_no_word_and_is_not_blank(text):
    for tokenizer, words in (("rouge", rouge_words), ("unicode", unicode_words)):
        expected = text.strip() != "" and not words(text)
        assert count_unseen([text], ["a"], tokenizer) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected", "share"),
    [
        (["abc"], ["a1"], 0.0),
        (["abc"], ["где"], 1 / 2),
        (["café"], ["3½"], 2 / 6),  # é and ½
        (["你好"], ["😀 …"], 1.0),
        (["हि"], ["\u212aa\u0130"], 1 / 4),  # a mark is no letter; these two are lowered to k and i
        (["…"], [" "], 0.0),
        ([], [], 0.0),
    ],
)
def test_the_share_of_letters_and_digits_that_rouge_loses(chosen, rejected, share):
    assert share_unseen(chosen, rejected) == pytest.approx(share, rel=1e-15)


def test_a_letter_is_lost_if_it_is_in_no_token_of_rouge_score():
    lost = total = 0
    everything = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) != "Cn"]
    for character in everything:
        if unicodedata.category(character)[0] in "LN":
            total += 1
            lost += not tokenize.tokenize(character, None)
    assert share_unseen(["".join(everything)], [""]) == lost / total


def told(chosen: list[str], rejected: list[str], tokenizer: str = "rouge") -> str:
    return find_unseen(chosen, rejected, tokenizer).warning("rougeL", "REMEDY")


def test_what_is_lost_is_told_with_its_share_and_what_to_do():
    text = told(["Привет", "hello", "a"], ["пока", "bye", "b"])
    assert text.startswith(
        "rougeL sees no word at all in a text of 1 of 3 pairs, and 50 % of all letters and digits "
        "are lost to it (ROUGE's tokenizer knows a–z and 0–9 only)"
    )
    assert text.endswith("use REMEDY.")
    assert told(["Привет", "hello"], ["пока", "bye"], "unicode") == ""


def test_a_text_in_part_of_another_script_is_told_from_a_share_of_5_percent_on():
    assert told(["é" + "a" * 19], ["b"]) == ""
    text = told(["é" + "a" * 9], ["b" * 9])
    assert text.startswith("5 % of all letters and digits are lost to rougeL in 1 pairs (ROUGE's")


def test_a_small_share_is_not_told_as_none():
    text = told(["я", "a" * 1000], ["b", "c"])
    assert "in a text of 1 of 2 pairs, and under 1 % of all letters" in text


@pytest.mark.parametrize("tokenizer", ["rouge", "unicode"])
def test_texts_without_any_letter_are_told_whatever_the_tokenizer(tokenizer):
    text = told(["😀", "yes"], ["👍", "no"], tokenizer)
    assert text.startswith("rougeL sees no word at all in a text of 1 of 2 pairs, as there is no")
    assert "REMEDY" not in text
