"""What a person is told when something cannot be done: one calm sentence, never a traceback."""

from __future__ import annotations

import functools
import html
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from gapo_lite.errors import GapoError

logger = logging.getLogger(__name__)

_OURS = "Something went wrong on the server's side; what exactly stands in its log."


def calm(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors reach the browser as a notice: a person's own in their words, ours
    without details."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def generating(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from handler(*args, **kwargs)
            except Exception as error:
                raise _notice(error) from None

        return generating

    @functools.wraps(handler)
    def returning(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise _notice(error) from None

    return returning


def say(message: str) -> None:
    """A short word of what was done."""
    gr.Info(as_html(message), duration=5)


def as_html(text: str) -> str:
    """Any text, to stand in a page as it is."""
    return html.escape(text).replace("\n", "<br>")


def _notice(error: Exception) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, GapoError):
        text = str(error)
        return gr.Error(
            as_html(text[:1].upper() + text[1:]),
            duration=15,
            title="Not done",
            print_exception=False,
        )
    logger.error("a handler failed", exc_info=error)
    return gr.Error(_OURS, title="Not done", print_exception=False)
