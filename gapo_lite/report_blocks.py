"""A report as blocks, and the same blocks as HTML and as GitHub's Markdown.

Words come from anywhere (names, messages of libraries): both renderers escape every word, and
control characters, changes of the writing direction and great length never get that far.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from gapo_lite.drawing import plain, still
from gapo_lite.plots import STYLE


@dataclass(frozen=True, slots=True)
class Name:
    """A name in a sentence, shown in bold and kept apart from the words around it."""

    words: str


Words = str | Name | tuple[str | Name, ...]


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Sentences; `lead` for the first of a page."""

    words: Words
    lead: bool = False


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list."""

    items: tuple[Words, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Its first column holds names or words, the others numbers, or words if `prose`.

    Attributes:
        quiet: rows to show in grey, such as a reference.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Words, ...], ...]
    quiet: frozenset[int] = frozenset()
    prose: bool = False


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures side by side, of `plots` and `scatter`; Markdown leaves them out.

    Attributes:
        drawn: HTML.
        caption: what they show, and how to read them.
        small: many small ones.
    """

    drawn: tuple[str, ...]
    caption: str
    small: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Paragraph | Bullets | Table | Figures, ...]


# --- HTML -----------------------------------------------------------------------------------------


def as_html(title: str, sections: Sequence[Section], footer: str) -> str:
    """A whole page: one file, no scripts, nothing to fetch; light, dark and printable."""
    head, *rest = sections
    body = "".join(
        f"<section><h2>{_escaped(one.title)}</h2>{''.join(map(_block, one.blocks))}</section>\n"
        for one in rest
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_escaped(title)}</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n"
        f"<main>\n<header><h1>{_bdi(title)}</h1>{''.join(map(_block, head.blocks))}</header>\n"
        f"{body}<footer>{_escaped(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _style() -> str:
    """Rules of the figures, those for the dark made to follow the reader's system, and our own."""
    rules = STYLE.read_text(encoding="utf-8")
    rules = re.sub(
        r"^\.dark\b([^{]*)\{([^}]*)\}",
        r"@media screen and (prefers-color-scheme: dark) { :root\1{\2} }",
        rules,
        flags=re.MULTILINE,
    )
    return rules + STYLE.with_name("report.css").read_text(encoding="utf-8")


def _block(block: Paragraph | Bullets | Table | Figures) -> str:
    match block:
        case Paragraph(words, lead):
            return f"<p{_class('lead', lead)}>{_html(words)}</p>\n"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{_html(one)}</li>' for one in items)}</ul>\n"
        case Table():
            return _table(block)
        case Figures(drawn, caption, small):
            kind = "chart-grid small-charts" if small else "chart-grid"
            figures = "".join(map(still, drawn))
            return (
                f'<p class="caption">{_escaped(caption)}</p><div class="{kind}">{figures}</div>\n'
            )


def _class(name: str, has_it: bool) -> str:
    return f' class="{name}"' if has_it else ""


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_escaped(one)}</th>' for one in table.columns)
    rows = "".join(
        f"<tr{_class('quiet', at in table.quiet)}>"
        f'<th scope="row">{_html(row[0])}</th>{"".join(map(_cell, row[1:]))}</tr>\n'
        for at, row in enumerate(table.rows)
    )
    kind = "scroll prose" if table.prose else "scroll"
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n"
    )


def _cell(words: Words) -> str:
    shown = _html(words)
    if isinstance(words, str) and " ± " in words:
        mean, _, half = shown.partition(" ± ")
        shown = f'{mean}<span class="half"> ± {half}</span>'
    return f"<td>{shown}</td>"


def _html(words: Words) -> str:
    if isinstance(words, tuple):
        return "".join(map(_html, words))
    return f"<b>{_bdi(words.words)}</b>" if isinstance(words, Name) else _escaped(words)


def _bdi(words: str) -> str:
    return f"<bdi>{_escaped(words)}</bdi>"


def _escaped(words: str) -> str:
    return html.escape(_whole(words))


# --- Markdown -------------------------------------------------------------------------------------

_ASCII = re.compile(r"([\\`*\[\]<>|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_LINKS = re.compile(r"(@|#(?=\w)|\b(?:https?|ftp):(?=//)|\bwww(?=\.)|\bGH(?=-\d))", re.IGNORECASE)
_APART = "\u2060"  # a word joiner: nothing to see, but no mention, issue or link either
_RIGHT_TO_LEFT = ("R", "AL")


def as_markdown(title: str, sections: Sequence[Section], footer: str) -> str:
    """The same without figures, as GitHub reads it."""
    parts = [f"# {_markdown(title)}"]
    for at, section in enumerate(sections):
        shown = [_markdown_block(block) for block in section.blocks]
        shown = [one for one in shown if one]
        if shown and at:
            parts.append(f"## {_markdown(section.title)}")
        parts += shown
    return "\n\n".join([*parts, _markdown(footer)]) + "\n"


def _markdown_block(block: Paragraph | Bullets | Table | Figures) -> str:
    match block:
        case Paragraph(words):
            return _markdown(words)
        case Bullets(items):
            return "\n".join(f"- {_markdown(one)}" for one in items)
        case Table():
            sides = ["---", *(["---" if block.prose else "---:"] * (len(block.columns) - 1))]
            lines = [[_markdown(one) for one in block.columns], sides]
            lines += [[_markdown(one) for one in row] for row in block.rows]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case _:
            return ""


def _markdown(words: Words) -> str:
    if isinstance(words, tuple):
        return "".join(map(_markdown, words))
    if isinstance(words, Name):
        # Bold of blanks alone would be asterisks.
        name = _apart(_marked_down(words.words.strip()))
        return f"**{name}**" if name else "(no name)"
    return _marked_down(words)


def _marked_down(words: str) -> str:
    shown = _LINKS.sub(rf"\1{_APART}", _ASCII.sub(r"\\\1", _whole(words)))
    return shown.replace("&", "&amp;").replace("$", "&#36;")


def _apart(words: str) -> str:
    """Isolates a name that is written from right to left from the words around it."""
    turned = any(unicodedata.bidirectional(one) in _RIGHT_TO_LEFT for one in words)
    return f"\u2068{words}\u2069" if turned else words


def _whole(words: str) -> str:
    """Of long sentences `plain` would cut the end, so it gets them in pieces."""
    return "".join(plain(words[at : at + 400]) for at in range(0, len(words), 400))
