"""Rows: what each shape makes of them, and what is said of those that are no pair."""

from __future__ import annotations

import json
import math

import pytest

from gapo_lite.data.formats import parse_row
from gapo_lite.data.messages import BadRowError

SYSTEM = {"role": "system", "content": "Be kind."}
ASK = {"role": "user", "content": "Why?"}
FIRST = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
STRINGS = {"prompt": "Why?", "chosen": "good", "rejected": "bad"}


def prompt_of(row: dict) -> list[dict]:
    _, pair = parse_row(row, 1)
    assert (pair.chosen, pair.rejected) == ("good", "bad")
    return pair.prompt


def problem_of(row: dict) -> tuple[str, str]:
    with pytest.raises(BadRowError) as caught:
        parse_row(row, 1)
    return caught.value.field, caught.value.reason


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ([], [ASK]),
        ([{"role": "user", "content": "Why? (as shown)"}], [ASK]),
        ([SYSTEM], [SYSTEM, ASK]),
        ([SYSTEM, FIRST], [SYSTEM, FIRST]),
        ([FIRST, HELLO, ASK], [FIRST, HELLO, ASK]),
    ],
)
def test_messages_beyond_one_question_are_the_conversation(
    before: list[dict], expected: list[dict]
) -> None:
    row = {"prompt": "Why?", "chosen": [*before, GOOD], "rejected": [*before, BAD]}
    assert prompt_of(row) == expected


def test_one_response_may_be_text_and_the_other_messages() -> None:
    row = {"prompt": "Hi", "chosen": [FIRST, HELLO, ASK, GOOD], "rejected": "bad"}
    assert prompt_of(row) == [FIRST, HELLO, ASK]


@pytest.mark.parametrize("prompt", [[ASK], [FIRST, HELLO, ASK], [SYSTEM, ASK]])
def test_a_message_prompt_may_be_repeated_in_the_responses(prompt: list[dict]) -> None:
    for before in ([], prompt, prompt[-1:]):
        row = {"prompt": prompt, "chosen": [*before, GOOD], "rejected": [*before, BAD]}
        assert prompt_of(row) == prompt


def test_a_message_prompt_may_be_the_end_or_the_start_of_the_conversation() -> None:
    talk = [FIRST, HELLO, ASK]
    for prompt in ([ASK], [FIRST]):
        row = {"prompt": prompt, "chosen": [*talk, GOOD], "rejected": [*talk, BAD]}
        assert prompt_of(row) == talk


def test_another_conversation_than_the_prompt_is_a_problem() -> None:
    row = {"prompt": [ASK], "chosen": [FIRST, GOOD], "rejected": [FIRST, BAD]}
    field, reason = problem_of(row)
    assert field == "prompt"
    assert "another conversation" in reason


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ({"from": "gpt", "value": "good"}, {"from": "gpt", "value": "bad"}),
        ([{"from": "gpt", "value": "good"}], [{"from": "gpt", "value": "bad"}]),
        ("good", "bad"),
        (["good"], ["bad"]),
        (GOOD, [BAD]),
    ],
)
def test_sharegpt_responses_come_in_several_wrappings(chosen: object, rejected: object) -> None:
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    row = {
        "conversations": [*talk, {"from": "human", "value": "Why?"}],
        "chosen": chosen,
        "rejected": rejected,
    }
    assert prompt_of(row) == [FIRST, HELLO, ASK]


def test_messages_keep_only_role_and_content() -> None:
    noisy = {"role": "user", "content": "Why?", "name": None, "from": "x"}
    row = {"chosen": [noisy, GOOD], "rejected": [ASK | {"id": 3}, BAD]}
    assert prompt_of(row) == [ASK]


def test_hh_turns_are_stripped_and_their_inner_lines_kept() -> None:
    shared = "\n\nHuman: Hi \n\nAssistant:  one\n\ntwo\n\nHuman: Why? The Human: is\nHuman: no turn"
    row = {
        "chosen": f"{shared}\n\nAssistant: good\n\n more \n",
        "rejected": f"{shared}\n\nAssistant: bad",
    }
    shape, pair = parse_row(row, 1)
    assert shape == "anthropic_hh"
    assert pair.prompt == [
        FIRST,
        {"role": "assistant", "content": "one\n\ntwo"},
        {"role": "user", "content": "Why? The Human: is\nHuman: no turn"},
    ]
    assert (pair.chosen, pair.rejected) == ("good\n\n more", "bad")


def test_a_dialogue_beside_a_prompt_is_a_response() -> None:
    text = "\n\nHuman: a\n\nAssistant: b"
    shape, pair = parse_row({"prompt": "Write one.", "chosen": text, "rejected": text}, 1)
    assert shape == "strings"
    assert pair.chosen == text


def test_the_system_column_is_kept_unless_the_conversation_has_its_own() -> None:
    assert prompt_of(STRINGS | {"system": " Be brief. "})[0]["content"] == " Be brief. "
    own = {"prompt": [SYSTEM, ASK], "chosen": "good", "rejected": "bad", "system": "Be brief."}
    assert prompt_of(own) == [SYSTEM, ASK]
    for blank in (None, "", " \n"):
        assert prompt_of(STRINGS | {"system": blank}) == [ASK]


