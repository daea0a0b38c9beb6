"""The repetition gauge: numbers one can count by hand, in any script."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gapo_lite.repetition import repetition

SENTENCE = "The quick brown fox jumps over the lazy dog while the sun sets behind the hills. "
LOOP = "Say it again and again, my friend. " * 8
"""Its period is 35 characters of 279."""


def test_it_is_the_share_of_stretches_that_came_before():
    assert repetition("a" * 39) == 1 - 1 / 20
    assert repetition("abcdefghij" * 10) == 1 - 10 / 81
    assert repetition(LOOP) == 1 - 35 / 260


@pytest.mark.parametrize("text", ["", " \n\t", "a" * 38, "ha ha ha ha", "\0" * 38, SENTENCE])
def test_short_texts_and_those_that_go_on_have_none(text):
    assert repetition(text) == 0.0


def test_case_and_space_do_not_hide_a_loop():
    assert repetition(SENTENCE + SENTENCE.upper().replace(" ", "\n ")) > 0.4


@pytest.mark.parametrize("phrase", ["我喜欢吃苹果和香蕉。", "ฉันชอบกินแอปเปิ้ล", "🙂\ud800\x1b[2J é"])
def test_it_sees_loops_in_any_script(phrase):
    assert 0.7 < repetition(phrase * 12) < 1


def test_it_imports_no_torch():
    code = "import sys, gapo_lite.repetition; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
