"""Values → HTML: what the page shows in its own way, since Gradio has no component for it.

Everything that comes from data, models, logs or people goes through `as_html`: it is shown as the
characters that it has, and never becomes an element of the page.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from app.notices import as_html
from gapo_lite.types import Message

HEADER = (
    '<div class="page-head"><h1>GaPO-Lite</h1><p>Preference optimisation in which every pair has a '
    "target margin of its own, by 4-bit QLoRA on one GPU.</p></div>"
)


def facts(items: Iterable[tuple[str, str]]) -> str:
    """A row of names and values."""
    cells = "".join(
        f"<span><span>{as_html(name)}</span> <b>{as_html(value)}</b></span>"
        for name, value in items
    )
    return f'<div class="fact-row">{cells}</div>'


def warnings(sentences: Iterable[str]) -> str:
    """A marked line for each sentence."""
    return "".join(f'<div class="warning">{as_html(text)}</div>' for text in sentences)


def subtle(text: str) -> str:
    """A quiet remark."""
    return f'<div class="subtle">{as_html(text)}</div>' if text else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, text: bool = False) -> str:
    """A plain table; with `text` its cells keep their line breaks."""
    head = "".join(f"<th>{as_html(column)}</th>" for column in columns)
    kind = ' class="text"' if text else ""
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{_cell(cell, text)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table-scroll"><table class="plain-table"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def conversation(title: str, turns: Sequence[Message], remark: str = "") -> str:
    """One column of a chat: questions, answers, and what is being waited for."""
    body = "".join(_turn(turn["role"], turn["content"]) for turn in turns)
    if remark:
        body += f'<div class="subtle">{as_html(remark)}</div>'
    head = f"<h4>{as_html(title)}</h4>" if title else ""
    return f'<section class="talk">{head}<div class="turns">{body}</div></section>'


def side_by_side(columns: Sequence[str]) -> str:
    """Conversations beside each other; under each other on a phone."""
    return f'<div class="talks" data-columns="{len(columns)}">{"".join(columns)}</div>'


def verbatim(text: str) -> str:
    """Text for a place with `white-space: pre-wrap`, which keeps line breaks itself."""
    return html.escape(text)


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _turn(role: str, text: str) -> str:
    who = "you" if role == "user" else "model"
    return (
        f'<div class="turn {who}"><div class="said" dir="auto">{verbatim(text)}</div>'
        '<button type="button" class="quiet-button" data-copy>copy</button></div>'
    )


def _cell(text: str, keep_lines: bool) -> str:
    return verbatim(text) if keep_lines else as_html(text)
