"""Two files of answers → pairs of answers to the same prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gapo_lite.data.files import open_table
from gapo_lite.data.messages import Row
from gapo_lite.errors import DataError
from gapo_lite.prompts import Prompt
from gapo_lite.types import Message, Problem

_FIELDS = ("answer", "tuned", "base")  # of our own format, in the order of preference


@dataclass(frozen=True, slots=True)
class Entry:
    """What one file says to one prompt.

    Attributes:
        key: the benchmark's id, "" where there is none.
        messages: questions and answers in turn; the last is an answer.
        num_tokens: of all answers, None where the file does not say.
        num_given: leading messages that were there before the first answer.
        is_bare: whether its format holds the question alone, without system prompt and history.
    """

    key: str
    messages: list[Message]
    num_tokens: int | None
    num_given: int = 1
    is_bare: bool = False

    @property
    def given(self) -> list[Message]:
        """What was there before the first answer."""
        return self.messages[: self.num_given]

    @property
    def prompt(self) -> tuple[tuple[str, str], ...]:
        """Role and content of all that is no answer."""
        asked = [turn for turn in self.messages[self.num_given :] if turn["role"] != "assistant"]
        return tuple((turn["role"], turn["content"]) for turn in [*self.given, *asked])

    @property
    def questions(self) -> tuple[str, ...]:
        """All turns of the user."""
        return tuple(turn["content"] for turn in self.messages if turn["role"] == "user")

    @property
    def answers(self) -> list[str]:
        """What the model said, without what was given as said before."""
        said = self.messages[self.num_given :]
        return [turn["content"] for turn in said if turn["role"] == "assistant"]

    @property
    def answer(self) -> str:
        """All answers, by which their length is measured."""
        return "\n\n".join(self.answers)


class AnswerFile(NamedTuple):
    """A file's entries, and the name of the model that they are of."""

    name: str
    entries: list[Entry]


class AnswerPair(NamedTuple):
    """Two answers to one prompt."""

    a: Entry
    b: Entry


def read_answer_file(spec: str, prompts: Sequence[Prompt] = ()) -> AnswerFile:
    """The answers of a file in any format that `gapo-lite generate` writes.

    Args:
        spec: the file; or FILE:FIELD for one side of a run's answers, as answers.jsonl:base.
        prompts: the benchmark's questions, where the file has their ids alone.

    Raises:
        DataError: it cannot be read, a row of it is no answer, or its questions are not given, or
            one id is given twice.
    """
    path, field = split_spec(spec)
    by_id = _by_id(prompts)
    names: dict[str, None] = {}
    entries = []
    with open_table(Path(path)) as table:
        for numbered in table.rows:
            if isinstance(numbered, Problem):
                raise DataError(f"{path}:{numbered.line}: {numbered.reason}.")
            line, row = numbered
            try:
                name, entry = _read(row, field, by_id)
            except _UnreadableError as error:
                raise DataError(f"{path}:{line}: {error}") from None
            names[name] = None
            entries.append(entry)
    if not entries:
        raise DataError(f"{path} holds no answers.")
    own = next(iter(names)) if len(names) == 1 else ""
    return AnswerFile(own or Path(path).stem + (f" ({field})" if field else ""), entries)


def split_spec(spec: str) -> tuple[str, str]:
    """FILE:FIELD → file and field, "" where there is none."""
    path, _, field = spec.rpartition(":")
    return (spec, "") if not path or Path(spec).is_file() else (path, field)


def check_two(a: str, b: str, first: AnswerFile, second: AnswerFile) -> None:
    """Refuses the comparison of answers with themselves.

    Args:
        a, b: the specs that they were read by.
        first, second: what was read.

    Raises:
        DataError: they are one field of one file.
    """
    (path, field), (other, other_field) = split_spec(a), split_spec(b)
    same = field == other_field or ("" in (field, other_field) and first.entries == second.entries)
    if same and Path(path).samefile(other):
        raise DataError(
            f"A and B are the same answers of {path}. Of a run's answers add :tuned and :base; "
            "else give two files."
        )


def pair_answers(a: AnswerFile, b: AnswerFile) -> tuple[list[AnswerPair], int]:
    """Entries to the same prompt (all messages but the answers) or of the same id, in the order of
    A's; one that is there twice pairs with the second of B's. What is left pairs by its questions
    alone where one of the two is bare.

    Returns:
        The pairs, and how many entries of either file have no partner.

    Raises:
        DataError: there is no pair at all.
    """
    partners: dict[int, int] = {}
    for keys in (_keys, _questions):
        waiting: dict[Any, list[int]] = defaultdict(list)
        for number in sorted({*range(len(b.entries))} - {*partners.values()}):
            for key in keys(b.entries[number]):
                waiting[key].append(number)
        taken: set[int] = set()
        for number in sorted({*range(len(a.entries))} - partners.keys()):
            entry = a.entries[number]
            free = (n for key in keys(entry) for n in waiting[key] if n not in taken)
            if keys is _questions:
                free = (n for n in free if entry.is_bare or b.entries[n].is_bare)
            if (partner := next(free, None)) is not None:
                taken.add(partner)
                partners[number] = partner
    if not partners:
        raise DataError(
            f"{a.name} and {b.name} answer no prompt in common, so there is nothing to compare. "
            "Give two files that answer the same prompts."
        )
    pairs = [AnswerPair(a.entries[n], b.entries[partners[n]]) for n in sorted(partners)]
    return pairs, len(a.entries) + len(b.entries) - 2 * len(pairs)


