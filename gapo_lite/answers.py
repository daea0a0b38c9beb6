"""Files of answers: written as benchmarks read them, and read again to be judged.

answers      .jsonl: {"prompt", "answer"}, or {"prompt", "base", "tuned"} of a run
alpaca_eval  .json: AlpacaEval's model_outputs.json, a list of {"instruction", "output",
             "generator", "dataset"}; it looks for others of its columns, not for ours
mt_bench     .jsonl: FastChat's data/mt_bench/model_answer/<model>.jsonl
arena_hard   .jsonl: Arena-Hard's model_answer/<model>.jsonl, as its question.jsonl is: with
             `uid` (2.0) or with `question_id` (0.1)
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gapo_lite.errors import DataError
from gapo_lite.journal import digest
from gapo_lite.prompts import Prompt

FASTCHAT_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Category → temperature, as FastChat's llm_judge sets it."""
FASTCHAT_OTHERS = 0.7


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer.

    Attributes:
        text: "" where there is none.
        num_tokens: in the model's tokens.
        cut_short: whether max_tokens ended it.
        tstamp: when it was given, in seconds since 1970.
    """

    text: str
    num_tokens: int
    cut_short: bool
    tstamp: float


@dataclass(frozen=True, slots=True)
class Answered:
    """What one model said to one prompt.

    Attributes:
        turns: one a question of the prompt; those after a problem are empty.
        problem: why there is no answer, "" if there is one.
    """

    turns: list[Turn]
    problem: str = ""


Sides = dict[str, list[Answered]]
"""Side ("answer", "base", "tuned") → its answers, one a prompt."""


# -- what a format needs of its prompts --


def num_left_out(kind: str, prompts: Sequence[Prompt]) -> int:
    """Prompts whose system prompt or earlier turns a format does not hold."""
    return sum(
        len(prompt.messages) > 1
        and not (kind == "arena_hard" and prompt.row.get("uid") is not None)
        for prompt in (prompts if kind != "answers" else ())
    )


def check_prompts(kind: str, prompts: Sequence[Prompt]) -> None:
    """Refuses prompts that a format cannot hold, before any of them is answered.

    Raises:
        DataError: one has several turns or no id where the format needs another; or one id is used
            twice.
    """
    if kind in ("answers", "alpaca_eval") and any(prompt.followups for prompt in prompts):
        raise DataError(
            f"some prompts have several turns, which the format {kind} cannot hold. Give "
            "--format mt_bench."
        )
    if kind not in ("mt_bench", "arena_hard"):
        return
    names = ("question_id",) if kind == "mt_bench" else ("uid", "question_id")
    ids = [_id_of(prompt, names) for prompt in prompts]
    for number, found in enumerate(ids, start=1):
        if found is None:
            raise DataError(
                f"prompt {number} has no {' or '.join(names)}, by which {kind} knows its "
                "questions. Give the benchmark's own question.jsonl."
            )
    twice = [found for found, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(f"the id {twice[0]!r} is used for {ids.count(twice[0])} prompts.")


def temperature_of(kind: str, prompt: Prompt) -> float:
    """The temperature where none is asked for: greedy, but for MT-Bench FastChat's own."""
    if kind != "mt_bench":
        return 0.0
    return FASTCHAT_TEMPERATURES.get(str(prompt.row.get("category")), FASTCHAT_OTHERS)


def _id_of(prompt: Prompt, names: Sequence[str]) -> str | int | None:
    found = next((prompt.row[name] for name in names if prompt.row.get(name) is not None), None)
    return found if isinstance(found, (str, int)) else None


# -- writing --


def _answers(prompts: Sequence[Prompt], sides: Sides, model: str) -> str:
    rows = []
    for number, prompt in enumerate(prompts):
        said = {side: answers[number] for side, answers in sides.items()}
        alone = len(prompt.messages) == 1
        row: dict[str, Any] = {"prompt": prompt.text if alone else prompt.messages}
        row |= {side: answered.turns[0].text for side, answered in said.items()}
        problem = next((answered.problem for answered in said.values() if answered.problem), "")
        rows.append(row | ({"problem": problem} if problem else {}))
    return _jsonl(rows)


