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
        key: the benchmark's id, or the questions themselves.
        messages: questions and answers in turn; the last is an answer.
        num_tokens: of all answers, None where the file does not say.
    """

    key: str
    messages: list[Message]
    num_tokens: int | None

    @property
    def questions(self) -> tuple[str, ...]:
        """All turns of the user."""
        return tuple(turn["content"] for turn in self.messages if turn["role"] == "user")

    @property
    def answer(self) -> str:
        """All answers, by which their length is measured."""
        return "\n\n".join(turn["content"] for turn in self.messages if turn["role"] == "assistant")


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
        DataError: it cannot be read, a row of it is no answer, or its questions are not given.
    """
    path, field = split_spec(spec)
    by_id = {str(_id_of(prompt.row)): prompt for prompt in prompts}
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


def pair_answers(a: AnswerFile, b: AnswerFile) -> tuple[list[AnswerPair], int]:
    """Entries with the same key, in the order of A's; one that is there twice pairs with the
    second of B's.

    Returns:
        The pairs, and how many entries of either file have no partner.

    Raises:
        DataError: there is no pair at all.
    """
    keys = [_keys(entry) for entry in b.entries]
    waiting: dict[Any, list[int]] = defaultdict(list)
    for number, names in enumerate(keys):
        for key in names:
            waiting[key].append(number)
    pairs, taken = [], set()
    for entry in a.entries:
        free = (n for key in _keys(entry) for n in waiting[key] if n not in taken)
        number = next(free, -1)
        if number >= 0:
            taken.add(number)
            pairs.append(AnswerPair(entry, b.entries[number]))
    if not pairs:
        raise DataError(
            f"{a.name} and {b.name} answer no prompt in common, so there is nothing to compare. "
            "Give two files that answer the same prompts."
        )
    return pairs, len(a.entries) + len(b.entries) - 2 * len(pairs)


def _keys(entry: Entry) -> list[Any]:
    return [entry.questions, entry.key] if entry.key else [entry.questions]


class _UnreadableError(Exception):
    pass


def _read(row: Row, field: str, by_id: dict[str, Prompt]) -> tuple[str, Entry]:
    if "choices" in row:
        return str(row.get("model_id", "")), _read_choices(row, by_id)
    if "uid" in row and isinstance(row.get("messages"), list):
        return str(row.get("model", "")), _read_messages(row)
    if "instruction" in row:
        text = _text(row["instruction"], "instruction")
        if row.get("input"):
            text = f"{text}\n\n{_text(row['input'], 'input')}"
        answer = _text(row.get("output"), "output")
        return str(row.get("generator", "")), _entry("", [text], [answer], row.get("num_tokens"))
    names = [field] if field else [name for name in _FIELDS if name in row]
    if not names or names[0] not in row or "prompt" not in row:
        raise _UnreadableError(
            f"it is no answer: expected prompt and {field or 'answer'}, instruction and output "
            "(AlpacaEval), or a row of MT-Bench or Arena-Hard."
        )
    answer = _text(row[names[0]], names[0])
    if isinstance(row["prompt"], list):
        said = [*row["prompt"], {"role": "assistant", "content": answer}]
        return "", Entry("", [_message(turn) for turn in said], None)
    return "", _entry("", [_text(row["prompt"], "prompt")], [answer], None)


def _read_choices(row: Row, by_id: dict[str, Prompt]) -> Entry:
    key = str(_id_of(row))
    if key not in by_id:
        raise _UnreadableError(
            f"it answers question {key}, which is not known: give the benchmark's question.jsonl "
            "with --prompts."
        )
    try:
        turns = row["choices"][0]["turns"]
        answers = [turn["content"] if isinstance(turn, dict) else turn for turn in turns]
    except (KeyError, IndexError, TypeError):
        raise _UnreadableError("its choices are none of MT-Bench's or Arena-Hard's.") from None
    counts = [turn.get("token_len") for turn in turns if isinstance(turn, dict)]
    known = bool(counts) and all(isinstance(count, int) for count in counts)
    prompt = by_id[key]
    questions = [prompt.text, *prompt.followups][: len(answers)]
    if len(questions) < len(answers) or not answers:
        raise _UnreadableError(f"it has {len(answers)} answers to {len(questions)} questions.")
    answers = [_text(answer, "choices") for answer in answers]
    return _entry(key, questions, answers, sum(counts) if known else None)


def _read_messages(row: Row) -> Entry:
    messages = [_message(turn) for turn in row["messages"]]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise _UnreadableError("its messages do not end with an answer.")
    counted = row.get("metadata")
    count = counted.get("token_len") if isinstance(counted, dict) else None
    return Entry(str(row["uid"]), messages, count if isinstance(count, int) else None)


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
        raise _UnreadableError("one of its messages is of no system, user or assistant.")
    content = turn.get("content")
    content = content.get("answer") if isinstance(content, dict) else content
    return {"role": turn["role"], "content": _text(content, "messages")}


def _entry(key: str, questions: Sequence[str], answers: Sequence[str], count: Any) -> Entry:
    messages: list[Message] = []
    for question, answer in zip(questions, answers, strict=True):
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}]
    return Entry(key, messages, count if isinstance(count, int) else None)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _UnreadableError(f"its {field} is no text.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _UnreadableError(f"its {field} holds half of a \\u pair, which is no character.")
    return value


def _id_of(row: Row) -> Any:
    return row.get("question_id", row.get("uid"))
