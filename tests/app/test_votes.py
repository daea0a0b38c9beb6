"""Blind votes: nothing tells the sides before the vote, one vote a duel, and an honest tally."""

from __future__ import annotations

import json
import threading
from collections import Counter

import pytest

from app.voices import Request
from app.votes import MAX_OPEN, Duels, shuffled, tally
from gapo_lite.errors import ConfigError, RunError
from gapo_lite.runs import Run
from gapo_lite.statistics import wilson

QUESTION = Request(
    "kind", "base", [{"role": "user", "content": "Hi"}], system="Be brief.", temperature=0.7, seed=3
)


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "kind")
    run.path.mkdir()
    return run


def open_duel(duels, run, sides=("tuned", "base"), answers=("left text", "right text")):
    return duels.open(run, QUESTION, sides, answers, step=200)


def rows(run):
    return [
        json.loads(line)
        for line in (run.path / "votes.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def cast(run, **votes):
    """Writes so many votes of each winner."""
    for winner, count in votes.items():
        for _ in range(count):
            run.append("votes.jsonl", {"winner": winner, "step": 200})


# -- the vote --


def test_sides_are_shuffled_evenly():
    counts = Counter(shuffled() for _ in range(2000))
    assert counts.keys() == {("base", "tuned"), ("tuned", "base")}
    assert min(counts.values()) > 850  # seven standard deviations


@pytest.mark.parametrize(
    ("sides", "choice", "winner"),
    [
        (("tuned", "base"), "left", "tuned"),
        (("tuned", "base"), "right", "base"),
        (("base", "tuned"), "left", "base"),
        (("base", "tuned"), "right", "tuned"),
        (("base", "tuned"), "tie", "tie"),
        (("base", "tuned"), "both_bad", "both_bad"),
    ],
)
def test_a_vote_for_a_side_is_one_for_who_spoke_there(run, sides, choice, winner):
    duels = Duels()
    vote = duels.vote(open_duel(duels, run, sides).id, choice)
    assert (vote.winner, vote.sides) == (winner, sides)
    assert rows(run)[0]["winner"] == winner


def test_the_row_says_all_that_was_asked_and_answered(run):
    duels = Duels()
    duels.vote(open_duel(duels, run).id, "left")
    (row,) = rows(run)
    assert row.pop("time") > 1_700_000_000
    assert row == {
        "step": 200,
        "prompt": "Hi",
        "earlier": [],
        "tuned": "left text",
        "base": "right text",
        "left": "tuned",
        "vote": "left",
        "winner": "tuned",
        "system": "Be brief.",
        "temperature": 0.7,
        "top_p": 1.0,
        "max_tokens": 256,
        "seed": 3,
    }


def test_a_second_vote_on_the_same_answers_is_refused(run):
    duels = Duels()
    duel = open_duel(duels, run)
    duels.vote(duel.id, "left")
    with pytest.raises(RunError, match="it has been cast already"):
        duels.vote(duel.id, "right")
    assert len(rows(run)) == 1


def test_of_many_votes_at_once_one_counts(run):
    duels, refused = Duels(), []
    duel = open_duel(duels, run)
    barrier = threading.Barrier(8)

    def vote():
        barrier.wait()
        try:
            duels.vote(duel.id, "tie")
        except RunError as error:
            refused.append(error)

    threads = [threading.Thread(target=vote) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(rows(run)), len(refused)) == (1, 7)


@pytest.mark.parametrize("choice", ["", "LEFT", "tuned", "base", None, 1, ["left"], {"left": 1}])
def test_a_choice_that_is_none_is_refused_and_the_duel_stays_open(run, choice):
    duels = Duels()
    duel = open_duel(duels, run)
    with pytest.raises(ConfigError, match="choose left, right, tie, both_bad"):
        duels.vote(duel.id, choice)
    assert duels.vote(duel.id, "left").winner == "tuned"


@pytest.mark.parametrize("name", ["", "guess", None, 0, ["x"], {"id": 1}, "../kind", "\ud800"])
def test_a_duel_that_nobody_opened_is_refused(run, name):
    duels = Duels()
    open_duel(duels, run)
    with pytest.raises(RunError, match="not open for a vote"):
        duels.vote(name, "left")
    assert not (run.path / "votes.jsonl").exists()


def test_the_oldest_duels_are_dropped(run):
    duels = Duels()
    opened = [open_duel(duels, run) for _ in range(MAX_OPEN + 1)]
    assert len({duel.id for duel in opened}) == MAX_OPEN + 1
    with pytest.raises(RunError, match="not open for a vote"):
        duels.vote(opened[0].id, "left")
    duels.vote(opened[1].id, "left")


def test_neither_the_id_nor_the_repr_tells_the_sides(run):
    duels = Duels()
    one = open_duel(duels, run, ("base", "tuned"))
    other = open_duel(duels, run, ("tuned", "base"))
    assert len(one.id) == len(other.id) == 22
    assert repr(one).replace(one.id, "") == repr(other).replace(other.id, "")


def test_text_that_utf8_cannot_write_is_kept_as_far_as_it_can_be(run):
    duels = Duels()
    odd = "a\ud800b 🌍 \u2028 עברית </s>\n"
    duels.vote(open_duel(duels, run, answers=(odd, "\x00")).id, "left")
    (row,) = [json.loads(line) for line in (run.path / "votes.jsonl").read_bytes().split(b"\n")[:1]]
    assert row["tuned"] == "a\ufffdb 🌍 \u2028 עברית </s>\n"
    assert row["base"] == "\x00"
    assert tally(run).tuned == 1


def test_a_vote_on_a_run_that_was_deleted_is_refused_and_stays_open(run):
    duels = Duels()
    duel = open_duel(duels, run)
    run.path.rename(run.path.with_name("elsewhere"))
    with pytest.raises(RunError, match="the run kind is no longer there"):
        duels.vote(duel.id, "left")
    run.path.with_name("elsewhere").rename(run.path)
    assert duels.vote(duel.id, "left").winner == "tuned"


# -- the tally --


def test_a_run_without_votes_says_so(run):
    empty = tally(run)
    assert (empty.win_rate, empty.interval, empty.sentence) == (None, None, "No votes yet.")


@pytest.mark.parametrize(
    ("votes", "sentence"),
    [
        (
            {"tuned": 11, "base": 5, "tie": 2},
            "18 votes: tuned preferred in 11, base in 5, 2 ties. That is too few to say.",
        ),
        ({"tuned": 1}, "1 vote: tuned preferred in 1, base in 0. That is too few to say."),
        (  # Wilson's interval alone would call it clear
            {"tuned": 4},
            "4 votes: tuned preferred in 4, base in 0. That is too few to say.",
        ),
        (
            {"tuned": 30, "base": 6, "tie": 1, "both_bad": 3},
            "40 votes: tuned preferred in 30, base in 6, 1 tie, both bad in 3. Tuned is preferred "
            "to base, by more than chance explains.",
        ),
        (
            {"tuned": 2, "base": 20},
            "22 votes: tuned preferred in 2, base in 20. Base is preferred to tuned, by more than "
            "chance explains.",
        ),
        (
            {"tuned": 101, "base": 99},
            "200 votes: tuned preferred in 101, base in 99. Neither is clearly preferred.",
        ),
        ({"both_bad": 2}, "2 votes: tuned preferred in 0, base in 0, both bad in 2. That is too "
         "few to say."),
    ],
)  # fmt: skip
def test_the_tally_is_said_in_words_and_says_when_it_means_nothing(run, votes, sentence):
    cast(run, **votes)
    assert tally(run).sentence == sentence


def test_votes_for_neither_count_half(run):
    cast(run, tuned=3, base=1, tie=1, both_bad=1)
    found = tally(run)
    assert (found.tuned, found.base, found.tie, found.both_bad) == (3, 1, 1, 1)
    assert found.win_rate == pytest.approx(4 / 6)
    assert found.interval == wilson(4 / 6, 6)


def test_votes_on_an_adapter_that_was_trained_further_are_told_apart(run):
    cast(run, tuned=1)
    run.append("votes.jsonl", {"winner": "base", "step": 400})
    assert tally(run).sentence.endswith("They were cast on the adapter at 2 different steps.")


def test_lines_that_are_no_votes_do_not_count(run):
    (run.path / "votes.jsonl").write_text(
        '{"winner": "tuned"}\n[1]\n{"winner": ["tuned"]}\n{"winner": "me"}\n{}\n"x"\n'
        '{"winner": "base", "step": {}}\n{"winner": "tu'
    )
    found = tally(run)
    assert (found.tuned, found.base, found.tie, found.both_bad) == (1, 1, 0, 0)
