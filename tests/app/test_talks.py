"""Chats: one voice, side by side, blind; with a stand-in for the chat model's process, whose own
tests are in test_voices.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from app import talks
from app.talks import BESIDE, BLIND, ONE, Settings, Talk, begin, reply
from app.voices import Event, Request
from app.votes import Duels, tally
from gapo_lite.errors import ConfigError, RunError
from gapo_lite.runs import Run

HOSTILE = '<img src=x onerror="alert(1)"> <b>bold</b> & {{x}} ${y}'
PLAIN = Settings()


@dataclass
class Voices:
    """Answers with the side's name and the question; remembers what it was asked."""

    asked: list[Request] = field(default_factory=list)
    answers: dict[str, list[Event]] = field(default_factory=dict)

    def ask(self, request: Request) -> Iterator[Event]:
        self.asked.append(request)
        yield Event("loading", request.voice)
        for event in self.answers.get(request.side, []):
            yield event
            if event.kind == "error":
                return
        yield Event("piece", f"{request.side}: ")
        yield Event("piece", request.turns[-1]["content"])
        yield Event("done", tokens=12, seconds=2.0, step=7 if request.side == "tuned" else None)


@pytest.fixture
def run(tmp_path) -> Run:
    (tmp_path / "demo").mkdir()
    return Run(tmp_path / "demo")


def said(voices, talk, question="Why?", duels=None, run=None, settings=PLAIN) -> Talk:
    """The talk after a question."""
    *_, last = reply(voices, duels or Duels(), run, talk, question, settings)
    return last


def texts(talk: Talk) -> list[list[str]]:
    return [[text for _, text in column.turns] for column in talk.columns]


def test_one_voice_is_asked_with_all_that_was_said_before():
    voices = Voices()
    talk = said(voices, begin("demo", is_run=True, mode=ONE), "Why?")
    talk = said(voices, talk, "And then?", settings=Settings(system="short", seed=3))
    assert texts(talk) == [["Why?", "tuned: Why?", "And then?", "tuned: And then?"]]
    assert [turn["content"] for turn in voices.asked[1].turns] == texts(talk)[0][:3]
    assert (voices.asked[1].system, voices.asked[1].seed) == ("short", 3)
    assert talk.step == 7


def test_a_model_answers_as_base():
    voices = Voices()
    talk = said(voices, begin("embedded:x", is_run=False, mode=ONE))
    assert voices.asked[0].side == "base"
    assert not voices.asked[0].is_run
    assert "embedded:x" in talks.html(talk)


def test_side_by_side_base_and_tuned_answer_the_same_question_with_the_same_seed():
    voices = Voices()
    talk = said(voices, begin("demo", is_run=True, mode=BESIDE), settings=Settings(seed=5))
    talk = said(voices, talk, "More?", settings=Settings(seed=5))
    assert texts(talk) == [
        ["Why?", "base: Why?", "More?", "base: More?"],
        ["Why?", "tuned: Why?", "More?", "tuned: More?"],
    ]
    first, second = voices.asked[:2]
    assert replace(first, side="tuned") == second
    assert voices.asked[3].turns[1]["content"] == "tuned: Why?"  # each side has its own history


def test_blind_the_page_tells_nothing_before_the_vote(run):
    orders = set()
    for _ in range(40):
        voices, duels = Voices(), Duels()
        talk = begin("demo", is_run=True, mode=BLIND)
        grown = list(reply(voices, duels, run, talk, "Why?", Settings()))
        for step in grown[:-1]:  # not even whether an answer is there yet
            assert "base: Why?" not in talks.html(step)
            assert "tuned: Why?" not in talks.html(step)
            assert not step.duel
        last = talks.html(grown[-1])
        assert grown[-1].duel
        assert "base: Why?" in last
        assert "tuned: Why?" in last
        assert "Left" in last
        assert "tokens" not in last  # the adapter's pace would tell
        assert ", tuned" not in last
        assert "base model" not in last
        orders.add(tuple(column.side for column in grown[-1].columns))
    assert orders == {("base", "tuned"), ("tuned", "base")}


