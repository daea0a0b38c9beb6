"""The report in words."""

from __future__ import annotations

from gapo_lite.data.report import describe_counts, describe_problems
from gapo_lite.types import LoadedPairs, PreferencePair, Problem

PAIR = PreferencePair([{"role": "user", "content": "a"}], "b", "c")


def test_problems_read_like_a_compilers() -> None:
    problems = [Problem(3, "chosen", "is null"), Problem(12, "", "the row is null")]
    loaded = LoadedPairs([PAIR], problems, "x.jsonl")
    assert describe_problems(loaded) == "x.jsonl:3: chosen: is null\nx.jsonl:12: the row is null"
    assert describe_problems(LoadedPairs([PAIR], [], "x.jsonl")) == ""


def test_only_the_first_problems_are_shown_and_the_rest_counted() -> None:
    problems = [Problem(line, "chosen", "is null") for line in range(1, 1506)]
    loaded = LoadedPairs([PAIR], problems, "x.jsonl")
    assert describe_problems(loaded).splitlines()[4:] == [
        "x.jsonl:5: chosen: is null",
        "… and 1,500 more",
    ]
    assert describe_problems(loaded, limit=1505).count("\n") == 1504


def test_the_counts_name_only_what_there_is() -> None:
    assert describe_counts(LoadedPairs([PAIR], [], "x", shape="strings")) == "x: 1 pair (strings)"
    full = LoadedPairs(
        [PAIR] * 2000,
        [Problem(1, "", "")],
        "x",
        shape="messages",
        num_duplicates=2,
        num_equal=1,
    )
    assert describe_counts(full) == (
        "x: 2,000 pairs (messages), 1 row unusable, 2 duplicates, "
        "1 with the same text as chosen and rejected"
    )
