"""Handlers that hang on several events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr


def on_last(
    triggers: Sequence[Any], handler: Callable[..., Any], inputs: Any, outputs: Any, **options: Any
) -> Any:
    """Runs a handler at these events: one at a time, and once more after the last event that came
    meanwhile.

    Gradio's own "always_last" repeats the *event* for a handler that was busy, and with it every
    other handler of that event: two that were busy then keep each other going for ever (6.31). What
    hangs on an event by a step between is repeated alone.

    Args:
        triggers: events, such as `number.change`.
        handler: as for `gr.on`, with its `inputs`, `outputs` and other `options`.

    Returns:
        The handler's dependency, for `.then`.
    """
    step = gr.on(triggers, None, None, None, js="() => []", api_visibility="private")
    return step.then(handler, inputs, outputs, trigger_mode="always_last", **options)


def hide_at(triggers: Sequence[Any], component: Any) -> None:
    """Puts a component out of sight at these events; at each of them, so that none is repeated."""
    gr.on(
        triggers,
        lambda: gr.update(visible=False),
        None,
        component,
        trigger_mode="multiple",
        show_progress="hidden",
        api_visibility="private",
    )