def test_a_blind_vote_is_kept_with_the_run_and_lifts_the_blindness(run):
    duels = Duels()
    talk = said(Voices(), begin("demo", is_run=True, mode=BLIND), duels=duels, run=run)
    tuned_is = "left" if talk.columns[0].side == "tuned" else "right"
    talk, sentence = talks.vote(duels, run, talk, tuned_is)
    assert sentence.startswith("You preferred tuned.")
    assert "demo, tuned" in talks.html(talk)
    assert (tally(run).tuned, tally(run).base) == (1, 0)
    with pytest.raises(RunError, match="not open"):
        talks.vote(duels, run, talk, tuned_is)
    assert tally(run).tuned == 1


def test_a_blind_answer_that_failed_cannot_be_voted_on(run):
    voices = Voices(answers={"base": [Event("error", "out of memory")]})
    talk = said(voices, begin("demo", is_run=True, mode=BLIND), run=run)
    assert not talk.duel


def test_what_went_wrong_is_said_beside_the_question():
    voices = Voices(answers={"tuned": [Event("error", "the <b>GPU</b> is full")]})
    talk = said(voices, begin("demo", is_run=True, mode=ONE))
    assert "Not answered: the &lt;b&gt;GPU&lt;/b&gt; is full" in talks.html(talk)


def test_a_note_stays_beside_the_answer():
    voices = Voices(answers={"tuned": [Event("note", "(the oldest 2 turns are forgotten)")]})
    talk = said(voices, begin("demo", is_run=True, mode=ONE))
    assert talk.columns[0].remark == "(the oldest 2 turns are forgotten) 12 tokens, 6.0 a second"


def test_regenerating_asks_the_last_question_again_without_its_answer():
    voices = Voices()
    talk = said(voices, said(voices, begin("demo", is_run=True, mode=BESIDE), "One?"), "Two?")
    shorter, question = talks.again(talk)
    assert question == "Two?"
    assert texts(shorter) == [["One?", "base: One?"], ["One?", "tuned: One?"]]
    assert texts(said(voices, shorter, question)) == texts(talk)


def test_nothing_can_be_regenerated_before_the_first_question():
    with pytest.raises(ConfigError, match="nothing has been asked"):
        talks.again(Talk())


def test_what_people_and_models_say_never_becomes_an_element():
    talk = said(Voices(), begin("demo", is_run=True, mode=BESIDE), HOSTILE)
    html = talks.html(talk)
    assert "<img" not in html
    assert "<b>" not in html
    assert html.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt;") == 4


@pytest.mark.parametrize(
    ("is_run", "mode", "words"),
    [(False, BLIND, "needs a run"), (False, BESIDE, "needs a run"), (True, "loud", "kind of chat")],
)
def test_a_talk_that_cannot_be_is_refused(is_run, mode, words):
    with pytest.raises(ConfigError, match=words):
        begin("demo", is_run=is_run, mode=mode)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(temperature=3.0),
        Settings(top_p=0.0),
        Settings(max_tokens=100_000),
        Settings(seed=-1),
        Settings(system="x" * 30_000),
        Settings(temperature="hot"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_asked(settings):
    voices = Voices()
    with pytest.raises(ConfigError):
        said(voices, begin("demo", is_run=True, mode=BESIDE), settings=settings)
    assert voices.asked == []


def test_after_a_vote_the_next_blind_question_begins_a_new_conversation(run):
    voices, duels = Voices(), Duels()
    talk = said(voices, begin("demo", is_run=True, mode=BLIND), duels=duels, run=run)
    talk, _ = talks.vote(duels, run, talk, "left")
    orders = set()
    for _ in range(40):
        after = said(voices, talk, "And now?", duels=duels, run=run)
        assert all(turns[0] == "And now?" for turns in texts(after))  # nothing to know them by
        orders.add(tuple(column.side for column in after.columns))
    assert len(orders) == 2
    shorter, question = talks.again(talk)
    assert question == "Why?"
    assert shorter.revealed  # so that answering again is blind again, too
