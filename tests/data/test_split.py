"""The split by prompt, and the fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapo_lite.data import data_fingerprint, split_pairs
from gapo_lite.errors import DataError
from gapo_lite.types import PreferencePair


def pair(prompt: str, chosen: str = "a", rejected: str = "b", line: int = 0) -> PreferencePair:
    return PreferencePair([{"role": "user", "content": prompt}], chosen, rejected, line)


def make_pairs(sizes: list[int]) -> list[PreferencePair]:
    groups = [[pair(f"p{n}", str(i)) for i in range(size)] for n, size in enumerate(sizes)]
    return list(itertools.chain.from_iterable(groups))


def prompts(pairs: list[PreferencePair]) -> set[str]:
    return {pair.prompt[-1]["content"] for pair in pairs}


several_sizes = st.lists(st.integers(1, 12), min_size=2, max_size=10)
fractions = st.floats(0.001, 0.999)


@settings(deadline=None)
@given(several_sizes, fractions, st.integers(), st.randoms(use_true_random=False))
def test_no_prompt_is_on_both_sides_and_no_pair_is_lost(
    sizes: list[int], fraction: float, seed: int, order: random.Random
) -> None:
    pairs = make_pairs(sizes)
    order.shuffle(pairs)
    train, heldout = split_pairs(pairs, heldout_fraction=fraction, seed=seed)
    assert train
    assert heldout
    assert not prompts(train) & prompts(heldout)
    assert train == [pair for pair in pairs if pair in train]
    assert heldout == [pair for pair in pairs if pair in heldout]
    assert len(train) + len(heldout) == len(pairs)


@settings(deadline=None)
@given(several_sizes, fractions, st.integers(0, 3))
def test_the_sizes_are_as_near_to_the_fraction_as_whole_prompts_allow(
    sizes: list[int], fraction: float, seed: int
) -> None:
    pairs = make_pairs(sizes)
    _, heldout = split_pairs(pairs, heldout_fraction=fraction, seed=seed)
    every_sum = {
        sum(subset)
        for count in range(1, len(sizes))
        for subset in itertools.combinations(sizes, count)
    }
    wanted = fraction * len(pairs)
    assert abs(len(heldout) - wanted) == min(abs(total - wanted) for total in every_sum)


@settings(deadline=None)
@given(several_sizes, fractions, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(
    sizes: list[int], fraction: float, order: random.Random
) -> None:
    pairs = make_pairs(sizes)
    _, heldout = split_pairs(pairs, heldout_fraction=fraction, seed=7)
    order.shuffle(pairs)
    _, shuffled = split_pairs(pairs, heldout_fraction=fraction, seed=7)
    assert prompts(heldout) == prompts(shuffled)


def test_another_seed_holds_out_other_prompts() -> None:
    pairs = make_pairs([1] * 200)
    sides = [
        frozenset(prompts(split_pairs(pairs, heldout_fraction=0.25, seed=seed)[1]))
        for seed in range(10)
    ]
    assert len(set(sides)) == 10
    assert {len(side) for side in sides} == {50}


def test_every_prompt_is_held_out_by_about_its_share_of_seeds() -> None:
    pairs = make_pairs([1] * 20)
    counts = dict.fromkeys(prompts(pairs), 0)
    for seed in range(400):
        for prompt in prompts(split_pairs(pairs, heldout_fraction=0.25, seed=seed)[1]):
            counts[prompt] += 1
    assert all(60 <= count <= 140 for count in counts.values())


def test_the_split_is_the_same_in_every_process() -> None:
    code = (
        "from gapo_lite.data import split_pairs; from gapo_lite.types import PreferencePair as P;"
        "pairs = [P([{'role': 'user', 'content': f'p{n} é'}], 'a', 'b') for n in range(12)];"
        "_, heldout = split_pairs(pairs, heldout_fraction=0.25, seed=0);"
        "print(*[pair.prompt[0]['content'] for pair in heldout])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "p1 é p2 é p11 é"


def test_prompts_with_other_turns_are_other_prompts() -> None:
    asked = {"role": "user", "content": "q"}
    systems = [[{"role": "system", "content": text}, asked] for text in ("a", "b")]
    pairs = [PreferencePair(prompt, "a", "b") for prompt in [[asked], *systems]]
    train, heldout = split_pairs(pairs, heldout_fraction=0.34, seed=0)
    assert (len(train), len(heldout)) == (2, 1)


def test_a_fraction_of_zero_holds_out_nothing() -> None:
    pairs = make_pairs([3])
    assert split_pairs(pairs, heldout_fraction=0, seed=0) == (pairs, [])
    assert split_pairs([], heldout_fraction=0, seed=0) == ([], [])


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan"), float("inf")])
def test_a_fraction_out_of_range_is_an_error(fraction: float) -> None:
    with pytest.raises(DataError, match=f"held-out fraction is {fraction}"):
        split_pairs(make_pairs([1, 1]), heldout_fraction=fraction, seed=0)


@pytest.mark.parametrize(("sizes", "said"), [([], "0 pairs with 0"), ([5], "5 pairs with 1")])
def test_too_few_prompts_are_an_error(sizes: list[int], said: str) -> None:
    with pytest.raises(DataError, match=f"{said} different prompts can't be split"):
        split_pairs(make_pairs(sizes), heldout_fraction=0.1, seed=0)


def test_the_fingerprint_is_a_known_number() -> None:
    pairs = [pair("Straße 🦙", "b", "c")]
    text = "1:4:user12:Straße 🦙1:b1:c"
    assert data_fingerprint(pairs) == hashlib.sha256(text.encode()).hexdigest()
    assert data_fingerprint([]) == hashlib.sha256().hexdigest()


def test_the_fingerprint_sees_texts_their_borders_and_order_only() -> None:
    base = [pair("ab", "c", "d"), pair("e", "f", "g")]
    others = [
        [pair("a", "bc", "d"), base[1]],
        [pair("ab", "cd", "d"), base[1]],
        [pair("ab", "d", "c"), base[1]],
        base[::-1],
        base[:1],
        [dataclasses.replace(base[0], prompt=[{"role": "system", "content": "ab"}]), base[1]],
        [pair("ab", "c1:d", ""), base[1]],
    ]
    assert len({data_fingerprint(pairs) for pairs in [base, *others]}) == 8
    scored = [dataclasses.replace(pair, line=9, strength=0.5) for pair in base]
    assert data_fingerprint(scored) == data_fingerprint(base)