def _keys(entry: Entry) -> list[Any]:
    return [entry.prompt, entry.key] if entry.key else [entry.prompt]


def _questions(entry: Entry) -> list[Any]:
    return [entry.questions]


def _by_id(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    found: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        found[_id_of(prompt.row)].append(prompt)
    return found


class _UnreadableError(Exception):
    pass


def _read(row: Row, field: str, by_id: dict[str, list[Prompt]]) -> tuple[str, Entry]:
    if field and field not in row:
        raise _UnreadableError(f"it has no field {field!r}; it has {', '.join(sorted(row))}.")
    if field and not row.keys().isdisjoint(("choices", "uid", "instruction")):
        raise _UnreadableError(f"its format holds one answer a row: leave out :{field}.")
    if "choices" in row:
        return str(row.get("model_id", "")), _read_choices(row, by_id)
    if "uid" in row and isinstance(row.get("messages"), list):
        return str(row.get("model", "")), _read_messages(row)
    if "instruction" in row:
        text = _text(row["instruction"], "instruction")
        if row.get("input"):
            text = f"{text}\n\n{_text(row['input'], 'input')}"
        said = [_asked(text), _answered(_text(row.get("output"), "output"))]
        entry = Entry("", said, _count(row.get("num_tokens")), is_bare=True)
        return str(row.get("generator", "")), entry
    name = field or next((name for name in _FIELDS if name in row), "")
    if not name or "prompt" not in row:
        raise _UnreadableError(
            f"it is no answer: expected prompt and {field or 'answer'}, instruction and output "
            "(AlpacaEval), or a row of MT-Bench or Arena-Hard."
        )
    answer, prompt = _text(row[name], name), row["prompt"]
    turns = prompt if isinstance(prompt, list) else [_asked(_text(prompt, "prompt"))]
    given = [_message(turn) for turn in turns]
    return "", Entry("", [*given, _answered(answer)], None, len(given))


def _read_choices(row: Row, by_id: dict[str, list[Prompt]]) -> Entry:
    key = _id_of(row)
    if not key:
        raise _UnreadableError("it has no question_id, which says what it answers.")
    if key not in by_id:
        raise _UnreadableError(
            f"it answers question {key}, which is not known: give the benchmark's question.jsonl "
            "with --prompts."
        )
    if len(by_id[key]) > 1:
        raise _UnreadableError(f"the id {key!r} is used for two questions of --prompts.")
    try:
        turns = row["choices"][0]["turns"]
        answers = [turn["content"] if isinstance(turn, dict) else turn for turn in turns]
    except (KeyError, IndexError, TypeError):
        raise _UnreadableError("its choices are none of MT-Bench's or Arena-Hard's.") from None
    counts: list[Any] = [turn.get("token_len") for turn in turns if isinstance(turn, dict)]
    known = bool(counts) and all(isinstance(count, int) for count in counts)
    (prompt,) = by_id[key]
    num_questions = 1 + len(prompt.followups)
    if num_questions < len(answers) or not answers:
        raise _UnreadableError(f"it has {len(answers)} answers to {num_questions} questions.")
    messages = list(prompt.messages)
    for number, answer in enumerate(answers):
        messages += [_asked(prompt.followups[number - 1])] if number else []
        messages += [_answered(_text(answer, "choices"))]
    num_given = len(prompt.messages)
    return Entry(key, messages, sum(counts) if known else None, num_given, is_bare=num_given == 1)


def _read_messages(row: Row) -> Entry:
    messages = [_message(turn) for turn in row["messages"]]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise _UnreadableError("its messages do not end with an answer.")
    said = [n for n, turn in enumerate(messages) if turn["role"] == "assistant"]
    # Arena-Hard's answers are objects; the assistant's turns that were given are texts
    answers = [n for n in said if isinstance(row["messages"][n]["content"], dict)]
    counted = row.get("metadata")
    count = _count(counted.get("token_len")) if isinstance(counted, dict) else None
    return Entry(str(row["uid"]), messages, count, (answers or said)[0])


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
        raise _UnreadableError("one of its messages is of no system, user or assistant.")
    content = turn.get("content")
    content = content.get("answer") if isinstance(content, dict) else content
    return {"role": turn["role"], "content": _text(content, "messages")}


def _asked(text: str) -> Message:
    return {"role": "user", "content": text}


def _answered(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _UnreadableError(f"its {field} is no text.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _UnreadableError(f"its {field} holds half of a \\u pair, which is no character.")
    return value


def _id_of(row: Row) -> str:
    """As a text, empty for none."""
    found = (row.get(name) for name in ("question_id", "uid"))
    return next((str(value) for value in found if value is not None), "")
