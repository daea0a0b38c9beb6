"""Beside the Start button: will it fit, on this machine or on a card that one names?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import forecast_views
from app import views as html
from app.forecasts import CARDS, THIS_MACHINE, Outlook, Question
from app.notices import calm, say
from app.services import Services
from app.sessions import Sessions
from app.tabs.events import on_last
from app.tabs.settings import Inputs, held
from gapo_lite.errors import ConfigError, GapoError


@dataclass(frozen=True, slots=True)
class _Answered:
    """What a window was told last, and what it had asked."""

    question: Question
    outlook: Outlook


class Fit:
    """The card and the button above `start`, and the answer below."""

    def __init__(self, start: gr.Button):
        with gr.Row(elem_classes="low-row"):
            self.card = gr.Dropdown(
                list(CARDS),
                value=THIS_MACHINE,
                label="card",
                allow_custom_value=True,  # such as 24GB
                scale=3,
                min_width=170,
            )
            self.ask = gr.Button("Will it fit?", scale=2, min_width=120)
        start.render()
        self.answer = gr.HTML("", js_on_load=None)
        self.use = gr.Button("Use these settings", size="sm", visible=False)
        self.cancel = gr.Button("Stop asking", size="sm", visible=False)


def wire(services: Services, fit: Fit, inputs: Inputs) -> None:
    """What the buttons do, and what becomes of an answer when the form changes."""
    keys, components = list(inputs.by_key), list(inputs.by_key.values())
    answered: Sessions[_Answered | None] = Sessions(lambda: None)

    def question(card: Any, given: tuple[Any, ...]) -> Question:
        return services.will_it_fit(dict(zip(keys, given, strict=True)), card)

    @calm
    def look_ahead(request: gr.Request, card: Any, *given: Any) -> Iterator[tuple[Any, ...]]:
        wanted = question(card, given)
        answered.put(request.session_hash, None)
        yield forecast_views.progress(Outlook()), _shown(False), _shown(True)
        try:
            for outlook in services.outlooks(wanted):
                if outlook.found:
                    answered.put(request.session_hash, _Answered(wanted, outlook))
                    yield *_drawn(_Answered(wanted, outlook), is_stale=False), _shown(False)
                else:
                    yield forecast_views.progress(outlook), gr.skip(), gr.skip()
        except GapoError as error:
            yield html.warnings([str(error)]), _shown(False), _shown(False)

    @calm
    def judge(request: gr.Request, card: Any, *given: Any) -> tuple[Any, ...]:
        """Marks an answer that is not the form's any more."""
        known = answered.get(request.session_hash)
        if known is None:
            return gr.skip(), gr.skip()
        try:
            is_stale = not question(card, given).is_like(known.question)
        except GapoError:  # which is told beside the form
            is_stale = True
        return _drawn(known, is_stale=is_stale)

    @calm
    def use(request: gr.Request) -> list[Any]:
        known = answered.get(request.session_hash)
        settings = known.outlook.found["advice"] if known else {}
        if not settings:
            raise ConfigError("there is nothing to fill in: ask first whether it fits.")
        say("These settings are in the form now.")
        return [
            gr.update(value=held(key, settings[key])) if key in settings else gr.skip()
            for key in keys
        ]

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    few: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "forecasts", **quiet}
    asked, shown = [fit.card, *components], [fit.answer, fit.use]
    asking = fit.ask.click(look_ahead, asked, [*shown, fit.cancel], api_name="will_it_fit", **few)
    used = fit.use.click(use, None, components, api_name="use_settings", **quiet)
    again = used.success(look_ahead, asked, [*shown, fit.cancel], api_visibility="private", **few)
    for done in (asking, again):  # the form may have changed meanwhile
        done.then(judge, asked, shown, api_visibility="private", **quiet)
    on_last(
        [component.change for component in asked],
        judge,
        asked,
        shown,
        api_visibility="private",
        **quiet,
    )
    fit.cancel.click(None, cancels=[asking, again]).then(
        lambda: (html.subtle("Not answered."), _shown(False), _shown(False)),
        None,
        [*shown, fit.cancel],
        api_visibility="private",
        **quiet,
    )


def _drawn(known: _Answered, *, is_stale: bool) -> tuple[Any, Any]:
    """The answer, and whether its advice can be used."""
    drawn = forecast_views.answer(known.question, known.outlook, is_stale=is_stale)
    return drawn, _shown(bool(known.outlook.found["advice"]) and not is_stale)


def _shown(is_there: bool) -> Any:
    return gr.update(visible=is_there)
