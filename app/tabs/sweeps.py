"""Sweeps: a grid on the left, the sweep as it goes on on the right."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app import forms, sweep_forms, sweep_views, views
from app.notices import calm, say
from app.services import Services
from app.sweep_forms import OWN_GRID, ROWS, TRAIN_FORM, Filled
from app.sweep_live import sweep_html
from app.tabs.downloads import download_button
from app.tabs.events import hide_at, on_last
from app.tabs.train import TrainTab
from gapo_lite.errors import GapoError

_CLICKED = "() => [window.gapoChosen]"
_EMPTY: Any = ""
"""Of a number: see settings.held."""
_NO_SETTING = ("–", "")
_QUIET: dict[str, Any] = {"show_progress": "hidden"}


def build(services: Services, tab: gr.Tab, tabs: gr.Tabs, trained: TrainTab) -> None:
    """The tab's layout and wiring.

    Args:
        services: what the tab may call.
        tab: this one.
        tabs: all of them, to change to Train.
        trained: the form that a sweep can start from, and the view that a run is watched in.
    """
    with gr.Row():
        with gr.Column(scale=4, min_width=330):
            form = _Form()
        with gr.Column(scale=7, min_width=330):
            monitor = _Monitor(services)
    _wire_form(services, form, monitor, tab, tabs, trained)
    _wire_monitor(services, monitor, tab, tabs, trained)


class _Form:
    """The inputs on the left."""

    def __init__(self) -> None:
        first = sweep_forms.filled_from(OWN_GRID)
        self.start_from = gr.Dropdown(
            sweep_forms.starts(),
            value=OWN_GRID,
            label="what to compare",
            info="A grid, GaPO against SimPO, or a sweep of configs/sweeps.",
        )
        self.base = gr.Dropdown(
            [TRAIN_FORM, *forms.PRESETS],
            value=first.base,
            label="all other settings from",
            info="What is not varied below.",
        )
        self.keys, self.texts = [], []
        for number in range(1, ROWS + 1):
            with gr.Row():
                self.keys.append(
                    gr.Dropdown(
                        [_NO_SETTING, *((key, key) for key in sweep_forms.KEYS)],
                        value="",
                        label=f"setting {number}",
                        min_width=140,
                    )
                )
                self.texts.append(
                    gr.Textbox(
                        "",
                        label=f"values {number}",
                        placeholder="0.1, 0.3, 1" if number > 1 else "rouge1, rougeL",
                        max_lines=1,
                        min_width=140,
                    )
                )
        self.seeds = gr.Textbox(first.seeds, label="seeds", max_lines=1)
        with gr.Row():
            self.hours = gr.Number(_EMPTY, label="hours at most", placeholder="no limit")
            self.max_runs = gr.Number(_EMPTY, label="runs at most", placeholder="no limit")
        with gr.Row():
            self.halving = gr.Checkbox(
                False,
                label="stop losers early",
                info="The baseline and half of the others go on to twice the steps.",
            )
            self.first_steps = gr.Number(first.first_steps, label="steps of the first round")
        with gr.Row():
            self.prompts = gr.Number(first.prompts, label="prompts answered after a run")
            self.max_tokens = gr.Number(first.max_tokens, label="longest such answer, tokens")
        self.name = gr.Textbox("", label="name of the sweep", placeholder="grid", max_lines=1)
        self.plan = gr.HTML("", js_on_load=None)
        self.start = gr.Button("Start the sweep", variant="primary", size="lg")

    @property
    def filled(self) -> list[Any]:
        """What choosing a start fills in."""
        return [
            *(self.base, *self.keys, *self.texts, self.seeds, self.hours, self.max_runs),
            *(self.halving, self.first_steps, self.prompts, self.max_tokens),
        ]


class _Monitor:
    """The sweep on the right."""

    def __init__(self, services: Services):
        with gr.Row(elem_classes="low-row"):
            self.chosen = gr.Dropdown(
                services.sweeps.names(), label="sweep", value=None, scale=3, min_width=200
            )
            self.stop = gr.Button("Stop (saves)", elem_classes=["when-sweeping"], min_width=100)
            self.resume = gr.Button("Resume", elem_classes=["when-unfinished"], min_width=100)
            self.delete = gr.Button("Delete", elem_classes=["when-at-rest"], min_width=90)
        with gr.Group(visible=False) as self.asking:
            self.question = gr.Markdown()
            with gr.Row():
                self.really = gr.Button("Delete all of it", variant="stop")
                self.never_mind = gr.Button("Keep it")
        self.live = gr.HTML("", js_on_load=None)
        with gr.Row():
            download_button(
                "Save the report as HTML",
                "sweep_report_html",
                services.sweeps.report_html,
                [self.chosen],
            )
            download_button(
                "Save it as Markdown",
                "sweep_report_markdown",
                services.sweeps.report_markdown,
                [self.chosen],
            )
        self.asked = gr.Textbox("", visible=False)  # what the question is about
        # Pressed by clicks in the live view: see page.js.
        self.clicked = gr.Textbox("", visible=False)
        self.choose = gr.Button("", elem_id="sweep-choice", visible="hidden")
        self.open_run = gr.Button("", elem_id="sweep-run", visible="hidden")

    @property
    def shown(self) -> list[Any]:
        """What `_show` is for."""
        return [self.chosen, self.live]


def _show(services: Services, name: str) -> tuple[Any, ...]:
    """The list of sweeps with one chosen, and its live view."""
    drawn = sweep_html(services, name)
    return gr.update(choices=services.sweeps.names(), value=name or None), drawn


def _read(given: tuple[Any, ...]) -> tuple[Filled, dict[str, Any]]:
    """The sweep's inputs, and the Train tab's after them."""
    start, base, *rest = given
    keys, texts = rest[:ROWS], rest[ROWS : 2 * ROWS]
    seeds, hours, max_runs, halving, first_steps, prompts, max_tokens, *trained = rest[2 * ROWS :]
    filled = Filled(
        start=start,
        base=base,
        rows=tuple((key or "", str(text or "")) for key, text in zip(keys, texts, strict=True)),
        seeds=str(seeds or ""),
        hours=None if hours == _EMPTY else hours,
        max_runs=None if max_runs == _EMPTY else max_runs,
        halving=bool(halving),
        first_steps=first_steps,
        prompts=prompts,
        max_tokens=max_tokens,
    )
    return filled, dict(zip(forms.fields(), trained, strict=True))


def _wire_form(
    services: Services,
    form: _Form,
    monitor: _Monitor,
    tab: gr.Tab,
    tabs: gr.Tabs,
    trained: TrainTab,
) -> None:
    train_form = [trained.inputs.by_key[key] for key in forms.fields()]
    inputs = [form.start_from, *form.filled, *train_form]

    @calm
    def fill(start: Any) -> list[Any]:
        found = sweep_forms.filled_from(start)
        keys, texts = zip(*found.rows, strict=True)
        return [
            *(found.base, *keys, *texts, found.seeds),
            *(_EMPTY if limit is None else limit for limit in (found.hours, found.max_runs)),
            *(found.halving, found.first_steps, found.prompts, found.max_tokens),
        ]

    @calm
    def plan(*given: Any) -> tuple[Any, ...]:
        try:
            found = services.sweeps.plan(*_read(given))
        except GapoError as error:
            return views.warnings([str(error)]), gr.skip()
        return sweep_views.plan(found), gr.update(placeholder=found.name)

    @calm
    def start(name: Any, *given: Any) -> tuple[Any, ...]:
        sweep = services.sweeps.start(*_read(given), name)
        services.give_way()
        say(f"Started {sweep}.")
        return "", *_show(services, sweep)

    @calm
    def against_simpo(*given: Any) -> tuple[Any, ...]:
        sweep = services.sweeps.against_simpo(dict(zip(forms.fields(), given, strict=True)))
        services.give_way()
        say(f"Started {sweep}.")
        return gr.update(selected="sweeps"), *_show(services, sweep)

    form.start_from.input(fill, form.start_from, form.filled, api_name="fill_sweep", **_QUIET)
    on_last(
        [component.change for component in (form.start_from, *form.filled)] + [tab.select],
        plan,
        inputs,
        [form.plan, form.name],
        api_name="plan_sweep",
        **_QUIET,
    )
    form.start.click(
        start,
        [form.name, *inputs],
        [form.name, *monitor.shown],
        show_progress="minimal",
        api_name="start_sweep",
    ).success(
        None,
        js="() => setTimeout(() => document.querySelector('.live.sweep')?.scrollIntoView("
        "{behavior: 'smooth', block: 'center'}), 300)",
    )
    trained.against_simpo.click(
        against_simpo,
        train_form,
        [tabs, *monitor.shown],
        show_progress="minimal",
        api_name="against_simpo",
    )


def _wire_monitor(
    services: Services, monitor: _Monitor, tab: gr.Tab, tabs: gr.Tabs, trained: TrainTab
) -> None:
    @calm
    def show(name: str | None) -> tuple[Any, ...]:
        names = services.sweeps.names()
        return _show(services, name if name in names else services.sweeps.watched())

    @calm
    def choose(name: str) -> tuple[Any, ...]:
        return _show(services, name)

    @calm
    def open_run(name: str) -> tuple[Any, ...]:
        services.run(name)
        return gr.update(selected="train"), gr.update(choices=services.run_names(), value=name)

    @calm
    def stop(name: str) -> None:
        services.sweeps.stop(name)
        say(f"{name} saves its run and ends.")

    @calm
    def resume(name: str) -> tuple[Any, ...]:
        services.sweeps.resume(name)
        services.give_way()
        say(f"{name} goes on.")
        return _show(services, name)

    @calm
    def ask(name: str) -> tuple[Any, ...]:
        return gr.update(visible=True), services.sweeps.lost_by_deleting(name), name

    @calm
    def delete(name: str) -> tuple[Any, ...]:
        services.sweeps.delete(name)
        say(f"{name} was deleted.")
        return gr.update(visible=False), *_show(services, services.sweeps.watched())

    asking = [monitor.asking, monitor.question, monitor.asked]
    on_last(
        [tab.select, monitor.chosen.input],
        show,
        monitor.chosen,
        monitor.shown,
        api_name="watch_sweep",
        **_QUIET,
    )
    monitor.choose.click(
        choose, monitor.clicked, monitor.shown, js=_CLICKED, api_name="choose_sweep", **_QUIET
    )
    monitor.open_run.click(
        open_run,
        monitor.clicked,
        [tabs, trained.watched],
        js=_CLICKED,
        api_name="open_sweep_run",
        **_QUIET,
    )
    monitor.stop.click(stop, monitor.chosen, None, api_name="stop_sweep", **_QUIET)
    monitor.resume.click(resume, monitor.chosen, monitor.shown, api_name="resume_sweep", **_QUIET)
    monitor.delete.click(ask, monitor.chosen, asking, api_name="ask_delete_sweep", **_QUIET)
    monitor.really.click(
        delete, monitor.asked, [monitor.asking, *monitor.shown], api_name="delete_sweep", **_QUIET
    )
    hide_at([monitor.chosen.change, monitor.never_mind.click], monitor.asking)
