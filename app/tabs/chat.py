"""Chat: one voice, base and tuned side by side, or blind with a vote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from app import talks, views
from app.notices import calm
from app.services import Services
from app.sessions import Sessions
from app.talks import Settings, Talk

_WELCOME = views.side_by_side(
    [views.conversation("", [], "Choose who answers, and ask something.")]
)


def build(services: Services, tab: gr.Tab) -> None:
    """The tab's layout and wiring."""
    known: Sessions[Talk] = Sessions(Talk)
    with gr.Row():
        voice = gr.Dropdown(
            choices=services.voice_choices(),
            value=None,  # chosen when the tab is opened: the newest run then
            label="who answers",
            info="A run that has saved an adapter, or a base model.",
            scale=3,
        )
        mode = gr.Radio(
            list(talks.MODES),
            value=talks.ONE,
            label="mode",
            info="Side by side: base and tuned, same seed. Blind: you vote before you know.",
            scale=3,
        )
    screen = gr.HTML(_WELCOME, js_on_load=None)
    with gr.Group(visible=False) as voting, gr.Row():
        left = gr.Button("Left is better")
        right = gr.Button("Right is better")
        tie = gr.Button("Tie")
        both_bad = gr.Button("Both bad")
    verdict = gr.HTML("", js_on_load=None)
    question = gr.Textbox(
        placeholder="Ask something; Enter sends, Shift+Enter makes a new line.",
        label="question",  # read by a screen reader
        show_label=False,
        lines=1,
        max_lines=12,
    )
    with gr.Row():
        send = gr.Button("Send", variant="primary", min_width=90)
        stop = gr.Button("Stop", min_width=90)
        regenerate = gr.Button("Regenerate", min_width=90)
        clear = gr.Button("New conversation", min_width=90)
    with gr.Accordion("How answers are drawn", open=False):
        system = gr.Textbox(label="system prompt", lines=2, info="Read before the conversation.")
        with gr.Row():
            temperature = gr.Slider(
                0, 2, value=0, step=0.05, label="temperature", info="0: the likeliest token always."
            )
            top_p = gr.Slider(
                0.05, 1, value=1, step=0.05, label="top-p", info="Share of probability drawn from."
            )
            max_tokens = gr.Number(256, label="max tokens", precision=0, info="Longest answer.")
            seed = gr.Number(
                0, label="seed", precision=0, info="Same seed, same draws, both sides."
            )

    # -- what the inputs do --

    @calm
    def answer(
        request: gr.Request, text: str, who: str, how: str, *drawn: Any
    ) -> Iterator[tuple[Any, ...]]:
        talk = known.get(request.session_hash)
        yield from grow(request, talk, talk, text, who, how, *drawn)

    @calm
    def answer_again(
        request: gr.Request, who: str, how: str, *drawn: Any
    ) -> Iterator[tuple[Any, ...]]:
        talk = known.get(request.session_hash)
        shorter, text = talks.again(talk)
        yield from grow(request, talk, shorter, text, who, how, *drawn)

    def grow(
        request: gr.Request, last: Talk, talk: Talk, text: str, who: str, how: str, *drawn: Any
    ) -> Iterator[tuple[Any, ...]]:
        emptied: Any = ""  # once: what is typed meanwhile stays
        for grown in services.answer(talk, who, how, text, _settings(*drawn)):
            if not known.replace(request.session_hash, last, grown):
                return  # it was ended, or another question was asked
            last = grown
            yield talks.html(grown), emptied, gr.update(visible=bool(grown.duel)), ""
            emptied = gr.skip()

    @calm
    def settle(request: gr.Request) -> Any:
        """After every answer, since one that was stopped could not say so itself."""
        talk = known.get(request.session_hash)
        ended = talks.stopped(talk)
        if ended is talk or not known.replace(request.session_hash, talk, ended):
            return gr.skip()
        return talks.html(ended)

    @calm
    def decide(request: gr.Request, choice: str) -> tuple[Any, ...]:
        decided, told = services.vote(known.get(request.session_hash), choice)
        known.put(request.session_hash, decided)
        return talks.html(decided), gr.update(visible=False), views.subtle(told)

    def voting_for(choice: str) -> Callable[..., Any]:
        def cast(request: gr.Request) -> Any:
            return decide(request, choice)

        return cast

    @calm
    def show_votes(who: str | None) -> str:
        said = services.votes_of(who) if who else ""
        return views.subtle(said) if said else ""

    @calm
    def offer(chosen: str | None) -> Any:
        """Who can answer now; whoever was chosen already stays so."""
        choices = services.voice_choices()
        return (
            gr.update(choices=choices) if chosen else gr.update(choices=choices, value=choices[0])
        )

    @calm
    def forget(request: gr.Request) -> tuple[Any, ...]:
        known.put(request.session_hash, Talk())
        return _WELCOME, gr.update(visible=False), ""

    drawn = [system, temperature, top_p, max_tokens, seed]
    shown = [screen, question, voting, verdict]
    asked = gr.on(
        [send.click, question.submit],
        answer,
        [question, voice, mode, *drawn],
        shown,
        show_progress="hidden",
        concurrency_limit=8,
        concurrency_id="asking",
        api_name="ask",
    )
    repeated = regenerate.click(
        answer_again,
        [voice, mode, *drawn],
        shown,
        show_progress="hidden",
        concurrency_id="asking",
        api_name="ask_again",
    )
    stop.click(None, cancels=[asked, repeated])
    for answering in (asked, repeated):
        answering.then(settle, None, screen, show_progress="hidden", api_visibility="private")
    for button, choice in ((left, "left"), (right, "right"), (tie, "tie"), (both_bad, "both_bad")):
        button.click(
            voting_for(choice),
            None,
            [screen, voting, verdict],
            show_progress="hidden",
            api_name=f"vote_{choice}",
        )
    # Ended first, then forgotten: `cancels` of one listener would end what is asked meanwhile too.
    clear.click(None, cancels=[asked, repeated])
    clear.click(forget, None, [screen, voting, verdict], queue=False, api_name="forget")
    voice.change(show_votes, voice, verdict, show_progress="hidden", api_visibility="private")
    tab.select(offer, voice, voice, show_progress="hidden", api_visibility="private")


def _settings(system: Any, temperature: Any, top_p: Any, max_tokens: Any, seed: Any) -> Settings:
    return Settings(system or "", temperature, top_p, max_tokens, seed)
