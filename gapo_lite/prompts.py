"""Prompts: a file, a `datasets` folder or the Hub → conversations to be answered.

A row's prompt is its `turns` (MT-Bench, Arena-Hard: the user's turns, the later ones asked once the
ones before are answered), its `prompt` (a text, a list of turns, or messages) or its `instruction`
(AlpacaEval, with its `input` below it, if there is one). Any file of another kind has a prompt a
line.

    load_prompts("question.jsonl")
    load_prompts("tatsu-lab/alpaca_eval/alpaca_eval.json")      # a file of a data set on the Hub
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapo_lite.data.files import READERS
from gapo_lite.data.messages import (
    BadRowError,
    Row,
    called,
    check_conversation,
    check_text,
    read_messages,
)
from gapo_lite.data.sources import HUB_ID, open_source
from gapo_lite.errors import DataError
from gapo_lite.types import Message, Problem

_HUB_FILE = re.compile(r"(\w[\w.-]*/\w[\w.-]*)/(\w[\w./-]*)", re.ASCII)
_FIELDS = ("turns", "prompt", "instruction")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be answered.

    Attributes:
        messages: the conversation up to the first question.
        followups: the user's later turns.
        row: as the source has it.
    """

    messages: list[Message]
    followups: list[str]
    row: Row

    @property
    def text(self) -> str:
        """The first question."""
        return self.messages[-1]["content"]


def text_prompt(text: str) -> Prompt:
    """A prompt that is a text alone.

    Raises:
        DataError: it is empty, or holds half of a character.
    """
    _checked("--prompt", text)
    return Prompt([{"role": "user", "content": text}], [], {"prompt": text})


def load_prompts(source: str, split: str = "train") -> list[Prompt]:
    """All prompts of a source, in its order.

    Args:
        source: a file, a folder that save_to_disk wrote, a Hub id owner/name, or a file in a data
            set on the Hub, as owner/name/path.
        split: of a Hub id or folder.

    Raises:
        DataError: it cannot be read, or a row of it is no prompt (all of a benchmark's are needed).
    """
    path = _place(source)
    if path and path.is_file() and _suffix(path) not in READERS:
        return [text_prompt(line) for line in _lines(path)]
    if path and path.is_file() and not path.stat().st_size:
        return []
    with open_source(source if path is None else path, split) as table:
        return [_read(source, row) for row in table.rows]


def _place(source: str) -> Path | None:
    """Where a source lies on this disk; None for what `open_source` finds by its name."""
    path = Path(source).expanduser() if source.startswith("~/") else Path(source)
    if _is_there(path):
        return path
    if source.startswith("embedded:"):
        return None
    is_file = _suffix(path) in {".txt", *READERS}
    if source.count("/") == 1 and HUB_ID.fullmatch(source) and not is_file:
        return None
    if (match := _HUB_FILE.fullmatch(source)) and is_file and ".." not in source:
        return _from_hub(*match.groups())
    raise DataError(
        f"the prompts in {source} cannot be read: there is no such file here, and it is no Hub id "
        "of the form owner/name (or owner/name/file.json)."
    )


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, a NUL in the name
        return False


def _from_hub(name: str, file: str) -> Path:
    """One file of a data set on the Hub; nothing of it is run."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(
            f"{name}/{file} is no file here, and cannot be loaded from the data set {name} on the "
            f"Hub: {reason}. Check the spelling and the network, or bring the file here."
        ) from None


def _lines(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(
            f"the prompts in {path} cannot be read: {error}. Give a UTF-8 .txt or .jsonl file."
        ) from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _checked(f"{path}:{number}", line.strip())


def _checked(place: str, text: str) -> str:
    try:
        check_text(text, "", "the prompt")
    except BadRowError as error:
        raise DataError(f"{place}: {error.reason}.") from None
    return text


def _read(source: str, numbered: tuple[int, Row] | Problem) -> Prompt:
    if isinstance(numbered, Problem):
        raise DataError(_expected(source, numbered.line, numbered.reason))
    line, row = numbered
    try:
        return _parse(row)
    except BadRowError as error:
        reason = f"{error.field}: {error.reason}" if error.field else error.reason
        raise DataError(_expected(source, line, reason)) from None


def _expected(source: str, line: int, reason: str) -> str:
    return (
        f'{source}:{line}: expected an object such as {{"prompt": "What is a leap year?"}}, or '
        f"with `instruction` or `turns` ({reason})."
    )


def _parse(row: Row) -> Prompt:
    field = next((name for name in _FIELDS if row.get(name) is not None), None)
    if field is None:
        raise BadRowError("", f"it has none of {', '.join(_FIELDS)}")
    value = row[field]
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        return Prompt(check_conversation(read_messages(value, field), field), [], row)
    turns = _turns(value, field)
    if field == "instruction" and row.get("input"):
        turns = [f"{turns[0]}\n\n{_text(row['input'], 'input')}"]
    return Prompt([{"role": "user", "content": turns[0]}], turns[1:], row)


def _turns(value: Any, field: str) -> list[str]:
    """A text, or a list of texts or of Arena-Hard's {"content": text}."""
    if isinstance(value, str):
        return [_text(value, field)]
    if not isinstance(value, list) or not value:
        raise BadRowError(field, f"is {called(value) if value != [] else 'an empty list'}")
    return [_text(item["content"] if _has_content(item) else item, field) for item in value]


def _has_content(item: Any) -> bool:
    return isinstance(item, dict) and "content" in item


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(field, f"is {called(value)}, not text")
    check_text(value, field, "the prompt")
    return value
