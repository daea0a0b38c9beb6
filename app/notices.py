"""What a person is told when something cannot be done: one calm sentence, never a traceback."""

from __future__ import annotations

import functools
import html
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from gradio_client import utils as client_utils

from gapo_lite.errors import GapoError

logger = logging.getLogger(__name__)

_OURS = "Something went wrong on the server's side; what exactly stands in its log."
_FORGED = (
    "What was sent is not what this input holds, or what was chosen is not there any more. Choose "
    "again, or reload the page."
)
_LONGEST = 2000  # characters of a notice


class CalmBlocks(gr.Blocks):
    """Blocks that refuse wrong input with a sentence.

    Gradio itself says nothing where a value is of the wrong kind, lists all choices where it is
    none of them, and downloads a file whose path is an address.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any) -> list[Any]:
        """What the components make of the values that a browser has sent."""
        try:
            _check_sent(inputs)
            return await super().preprocess_data(block_fn, inputs, *args)
        except Exception as error:
            logger.warning("input of %s was refused: %s", block_fn.api_name, type(error).__name__)
            own = error.message if isinstance(error, gr.Error) else ""
            text = own if own and "in the list of choices" not in own else _FORGED
            raise _refusal(text) from None


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
        is_word = text.partition(" ")[0].isalpha()  # not a file's name, nor a setting's
        return _refusal(text[:1].upper() + text[1:] if is_word else text)
    logger.error("a handler failed", exc_info=error)
    return gr.Error(_OURS, title="Not done", print_exception=False)


def _refusal(text: str) -> gr.Error:
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    return gr.Error(as_html(shown), duration=15, title="Not done", print_exception=False)


def _check_sent(inputs: list[Any]) -> None:
    """Refuses texts that no answer could hold, and files that lie elsewhere.

    Raises:
        ValueError: there is one.
    """
    json.dumps(inputs, ensure_ascii=False).encode()  # halves of characters cannot be
    client_utils.traverse(inputs, _check_file, client_utils.is_file_obj_with_meta)


def _check_file(file: dict[str, Any]) -> dict[str, Any]:
    if client_utils.is_http_url_like(str(file["path"])):
        raise ValueError("a file that lies elsewhere")
    return file
