"""The tokenizer "unicode" as a plain loop, without a care for speed, and texts to try it on."""

from __future__ import annotations

import re
import unicodedata

from hypothesis import strategies as st

UNSPACED = re.compile(
    "CJK |HIRAGANA |KATAKANA|HENTAIGANA |THAI |LAO |KHMER |MYANMAR |TIBETAN |IDEOGRAPHIC |"
    "VERTICAL KANA |VERTICAL IDEOGRAPHIC |HANGZHOU |MASU MARK|OLD CHINESE "
)
INVISIBLE = {
    chr(code)
    for first, last in [
        *[(0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5)],
        *[(0x180B, 0x180F), (0x200C, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F)],
        *[(0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0)],
        *[(0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF)],
    ]
    for code in range(first, last + 1)
}  # Unicode's Default_Ignorable_Code_Point

_PIECES = """
    漢字 〇 ー かな カナ ｶﾞ 々 ไทย น้ำ ๑๒ ລາວ ខ្មែរ မြန်မာ བོད हिन्दी में Привет привет مرحبا ٣ 한국어 é ²
    Straße STRASSE İ I a The running runs _ ' ’ ʼ - 😀 1️⃣ ½
"""
_MARKS = "\u0301\u0307\u0300\u3099\u20e3\ufe0f\u200d\u200b"
any_script = st.lists(
    st.sampled_from([*_PIECES.split(), *_MARKS])
    | st.sampled_from(" \n")
    | st.characters(exclude_categories=("Cn",)),
    max_size=30,
).map("".join)
"""Texts of all scripts, of characters that this Python knows (regex may know newer ones)."""


def plain_words(text: str) -> list[str]:
    """The tokenizer "unicode" as a loop over characters, by their categories and names."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = unicodedata.normalize("NFKC", "".join(c for c in text if c not in INVISIBLE))
    words: list[str] = []
    run = False  # whether a letter or number would belong to the last word
    marks = False  # whether a mark would
    for character in text:
        category = unicodedata.category(character)
        if category in ("Mn", "Mc"):
            if marks:
                words[-1] += character
        elif category[0] not in "LN":
            run = marks = False
        else:
            name = unicodedata.name(character, "")
            alone = category not in ("Nd", "No") and UNSPACED.match(name) is not None
            if run and not alone:
                words[-1] += character
            else:
                words.append(character)
            run, marks = not alone, True
    return words
