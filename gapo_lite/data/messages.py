"""Messages: the values in a row's columns → chat turns and response texts, checked.

A message is {"role", "content"} or ShareGPT's {"from", "value"}. Texts are kept as they are.
"""

from __future__ import annotations

import re
from typing import Any

from gapo_lite.types import Message

Row = dict[str, Any]


class BadRowError(Exception):
    """A row that cannot be a pair; becomes a `Problem` and never leaves the package."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason


ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
MESSAGE_KEYS = [("role", "content"), ("from", "value")]
HH_START = re.compile(r"\s*(Human|Assistant):")
HH_TURN = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):")


def read_responses(row: Row) -> tuple[list[Message], str, str]:
    """`chosen` and `rejected`, each a text, a message, or messages that end with the response.

    Returns:
        The turns before the responses (one list for both), the chosen text and the rejected text.

    Raises:
        BadRowError: one is absent or no response, or they answer different conversations.
    """
    before_chosen, chosen = _read_response(row, "chosen")
    before_rejected, rejected = _read_response(row, "rejected")
    if before_chosen and before_rejected and before_chosen != before_rejected:
        reason = "answers another conversation than chosen: the messages before the response differ"
        raise BadRowError("rejected", reason)
    return before_chosen or before_rejected, chosen, rejected


def _read_response(row: Row, field: str) -> tuple[list[Message], str]:
    value = row.get(field)
    if value is None:
        raise absent(row, field)
    if isinstance(value, str):
        return [], value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return [], value[0]
    if not isinstance(value, (list, dict)):
        raise BadRowError(field, f"is {called(value)}, not text or messages")
    messages = read_messages([value] if isinstance(value, dict) else value, field)
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise BadRowError(field, f"its last message is the {role}'s, not the assistant's response")
    return messages[:-1], messages[-1]["content"]


def read_messages(value: Any, field: str) -> list[Message]:
    """A list of messages, not empty.

    Raises:
        BadRowError: it is something else; says which message is at fault.
    """
    if not isinstance(value, list):
        raise BadRowError(field, f"is {called(value)}, not a list of messages")
    if not value:
        raise BadRowError(field, "is an empty list")
    return [_read_message(item, field, number) for number, item in enumerate(value, start=1)]


def _read_message(item: Any, field: str, number: int) -> Message:
    if not isinstance(item, dict):
        raise BadRowError(field, f"message {number} is {called(item)}, not an object")
    for role_key, text_key in MESSAGE_KEYS:
        role, text = item.get(role_key), item.get(text_key)
        if role is None:
            continue
        if not isinstance(role, str) or role not in ROLES:
            found = ascii(role[:40]) if isinstance(role, str) else called(role)
            reason = f"message {number} has the role {found}; known are {', '.join(ROLES)}"
            raise BadRowError(field, reason)
        if not isinstance(text, str):
            raise BadRowError(
                field, f"the {text_key} of message {number} is {called(text)}, not text"
            )
        return {"role": ROLES[role], "content": text}
    raise BadRowError(field, f"message {number} has no role (role/content or from/value)")


def read_dialogue(row: Row, field: str) -> list[Message]:
    """Anthropic's "\\n\\nHuman: … \\n\\nAssistant: …"; the blanks around a turn are the format's.

    Raises:
        BadRowError: the column holds no such dialogue.
    """
    text = row.get(field)
    if text is None:
        raise absent(row, field)
    if not isinstance(text, str):
        raise BadRowError(field, f"is {called(text)}, not text")
    before, *parts = HH_TURN.split(text)
    if before or not parts:
        reason = 'does not start with "Human:", though the other response is such a dialogue'
        raise BadRowError(field, reason)
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def check_conversation(messages: list[Message], field: str) -> list[Message]:
    """The conversation without a blank system message at its start.

    Raises:
        BadRowError: it doesn't end with the user, has a blank turn, or a system message inside.
    """
    if messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    if not messages or messages[-1]["role"] != "user":
        raise BadRowError(field, "the conversation before the response does not end with the user")
    for number, message in enumerate(messages, start=1):
        if message["role"] == "system" and number > 1:
            reason = f"message {number} is a system message, but only the first may be one"
            raise BadRowError(field, reason)
        what = "the prompt" if len(messages) == 1 else f"message {number} of the prompt"
        check_text(message["content"], field, what)
    return messages


def check_text(text: str, field: str, what: str) -> None:
    """Accept a text that has a character to see and that a tokenizer can take.

    Raises:
        BadRowError: it is empty, only whitespace, or holds half of a character.
    """
    if not text or text.isspace():
        raise BadRowError(field, f"{what} is {'only whitespace' if text else 'empty'}")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = f"U+{ord(text[error.start]):04X}, a lone surrogate, at character {error.start + 1}"
        reason = f"{what} holds {broken} (invalid UTF-8, or half of a \\u pair)"
        raise BadRowError(field, reason) from None


def absent(row: Row, field: str) -> BadRowError:
    """The error for a column without a value."""
    return BadRowError(field, "is null" if field in row else "the column is missing")


def called(value: Any) -> str:
    """The kind of a value, as a person would say it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), f"of type {type(value).__name__}")