def _alpaca_eval(prompts: Sequence[Prompt], sides: Sides, model: str) -> str:
    (answers,) = sides.values()
    rows = []
    for prompt, answered in zip(prompts, answers, strict=True):
        row = _instruction(prompt)
        row |= {"output": answered.turns[0].text, "generator": model}
        row |= {"dataset": prompt.row["dataset"]} if prompt.row.get("dataset") else {}
        rows.append(row | {"num_tokens": answered.turns[0].num_tokens})
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def _instruction(prompt: Prompt) -> dict[str, Any]:
    """As the prompt's own row has it, if that is where it was read from."""
    named, more = prompt.row.get("instruction"), prompt.row.get("input")
    if more and prompt.text == f"{named}\n\n{more}":
        return {"instruction": named, "input": more}
    return {"instruction": prompt.text}


def _mt_bench(prompts: Sequence[Prompt], sides: Sides, model: str) -> str:
    (answers,) = sides.values()
    rows = []
    for prompt, answered in zip(prompts, answers, strict=True):
        choice = {"index": 0, "turns": [turn.text for turn in answered.turns]}
        rows.append(_choices_row(prompt, answered, model, choice))
    return _jsonl(rows)


def _arena_hard(prompts: Sequence[Prompt], sides: Sides, model: str) -> str:
    (answers,) = sides.values()
    rows = []
    for prompt, answered in zip(prompts, answers, strict=True):
        if prompt.row.get("uid") is not None:
            rows.append(_arena_messages_row(prompt, answered, model))
            continue
        turns = [{"content": turn.text, "token_len": turn.num_tokens} for turn in answered.turns]
        row = _choices_row(prompt, answered, model, {"index": 0, "turns": turns})
        if len(turns) == 1:
            row["conv_metadata"] = _style(answered.turns[0])
        rows.append(row)
    return _jsonl(rows)


def _choices_row(
    prompt: Prompt, answered: Answered, model: str, choice: dict[str, Any]
) -> dict[str, Any]:
    return {
        "question_id": prompt.row["question_id"],
        "answer_id": _answer_id(model, prompt, answered),
        "model_id": model,
        "choices": [choice],
        "tstamp": answered.turns[-1].tstamp,
    }


def _arena_messages_row(prompt: Prompt, answered: Answered, model: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [dict(message) for message in prompt.messages]
    for number, turn in enumerate(answered.turns):
        if number:
            messages.append({"role": "user", "content": prompt.followups[number - 1]})
        messages.append({"role": "assistant", "content": {"answer": turn.text}})
    return {
        "uid": prompt.row["uid"],
        "ans_id": _answer_id(model, prompt, answered),
        "model": model,
        "messages": messages,
        "tstamp": answered.turns[-1].tstamp,
        "metadata": _style(answered.turns[-1]),
    }


def _answer_id(model: str, prompt: Prompt, answered: Answered) -> str:
    """22 characters, as theirs; the same for the same answer."""
    said = [turn.text for turn in answered.turns]
    return digest(model, prompt.messages, prompt.followups, said)[:22]


def _style(turn: Turn) -> dict[str, Any]:
    """What Arena-Hard's style control counts outside of code blocks. Its token_len is in the
    tokens of an OpenAI model, ours in the answering model's."""
    text = re.sub(r"```[^`]*```", "``````", turn.text)
    headers = (len(re.findall(rf"^#{{{level}}}\s", text, re.MULTILINE)) for level in range(1, 7))
    return {
        "token_len": turn.num_tokens,
        "header_count": {f"h{level}": count for level, count in enumerate(headers, start=1)},
        "list_count": {
            "ordered": len(re.findall(r"^\s*\d+\.\s", text, re.MULTILINE)),
            "unordered": len(re.findall(r"^\s*[-*+]\s", text, re.MULTILINE)),
        },
        "bold_count": {
            "**": len(re.findall(r"\*\*[^*\n]+\*\*", text)),
            "__": len(re.findall(r"__[^_\n]+__", text)),
        },
    }


def _jsonl(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


FORMATS: dict[str, Callable[[Sequence[Prompt], Sides, str], str]] = {
    "answers": _answers,
    "alpaca_eval": _alpaca_eval,
    "mt_bench": _mt_bench,
    "arena_hard": _arena_hard,
}
"""Format → the text of the file: of N prompts, the N answers of each side, and the model's name."""
