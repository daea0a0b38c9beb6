"""Runs: all of them in a table, several in one figure, and what can be done with one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from app import run_views, views
from app.notices import calm, say
from app.run_table import RUN_COLUMNS
from app.services import Services
from app.tabs.downloads import download_button
from app.tabs.events import hide_at, on_last
from app.tabs.train import AXES, TrainTab
from gapo_lite.errors import RunError

_REFRESH_S = 3


def build(services: Services, tab: gr.Tab, tabs: gr.Tabs, trained: TrainTab) -> None:
    """The tab's layout and wiring.

    Args:
        services: what the tab may call.
        tab: this one.
        tabs: all of them, to change to Train.
        trained: the form that a run is copied to, and the view that it is watched in.
    """
    rows = gr.Dataframe(
        services.run_rows(),
        headers=list(RUN_COLUMNS),
        interactive=False,
        show_label=False,
        wrap=False,
        max_height=380,
    )
    gr.HTML(
        views.subtle(
            "Accuracy, reward margin and chosen drift (change of the chosen answers' average "
            "log-probability since step 0, nats per token) are of held-out pairs. A click on a row "
            "chooses it."
        ),
        js_on_load=None,
    )
    with gr.Row(elem_classes="low-row"):
        chosen = gr.Dropdown(
            services.run_names(), label="chosen run", value=None, scale=2, min_width=200
        )
        watch = gr.Button("Watch", min_width=90)
        resume = gr.Button("Resume", min_width=90)
        copy = gr.Button("Copy to a new form", min_width=90)
        download_button("Download adapter", "adapter", services.adapter_archive, [chosen])
        merge = gr.Button("Export merged", size="sm", min_width=110)
        to_ollama = gr.Button("Export for Ollama", size="sm", min_width=110)
        evaluate = gr.Button("Compare with base", size="sm", min_width=110)
    with gr.Row(elem_classes="low-row"):
        new_name = gr.Textbox(label="new name", max_lines=1, scale=2, min_width=200)
        rename = gr.Button("Rename", min_width=90)
        delete = gr.Button("Delete", min_width=90)
    with gr.Group(visible=False) as asking:
        question = gr.Markdown()
        with gr.Row():
            really = gr.Button("Delete it", variant="stop")
            never_mind = gr.Button("Keep it")
    told = gr.HTML("", js_on_load=None)
    compared = gr.HTML("", js_on_load=None)
    with gr.Row():
        overlaid = gr.Dropdown(
            services.run_names(),
            label="overlay",
            info="Runs to draw into the same figures, ten at most.",
            multiselect=True,
            value=[],
            scale=3,
            min_width=220,
        )
        smoothing = gr.Slider(0, 0.99, value=0.6, step=0.01, label="smoothing", min_width=130)
        axis = gr.Radio(list(AXES), value="step", label="axis", min_width=130)
    drawn = gr.HTML("", js_on_load=None)
    with gr.Accordion("Difference of two configurations", open=False):
        with gr.Row():
            one = gr.Dropdown(services.run_names(), label="one run", value=None)
            other = gr.Dropdown(services.run_names(), label="another", value=None)
        difference = gr.HTML("", js_on_load=None)
    clock = gr.Timer(_REFRESH_S, active=False)
    seen = gr.Textbox("", visible=False)  # digests of the rows and of the names in sight
    asked = gr.Textbox("", visible=False)  # what the question is about

    # -- what the inputs do --

    lists = [chosen, overlaid, one, other]
    shown = [rows, seen, *lists]
    quiet: dict[str, Any] = {"show_progress": "hidden"}

    @calm
    def refresh(known: str, picked: list[str] | None) -> tuple[Any, ...]:
        found = services.run_rows()
        names = [row[0] for row in found]
        now = f"{_digest(found)} {_digest(names)}"
        if now == known:
            return (gr.skip(),) * len(shown)
        if (known or "").endswith(now.split()[1]):  # a list that somebody has open is left alone
            return found, now, *(gr.skip(),) * len(lists)
        choices = gr.update(choices=names)
        kept = [name for name in picked or [] if name in names]
        over = choices if kept == (picked or []) else gr.update(choices=names, value=kept)
        return found, now, choices, over, choices, choices

    @calm
    def choose(event: gr.SelectData) -> Any:
        row = event.row_value  # may be anything
        names = services.run_names()
        if not isinstance(row, list) or not row or row[0] not in names:
            raise RunError("that run is not there any more.")
        return gr.update(choices=names, value=row[0])

    @calm
    def show_live(name: str | None) -> tuple[Any, ...]:
        services.run(name or "")
        return gr.update(selected="train"), gr.update(choices=services.run_names(), value=name)

    @calm
    def resume_it(name: str) -> None:
        services.resume(name)
        say(f"{name} goes on.")

    @calm
    def copy_it(name: str) -> list[Any]:
        filled = trained.inputs.filled(services.run(name).config())
        say(f"The settings of {name} are in the form now.")
        return [gr.update(selected="train"), *filled]

    @calm
    def rename_it(name: str, new: str) -> tuple[Any, ...]:
        services.rename(name, new)
        say(f"{name} is now {new.strip()}.")
        return gr.update(choices=services.run_names(), value=new.strip()), "", ""

    @calm
    def ask(name: str) -> tuple[Any, ...]:
        return gr.update(visible=True), services.lost_by_deleting(name), name

    @calm
    def delete_it(name: str) -> tuple[Any, ...]:
        services.delete(name)
        say(f"{name} was deleted.")
        return gr.update(visible=False), gr.update(choices=services.run_names(), value=None), ""

    @calm
    def merge_it(name: str) -> Iterator[str]:
        yield views.subtle("merging; for a large model that takes minutes …")
        folder = services.export_merged(name)
        yield views.subtle(f"The merged model is in {folder} on the server, with a model card.")

    @calm
    def ollama_it(name: str) -> Iterator[str]:
        yield views.subtle("merging for Ollama; for a large model that takes minutes …")
        folder = services.export_merged(name, ollama=True)
        yield views.subtle(
            f"The merged model is in {folder} on the server, with a Modelfile: ollama create "
            f"{name.lower()} -f {folder}/Modelfile"
        )

    @calm
    def evaluate_it(name: str) -> Iterator[str]:
        yield views.subtle(
            f"{name}: base and tuned model score the held-out pairs; on a CPU that takes a while …"
        )
        yield run_views.comparison(services.evaluate(name))

    @calm
    def show_comparison(name: str | None) -> str:
        found = services.known_comparison(name) if name else {}
        return run_views.comparison(found) if found else ""

    @calm
    def draw(names: list[str], strength: float, over: Any) -> str:
        figures = services.overlay(names or [], over, strength)
        return f'<div class="chart-grid">{figures}</div>' if figures else ""

    @calm
    def compare(first: str | None, second: str | None) -> str:
        if not first or not second:
            return ""
        found = services.difference(first, second)
        if not found:
            return views.subtle("Their settings are the same.")
        return views.table(("setting", first, second), found)

    gr.on(
        [tab.select, clock.tick],
        refresh,
        [seen, overlaid],
        shown,
        api_visibility="private",
        **quiet,
    )
    tabs.change(lambda: gr.Timer(active=False), None, clock, api_visibility="private", **quiet)
    tab.select(lambda: gr.Timer(active=True), None, clock, api_visibility="private", **quiet)
    rows.select(choose, None, chosen, api_visibility="private", **quiet)
    watch.click(
        show_live,
        chosen,
        [tabs, trained.watched],
        api_visibility="private",
        **quiet,
    )
    resume.click(resume_it, chosen, None, api_name="resume_run", **quiet)
    copy.click(copy_it, chosen, [tabs, *trained.inputs.outputs], api_name="copy", **quiet)
    rename.click(
        rename_it, [chosen, new_name], [chosen, new_name, seen], api_name="rename", **quiet
    )
    delete.click(ask, chosen, [asking, question, asked], api_name="ask_delete", **quiet)
    really.click(delete_it, asked, [asking, chosen, seen], api_name="delete", **quiet)
    hide_at([chosen.change, never_mind.click], asking)
    on_last([chosen.change], show_comparison, chosen, compared, api_name="comparison", **quiet)
    heavy: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "heavy"}
    evaluate.click(evaluate_it, chosen, compared, api_name="evaluate", **quiet, **heavy)
    merge.click(merge_it, chosen, told, api_name="export_merged", **quiet, **heavy)
    to_ollama.click(ollama_it, chosen, told, api_name="export_for_ollama", **quiet, **heavy)
    on_last(
        [overlaid.change, smoothing.change, axis.input],
        draw,
        [overlaid, smoothing, axis],
        drawn,
        api_name="overlay",
        **quiet,
    )
    on_last(
        [one.input, other.input],
        compare,
        [one, other],
        difference,
        api_name="difference",
        **quiet,
    )


def _digest(value: Any) -> str:
    """Tells two states of a table apart."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
