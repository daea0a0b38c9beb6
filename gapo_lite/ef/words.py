"""From a text to the words that lexical scores compare, and what is lost on the way.

    TOKENIZERS["rouge"]("It's 5 °C. Привет, 你好")      # [b"it", b"s", b"5", b"c"]
    TOKENIZERS["unicode"]("It's 5 °C. Привет, 你好")    # the same, "привет", "你" and "好" as UTF-8

`rouge` cuts as the rouge-score package does. `unicode` is for scripts that this cannot see. It
compares texts by what Unicode calls compatible and case-insensitive (UAX 15; `_folded`), where "ß"
is "ss", "²" is "2", "ﬁ" is "fi" and "Ａ" is "a". On a text of ASCII only, the two are the same.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import regex

WORTH_TELLING = 0.05  # of all letters and digits

# Every byte that is no ASCII letter or digit becomes a space, capitals become small.
_WORD_BYTES = bytes(
    ord(chr(byte).lower()) if byte < 128 and chr(byte).isalnum() else ord(" ")
    for byte in range(256)
)
_NO_WORD_BYTES = bytes(byte for byte in range(256) if _WORD_BYTES[byte] == ord(" "))
# The characters that have an ASCII letter or digit in them once they are lowercased.
_LOWERED_TO_ASCII = "\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}\N{KELVIN SIGN}"
_WORD_CHARACTER = re.compile(f"[0-9A-Za-z{_LOWERED_TO_ASCII}]")

# Letters of scripts that put no space between words; numerals that are letters, as 〇 of 二〇二六.
# Kana by script extensions, for the long-vowel mark ー that both kinds share; Thai's would take the
# apostrophe of the Ukrainian alphabet in, U+02BC.
_UNSPACED = r"""[[\p{L}\p{Nl}]&&[
    \p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}
    \p{sc=Thai}\p{sc=Lao}\p{sc=Khmer}\p{sc=Myanmar}\p{sc=Tibetan}
]]""".replace("\n", "").replace(" ", "")
_MARKS = r"\p{Mn}\p{Mc}"  # not the enclosing ones, which make a keycap of a digit
_WORD = regex.compile(
    rf"{_UNSPACED}[{_MARKS}]*|[[\p{{L}}\p{{N}}]--{_UNSPACED}][[\p{{L}}\p{{N}}{_MARKS}]--{_UNSPACED}]*",
    regex.V1,
)
# What changes no word, such as joiners, soft hyphens and variation selectors. The zero-width space
# is left, as it stands between words.
_INVISIBLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}--\u200b]+", regex.V1)
_LETTERS_LOST = regex.compile(rf"[[\p{{L}}\p{{N}}]--[\x00-\x7f{_LOWERED_TO_ASCII}]]+", regex.V1)
_LETTERS_FOLDED = regex.compile(f"[{_LOWERED_TO_ASCII}]")


@dataclass(frozen=True, slots=True)
class Unseen:
    """What a tokenizer does not see of some pairs.

    Attributes:
        num_pairs: how many pairs there are.
        num_unseen: as `count_unseen`.
        share: as `share_unseen`; 0 for the tokenizer "unicode", which sees all letters.
    """

    num_pairs: int
    num_unseen: int
    share: float

    def warning(self, ef: str, remedy: str, kind: str = "pairs") -> str:
        """What a person should know of it; "" for nothing.

        Args:
            ef: the metric, a key of EVALUATION_FACTORS.
            remedy: which settings to use where letters are lost.
            kind: what the pairs are called.
        """
        unseen = f"{ef} sees no word at all in a text of {self.num_unseen:,} of {self.num_pairs:,}"
        if self.num_unseen and not self.share:
            return (
                f"{unseen} {kind}, as there is no letter or digit in it: such a pair scores 0 "
                "however alike its texts are, so its margin says nothing. Leave it out if it is "
                "not meant."
            )
        share = f"{self.share:.0%}".replace("%", " %") if self.share >= 0.01 else "under 1 %"
        lost = f"{share} of all letters and digits are lost to"
        if self.num_unseen:
            found = f"{unseen} {kind}, and {lost} it"
        elif self.share > WORTH_TELLING:
            found = f"{lost} {ef} in {self.num_pairs:,} {kind}"
        else:
            return ""
        return (
            f"{found} (ROUGE's tokenizer knows a–z and 0–9 only): what is lost has no part in the "
            f"margins, and a pair without a word scores 0 however alike its texts are. For such "
            f"languages use {remedy}."
        )


def find_unseen(chosen: Sequence[str], rejected: Sequence[str], tokenizer: str) -> Unseen:
    """What the tokenizer, a key of TOKENIZERS, does not see of N pairs."""
    share = share_unseen(chosen, rejected) if tokenizer == "rouge" else 0.0
    return Unseen(len(chosen), count_unseen(chosen, rejected, tokenizer), share)


def count_unseen(chosen: Sequence[str], rejected: Sequence[str], tokenizer: str = "rouge") -> int:
    """Number of pairs with a text that is not blank and in which the tokenizer sees no word.

    ROUGE's knows the letters a to z and the digits 0 to 9 only, so a text in Chinese, Russian or
    Arabic has no words for it, and every lexical score of such a pair is 0 however alike the texts
    are. For "unicode" only texts without any letter or digit, as of emoji alone, have none.
    """
    unseen = _unseen_by_rouge if tokenizer == "rouge" else _unseen_by_unicode
    return sum(unseen(c) or unseen(r) for c, r in zip(chosen, rejected, strict=True))


def share_unseen(chosen: Sequence[str], rejected: Sequence[str]) -> float:
    """Share of the letters and digits, of all scripts and texts, that ROUGE's tokenizer drops.

    Returns:
        In [0, 1]; 0 where there is no letter or digit at all.
    """
    lost = seen = 0
    for texts in (chosen, rejected):
        for text in texts:
            seen += len(text.encode("ascii", "ignore").translate(None, _NO_WORD_BYTES))
            if not text.isascii():
                seen += len(_LETTERS_FOLDED.findall(text))
                lost += sum(map(len, _LETTERS_LOST.findall(text)))
    return lost / max(lost + seen, 1)


def rouge_words(text: str) -> list[bytes]:
    """ROUGE's words: runs of a to z and 0 to 9 after str.lower(), which makes "i" of "İ"."""
    small = text if text.isascii() else text.lower()
    return small.encode("ascii", "replace").translate(_WORD_BYTES).split()


def unicode_words(text: str) -> list[bytes]:
    """Words of any script, folded, as UTF-8.

    A word is a run of letters and numbers with the marks that follow them. In a script that puts no
    space between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) it is one letter
    with its marks. Punctuation, symbols and emoji are no words, nor is a mark without a letter.
    """
    if text.isascii():
        return rouge_words(text)
    return " ".join(_WORD.findall(_folded(text))).encode().split()


def _folded(text: str) -> str:
    """Unicode's NFKC_Casefold, but for the zero-width space; folding can undo the composing."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", _INVISIBLE.sub("", folded))


def _unseen_by_rouge(text: str) -> bool:
    return text.strip() != "" and _WORD_CHARACTER.search(text) is None


def _unseen_by_unicode(text: str) -> bool:
    return _unseen_by_rouge(text) and _WORD.search(_folded(text)) is None


TOKENIZERS: dict[str, Callable[[str], list[bytes]]] = {
    "rouge": rouge_words,
    "unicode": unicode_words,
}
