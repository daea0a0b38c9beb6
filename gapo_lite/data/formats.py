"""Formats: one row of a source → one PreferencePair, whatever shape the row has.

Each row is recognised by itself, so that a file put together from several sources loads whole. A
column whose value is null counts as absent. Texts are kept exactly as they are, but for Anthropic's
dialogues (`messages.read_dialogue`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gapo_lite.data.messages import (
    HH_START,
    BadRowError,
    Row,
    absent,
    called,
    check_conversation,
    check_text,
    read_dialogue,
    read_messages,
    read_responses,
)
from gapo_lite.types import Message, PreferencePair


class Parts(NamedTuple):
    """What a row says before its texts are checked: the conversation and its two responses."""

    prompt: list[Message]
    chosen: str
    rejected: str


class Format(NamedTuple):
    """A shape that rows come in: how to tell it, how to read it, and its columns for a person."""

    recognises: Callable[[Row], bool]
    parse: Callable[[Row], Parts]
    columns: str


COLUMNS = [
    "prompt",
    "conversations",
    "system",
    "chosen",
    "rejected",
    "strength",
    "chosen_rating",
    "rejected_rating",
    "score_chosen",
    "score_rejected",
    "all_generated_responses",
    "all_rm_scores",
]
"""Every column that is read; a source need not decode any other."""


def parse_row(
    row: Row, line: int, rating_columns: Sequence[str] = ()
) -> tuple[str, PreferencePair]:
    """Read one row.

    Args:
        row: column → value, as the source holds it.
        line: 1-based place of the row in its source.
        rating_columns: where the ratings stand: of chosen and rejected, or one column with how much
            better the chosen response is (its rating then; the rejected one's is 0). None: where
            they usually stand.

    Returns:
        The shape (a key of `FORMATS`) and the pair.

    Raises:
        BadRowError: the row is no pair; says which column is at fault and why.
    """
    for shape, spec in FORMATS.items():
        if spec.recognises(row):
            return shape, _make_pair(spec.parse(row), row, line, rating_columns)
    raise _unrecognised(row)


# --- Recognisers: by the prompt's kind, and by that of the responses ------------------------------


def _has_messages(row: Row) -> bool:
    return any(isinstance(row.get(field), (list, dict)) for field in ("chosen", "rejected"))


def _is_strings(row: Row) -> bool:
    return isinstance(row.get("prompt"), str) and not _has_messages(row)


def _is_text_prompt(row: Row) -> bool:
    return isinstance(row.get("prompt"), str) and _has_messages(row)


def _is_message_prompt(row: Row) -> bool:
    return isinstance(row.get("prompt"), list)


def _is_sharegpt(row: Row) -> bool:
    return row.get("prompt") is None and row.get("conversations") is not None


def _is_messages(row: Row) -> bool:
    return row.get("prompt") is None and _has_messages(row)


def _is_anthropic_hh(row: Row) -> bool:
    """Only without a prompt: beside one, it is a response that happens to look like a dialogue."""
    texts = [row.get("chosen"), row.get("rejected")]
    return row.get("prompt") is None and any(
        isinstance(text, str) and HH_START.match(text) for text in texts
    )


# --- Parsers ----------------------------------------------------------------------------------


def _parse_text_prompt(row: Row) -> Parts:
    """Messages before the response, if more than the question alone, are the conversation."""
    turns, chosen, rejected = read_responses(row)
    roles = [turn["role"] for turn in turns]
    asked = {"role": "user", "content": row["prompt"]}
    if roles in ([], ["user"]):
        return Parts([asked], chosen, rejected)
    return Parts([*turns, asked] if roles == ["system"] else turns, chosen, rejected)


def _parse_message_prompt(row: Row) -> Parts:
    return _parse_after(row, "prompt")


def _parse_sharegpt(row: Row) -> Parts:
    return _parse_after(row, "conversations")


def _parse_after(row: Row, field: str) -> Parts:
    """The responses may repeat the end of the conversation, or hold all of it and more."""
    asked = read_messages(row[field], field)
    turns, chosen, rejected = read_responses(row)
    if turns == asked[len(asked) - len(turns) :]:
        return Parts(asked, chosen, rejected)
    if asked in (turns[: len(asked)], turns[-len(asked) :]):
        return Parts(turns, chosen, rejected)
    reason = "is another conversation than the messages before the response in chosen or rejected"
    raise BadRowError(field, reason)


def _parse_messages(row: Row) -> Parts:
    """All messages but the last are the prompt, and must be the same in chosen and rejected."""
    for field in ("chosen", "rejected"):
        if row.get(field) is not None and not isinstance(row[field], list):
            reason = f"is {called(row[field])}, not a message list, and there is no prompt"
            raise BadRowError(field, reason)
    return _parse_shared(row)


def _parse_anthropic_hh(row: Row) -> Parts:
    return _parse_shared({field: read_dialogue(row, field) for field in ("chosen", "rejected")})


def _parse_shared(row: Row) -> Parts:
    turns, chosen, rejected = read_responses(row)
    if not turns:
        raise BadRowError("chosen", "holds no message before the response, and there is no prompt")
    return Parts(turns, chosen, rejected)


FORMATS = {
    "strings": Format(
        _is_strings,
        _parse_text_prompt,
        "prompt, chosen, rejected: texts",
    ),
    "text_prompt": Format(
        _is_text_prompt,
        _parse_text_prompt,
        "prompt: text; chosen, rejected: message lists that end with the response",
    ),
    "message_prompt": Format(
        _is_message_prompt,
        _parse_message_prompt,
        "prompt: message list; chosen, rejected: texts or message lists",
    ),
    "sharegpt": Format(
        _is_sharegpt,
        _parse_sharegpt,
        "conversations: list of from/value; chosen, rejected: one from/value each",
    ),
    "messages": Format(
        _is_messages,
        _parse_messages,
        "chosen, rejected: message lists that share all but the response (no prompt column)",
    ),
    "anthropic_hh": Format(
        _is_anthropic_hh,
        _parse_anthropic_hh,
        'chosen, rejected: "\\n\\nHuman: … \\n\\nAssistant: …" dialogues (no prompt column)',
    ),
}
"""Shape → how to tell and read it; the first that recognises a row reads it."""


def _unrecognised(row: Row) -> BadRowError:
    """Why no shape fits: the first column that is absent or of a wrong kind."""
    if row.get("prompt") is not None:
        return BadRowError("prompt", f"is {called(row['prompt'])}, not text or messages")
    for field in ("chosen", "rejected"):
        if row.get(field) is None:
            return absent(row, field)
        if not isinstance(row[field], str):
            return BadRowError(field, f"is {called(row[field])}, not text or messages")
    return absent(row, "prompt")


# --- The pair ---------------------------------------------------------------------------------


def _make_pair(parts: Parts, row: Row, line: int, rating_columns: Sequence[str]) -> PreferencePair:
    given = [field for field in ("prompt", "conversations") if row.get(field) is not None]
    prompt = check_conversation(parts.prompt, given[0] if given else "chosen")
    check_text(parts.chosen, "chosen", "the response")
    check_text(parts.rejected, "rejected", "the response")
    ratings = _ratings(parts, row, rating_columns)
    strength = _number(row.get("strength"))
    return PreferencePair(
        prompt=prompt if prompt[0]["role"] == "system" else _system_column(row) + prompt,
        chosen=parts.chosen,
        rejected=parts.rejected,
        line=line,
        chosen_rating=ratings[0],
        rejected_rating=ratings[1],
        strength=strength if strength is not None and 0 <= strength <= 1 else None,
    )


def _system_column(row: Row) -> list[Message]:
    system = row.get("system")
    if system is None or (isinstance(system, str) and not system.strip()):
        return []
    if not isinstance(system, str):
        raise BadRowError("system", f"is {called(system)}, not text")
    check_text(system, "system", "the system message")
    return [{"role": "system", "content": system}]


def _ratings(parts: Parts, row: Row, columns: Sequence[str]) -> tuple[float | None, float | None]:
    if len(columns) == 1:
        gap = _number(row.get(columns[0]))
        return gap, None if gap is None else 0.0
    if columns:
        return _number(row.get(columns[0])), _number(row.get(columns[1]))
    by_text = _scores_by_text(row)
    return (
        _first_number(row.get("chosen_rating"), row.get("score_chosen"), by_text.get(parts.chosen)),
        _first_number(
            row.get("rejected_rating"), row.get("score_rejected"), by_text.get(parts.rejected)
        ),
    )


def _scores_by_text(row: Row) -> dict[str, Any]:
    """`all_rm_scores` by `all_generated_responses`; of equal texts the first counts."""
    texts, scores = row.get("all_generated_responses"), row.get("all_rm_scores")
    if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores):
        return {}
    pairs = list(zip(texts, scores, strict=True))
    return {text: score for text, score in reversed(pairs) if isinstance(text, str)}


def _first_number(*values: Any) -> float | None:
    return next((number for value in values if (number := _number(value)) is not None), None)


def _number(value: Any) -> float | None:
    """A finite number, also from a .csv cell; anything else is no score."""
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
