"""What the command line says and shows: log lines, errors and tables. Imports no torch."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from gapo_lite.errors import RunError

_HARMLESS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_HARMLESS |= {0x7F: "\N{SYMBOL FOR DELETE}"}
_HARMLESS |= dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}")
_PIPE_COLUMNS = 180  # rich takes 80 where there is no terminal, which would cut the tables


def visible(text: str) -> str:
    """Text with its control characters (ESC above all) shown, not obeyed; \\n and \\t stay."""
    return text.translate(_HARMLESS)


def is_main_process() -> bool:
    """Whether this process speaks: the only one, or the first that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def show_error(error: Exception) -> None:
    """`error: …` on stderr.

    Of several processes the first speaks, and any that can fail on its own, as when memory is out.
    """
    if is_main_process():
        print(visible(f"error: {error}"), file=sys.stderr, flush=True)
    elif isinstance(error, RunError):
        print(
            visible(f"error (process {os.environ['RANK']}): {error}"), file=sys.stderr, flush=True
        )


def note(text: str) -> None:
    """A remark on stderr, apart from the answers on stdout."""
    print(visible(text), file=sys.stderr, flush=True)


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Shows what gapo_lite logs: every line, or warnings only on a terminal, which has bars.

    Errors are left to `show_error`: what is logged as one is raised too.
    """
    package = logging.getLogger("gapo_lite")
    handler, level = _StderrHandler(), package.level
    handler.setLevel(logging.WARNING if sys.stderr.isatty() else logging.INFO)
    handler.addFilter(lambda record: is_main_process() and record.levelno < logging.ERROR)
    handler.setFormatter(_Plain())
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


class _StderrHandler(logging.StreamHandler):
    """To what sys.stderr is at the time: a bar replaces it, so that lines appear above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return visible(prefix + super().format(record))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table on stdout, its first column on the left, the others on the right; no markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=Text(title) if title else None, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False).print(table)