def test_a_blank_system_message_is_dropped() -> None:
    row = {"prompt": [{"role": "system", "content": ""}, ASK], "chosen": "good", "rejected": "bad"}
    assert prompt_of(row) == [ASK]


def test_null_columns_count_as_absent() -> None:
    row = {
        "prompt": None,
        "conversations": None,
        "system": None,
        "chosen": [ASK, GOOD],
        "rejected": [ASK, BAD],
        "strength": None,
    }
    assert prompt_of(row) == [ASK]


def test_texts_are_kept_to_the_last_blank() -> None:
    texts = [" a ", "\n\tb\r\n", "\x00", "\ufeffc", "\u200b", "e\u0301 é 🦙\U0010ffff"]
    for text in texts:
        _, pair = parse_row({"prompt": text, "chosen": text, "rejected": text}, 1)
        assert pair.prompt[0]["content"] == pair.chosen == pair.rejected == text


# --- Rows that are no pair --------------------------------------------------------------------

BROKEN = json.loads('"a\\ud83d"')

BAD_ROWS: dict[str, tuple[dict, str, str]] = {
    "no prompt": ({"chosen": "a", "rejected": "b"}, "prompt", "the column is missing"),
    "null prompt": (STRINGS | {"prompt": None}, "prompt", "is null"),
    "no chosen": ({"prompt": "a", "rejected": "b"}, "chosen", "the column is missing"),
    "null chosen": (STRINGS | {"chosen": None}, "chosen", "is null"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "rejected", "the column is missing"),
    "empty row": ({}, "chosen", "the column is missing"),
    "empty prompt": (STRINGS | {"prompt": ""}, "prompt", "the prompt is empty"),
    "blank prompt": (STRINGS | {"prompt": " \n"}, "prompt", "the prompt is only whitespace"),
    "empty chosen": (STRINGS | {"chosen": ""}, "chosen", "the response is empty"),
    "blank rejected": (
        STRINGS | {"rejected": "\t\u3000\n"},
        "rejected",
        "the response is only whitespace",
    ),
    "number": (STRINGS | {"chosen": 3}, "chosen", "is a number, not text or messages"),
    "boolean": (STRINGS | {"rejected": True}, "rejected", "is true or false, not text or messages"),
    "bytes": (STRINGS | {"rejected": b"x"}, "rejected", "is of type bytes, not text or messages"),
    "number as prompt": (STRINGS | {"prompt": 1.5}, "prompt", "is a number, not text or messages"),
    "object as prompt": (STRINGS | {"prompt": ASK}, "prompt", "is an object, not text or messages"),
    "number without prompt": (
        {"chosen": 1, "rejected": "b"},
        "chosen",
        "is a number, not text or messages",
    ),
    "empty list": (STRINGS | {"chosen": []}, "chosen", "is an empty list"),
    "empty message prompt": (STRINGS | {"prompt": []}, "prompt", "is an empty list"),
    "several texts": (
        STRINGS | {"chosen": ["a", "b"]},
        "chosen",
        "message 1 is text, not an object",
    ),
    "null message": (
        STRINGS | {"chosen": [ASK, None]},
        "chosen",
        "message 2 is null, not an object",
    ),
    "no role": (
        STRINGS | {"chosen": [{"content": "a"}]},
        "chosen",
        "message 1 has no role (role/content or from/value)",
    ),
    "unknown role": (
        STRINGS | {"chosen": [ASK, {"role": "tool", "content": "a"}]},
        "chosen",
        "message 2 has the role 'tool'; known are system, user, human, assistant, gpt",
    ),
    "role of another kind": (
        STRINGS | {"chosen": [{"role": ["user"], "content": "a"}]},
        "chosen",
        "message 1 has the role a list; known are system, user, human, assistant, gpt",
    ),
    "content parts": (
        STRINGS | {"chosen": [{"role": "assistant", "content": [{"type": "text"}]}]},
        "chosen",
        "the content of message 1 is a list, not text",
    ),
    "null value": (
        STRINGS | {"rejected": {"from": "gpt", "value": None}},
        "rejected",
        "the value of message 1 is null, not text",
    ),
    "ends with the user": (
        STRINGS | {"chosen": [GOOD, ASK]},
        "chosen",
        "its last message is the user's, not the assistant's response",
    ),
    "empty response in messages": (
        STRINGS | {"rejected": [{"role": "assistant", "content": ""}]},
        "rejected",
        "the response is empty",
    ),
    "two conversations": (
        {"chosen": [ASK, GOOD], "rejected": [FIRST, BAD]},
        "rejected",
        "answers another conversation than chosen: the messages before the response differ",
    ),
    "prompt ends with the assistant": (
        {"prompt": [ASK, HELLO], "chosen": "a", "rejected": "b"},
        "prompt",
        "the conversation before the response does not end with the user",
    ),
    "prompt of a blank system message": (
        {"prompt": [SYSTEM | {"content": " "}], "chosen": "a", "rejected": "b"},
        "prompt",
        "the conversation before the response does not end with the user",
    ),
    "assistant before the response": (
        STRINGS | {"chosen": [HELLO, GOOD], "rejected": [HELLO, BAD]},
        "prompt",
        "the conversation before the response does not end with the user",
    ),
    "late system message": (
        {"chosen": [ASK, SYSTEM, ASK, GOOD], "rejected": [ASK, SYSTEM, ASK, BAD]},
        "chosen",
        "message 2 is a system message, but only the first may be one",
    ),
    "empty turn": (
        {"prompt": [FIRST, HELLO | {"content": ""}, ASK], "chosen": "a", "rejected": "b"},
        "prompt",
        "message 2 of the prompt is empty",
    ),
    "only a response": (
        {"chosen": [GOOD], "rejected": [BAD]},
        "chosen",
        "holds no message before the response, and there is no prompt",
    ),
    "messages beside text": (
        {"chosen": [ASK, GOOD], "rejected": "b"},
        "rejected",
        "is text, not a message list, and there is no prompt",
    ),
    "conversations as text": (
        {"conversations": "Hi", "chosen": "a", "rejected": "b"},
        "conversations",
        "is text, not a list of messages",
    ),
    "dialogue beside text": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "b"},
        "rejected",
        'does not start with "Human:", though the other response is such a dialogue',
    ),
    "dialogue without a response": (
        {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        "chosen",
        "the response is empty",
    ),
    "dialogue that ends with Human": (
        {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"},
        "chosen",
        "its last message is the user's, not the assistant's response",
    ),
    "dialogues that part early": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\n\nAssistant: d",
        },
        "rejected",
        "answers another conversation than chosen: the messages before the response differ",
    ),
    "system of another kind": (STRINGS | {"system": 3}, "system", "is a number, not text"),
    "half a character": (
        STRINGS | {"chosen": BROKEN},
        "chosen",
        "the response holds U+D83D, a lone surrogate, at character 2 "
        "(invalid UTF-8, or half of a \\u pair)",
    ),
    "half a character in the prompt": (
        STRINGS | {"prompt": BROKEN},
        "prompt",
        "the prompt holds U+D83D, a lone surrogate, at character 2 "
        "(invalid UTF-8, or half of a \\u pair)",
    ),
    "half a character in the system column": (
        STRINGS | {"system": BROKEN},
        "system",
        "the system message holds U+D83D, a lone surrogate, at character 2 "
        "(invalid UTF-8, or half of a \\u pair)",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_is_no_pair_says_which_column_and_why(name: str) -> None:
    row, field, reason = BAD_ROWS[name]
    assert problem_of(row) == (field, reason)


def test_a_forged_role_cannot_write_to_the_terminal() -> None:
    forged = {"role": "\x1b[2J" + "x" * 10_000, "content": "a"}
    _, reason = problem_of(STRINGS | {"chosen": [forged]})
    assert "\x1b" not in reason
    assert len(reason) < 200


# --- Scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores",
    [
        {"chosen_rating": 5, "rejected_rating": 2.5},
        {"score_chosen": 5.0, "score_rejected": 2.5},
        {"chosen_rating": "5", "rejected_rating": " 2.5 "},
        {
            "all_generated_responses": ["other", "bad", "good", "good"],
            "all_rm_scores": [9, 2.5, 5, 7],
        },
    ],
)
def test_ratings_come_from_any_of_the_usual_columns(scores: dict) -> None:
    _, pair = parse_row(STRINGS | scores, 1)
    assert (pair.chosen_rating, pair.rejected_rating) == (5.0, 2.5)


@pytest.mark.parametrize("value", [None, True, "", "high", math.nan, math.inf, "nan", 10**400, [1]])
def test_what_is_no_number_is_no_score(value: object) -> None:
    scores = {"chosen_rating": value, "score_rejected": value, "strength": value}
    _, pair = parse_row(STRINGS | scores, 1)
    assert (pair.chosen_rating, pair.rejected_rating, pair.strength) == (None, None, None)


@pytest.mark.parametrize(
    ("texts", "scores"),
    [(["good", "bad"], [1.0]), ("good", [1.0]), (["good", None], None), ([["good"], 3], [1, 2])],
)
def test_score_lists_that_do_not_fit_are_ignored(texts: object, scores: object) -> None:
    row = STRINGS | {"all_generated_responses": texts, "all_rm_scores": scores}
    assert parse_row(row, 1)[1].chosen_rating is None


@pytest.mark.parametrize(
    ("given", "kept"), [(0, 0.0), (1, 1.0), (0.3, 0.3), (1.01, None), (-0.1, None)]
)
def test_a_strength_is_a_share(given: float, kept: float | None) -> None:
    assert parse_row(STRINGS | {"strength": given}, 1)[1].strength == kept
