"""Lengths without tokens say what tokenising would do."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapo_lite.batching import tokenize_pairs
from gapo_lite.errors import DataError, ModelError
from gapo_lite.lengths import Cuts, count_tokens, cut
from gapo_lite.model import load_tokenizer
from gapo_lite.types import PreferencePair


def pair(prompt: str, chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair([{"role": "user", "content": prompt}], chosen, rejected)


def tokenized_cuts(pairs: list[PreferencePair], tokenizer, **limits: int) -> Cuts:
    """What tokenize_pairs, which makes the tokens, says of them."""
    try:
        made = tokenize_pairs(pairs, tokenizer, **limits)
    except DataError:  # nothing is left
        return Cuts(0, 0, len(pairs))
    return Cuts(made.num_prompts_truncated, made.num_responses_truncated, made.num_dropped)


@pytest.fixture(scope="module")
def smol():
    return load_tokenizer("embedded:smollm2-135m-instruct")


@pytest.fixture(scope="module")
def real_pairs(real_rows: list[dict]) -> list[PreferencePair]:
    rows = real_rows[::7]
    return [pair(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


def test_counts_are_the_lengths_of_the_token_rows(real_pairs, smol):
    tokens = tokenize_pairs(real_pairs, smol, max_length=10**6, max_prompt_length=10**6).pairs
    lengths = count_tokens(real_pairs, smol)
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [
        [len(one.prompt_ids), len(one.chosen_ids), len(one.rejected_ids)] for one in tokens
    ]


def test_a_response_counts_its_end_of_turn(smol):
    assert count_tokens([pair("Hi", "yes", "yes yes")], smol)[0, 1:].tolist() == [2, 3]


@pytest.mark.parametrize(
    "limits", [(2048, 1800), (512, 400), (256, 40), (100, 100), (60, 50), (30, 4), (8, 1), (8, 8)]
)
def test_cuts_of_real_pairs_are_those_of_tokenising(real_pairs, smol, limits):
    limits = dict(zip(("max_length", "max_prompt_length"), limits, strict=True))
    assert cut(count_tokens(real_pairs, smol), **limits) == tokenized_cuts(
        real_pairs, smol, **limits
    )


SIZES = st.tuples(*[st.integers(0, 30)] * 3)


@given(st.lists(SIZES, min_size=1, max_size=6), st.integers(8, 90), st.integers(1, 90))
@settings(deadline=None)
def test_cuts_of_any_pairs_are_those_of_tokenising(smol, sizes, max_length, max_prompt_length):
    pairs = [pair("word " * p, "so " * w, "no " * l) for p, w, l in sizes]
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    assert cut(count_tokens(pairs, smol), **limits) == tokenized_cuts(pairs, smol, **limits)


def test_cuts_by_hand():
    lengths = np.array(
        [
            [10, 5, 7],  # fits: 10 + 7 ≤ 20
            [16, 3, 6],  # the prompt gives up 2
            [16, 3, 12],  # it gives up 4, down to 12; 4 of the response are cut
            [5, 30, 1],  # only the response is cut
        ],
        dtype=np.int32,
    )
    assert cut(lengths, 20, 12) == Cuts(2, 2, 0)
    assert cut(lengths, 20, 20) == Cuts(0, 3, 0)
    assert cut(lengths, 12, 12) == Cuts(0, 2, 2)  # a prompt of 12 or more leaves no room


def test_no_pairs_have_no_lengths(smol):
    lengths = count_tokens([], smol)
    assert lengths.shape == (0, 3)
    assert cut(lengths, 2048, 1800) == Cuts(0, 0, 0)


def test_progress_comes_often_and_ends_with_all(smol):
    calls: list[tuple[int, int]] = []
    count_tokens([pair("Hi", "yes", "no")] * 1100, smol, lambda *call: calls.append(call))
    assert calls == [(256, 1100), (512, 1100), (768, 1100), (1024, 1100), (1100, 1100)]


def test_a_model_without_chat_template_is_refused():
    plain = load_tokenizer("embedded:smollm2-135m-instruct")
    plain.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        count_tokens([pair("Hi", "yes", "no")], plain)


def test_importing_it_does_not_import_torch():
    code = "import sys, gapo_lite.lengths; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
