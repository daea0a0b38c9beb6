"""Data: what the pairs are, how far apart their responses are, and which margins follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import forms, pair_views, views
from app.browser import SORTS
from app.notices import calm
from app.services import Services
from app.sessions import Sessions
from app.tabs.downloads import wire_download
from app.tabs.events import on_last
from app.tabs.settings import chooser, input_of, input_updates
from app.tabs.train import TrainTab
from gapo_lite.errors import GapoError

MIRRORED = (
    *("objective.name", "margin.source", "data.rating_columns", "ef.metric", "margin.mapping"),
    "margin.normalization",
    *("margin.gamma", "objective.beta", "margin.ef_floor", "objective.margin_scale"),
)
"""Settings that stand in this tab too: what is changed here changes in the form, and back."""


@dataclass(frozen=True, slots=True)
class DataTab:
    """The parts that are wired once the form is there."""

    source: gr.Dropdown
    split: gr.Textbox
    load: gr.Button
    upload: gr.UploadButton
    facts: gr.HTML
    mirrored: dict[str, Any]
    margins: gr.HTML
    measure: gr.Button
    count: gr.Button
    stop: gr.Button
    save: gr.Button
    figures: gr.HTML
    lengths: gr.HTML
    query: gr.Textbox
    sort: gr.Dropdown
    place: gr.Number
    previous: gr.Button
    following: gr.Button
    pair: gr.HTML


def build(services: Services) -> DataTab:
    """The tab's layout."""
    values = forms.values_of(forms.preset(next(iter(forms.PRESETS))))
    with gr.Row(equal_height=True):
        source = gr.Dropdown(
            services.data.source_choices(),
            value=values["data.source"],
            allow_custom_value=True,
            label="data",
            info="The embedded set, a file of the data folder, or a Hub id (owner/name).",
            scale=5,
            min_width=260,
        )
        split = gr.Textbox(
            values["data.split"],
            label="split",
            info="Of a Hub id.",
            scale=1,
            min_width=110,
            max_lines=1,
        )
        with gr.Column(scale=2, min_width=190):
            load = gr.Button("Load", variant="primary", min_width=90)
            upload = gr.UploadButton(
                "Upload a file",
                file_types=[".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz"],
                min_width=90,
            )
    facts = gr.HTML("", js_on_load=None)
    mirrored: dict[str, Any] = {}
    for keys in (MIRRORED[:6], MIRRORED[6:]):
        with gr.Row():
            for key in keys:
                mirrored[key] = input_of(forms.fields()[key], values)
    margins = gr.HTML("", js_on_load=None)
    figures = gr.HTML("", js_on_load=None)
    lengths = gr.HTML("", js_on_load=None)
    with gr.Row(elem_classes="quiet-row"):
        measure = gr.Button("Measure BERTScore", size="sm", scale=0, min_width=160)
        count = gr.Button("Count tokens", size="sm", scale=0, min_width=160)
        stop = gr.Button("Stop measuring", size="sm", scale=0, min_width=130)
        save = gr.Button("Save margins as CSV", size="sm", scale=0, min_width=160)
    gr.HTML('<h3 class="section">Pairs</h3>', js_on_load=None)
    with gr.Row(elem_classes="low-row"):
        query = gr.Textbox(
            label="search",
            placeholder="in prompts and responses",
            scale=4,
            max_lines=1,
            min_width=200,
        )
        sort = gr.Dropdown(list(SORTS), value="margin down", label="order", scale=2, min_width=130)
        place = gr.Number(1, label="pair", precision=0, minimum=1, scale=1, min_width=90)
        previous = gr.Button("◀ previous", scale=0, min_width=130)
        following = gr.Button("next ▶", scale=0, min_width=130)
    shown = gr.HTML("", js_on_load=None)
    return DataTab(
        source, split, load, upload, facts, mirrored, margins, measure, count, stop, save,
        figures,
        lengths, query, sort, place, previous, following, shown,
    )  # fmt: skip


def connect(
    services: Services, demo: gr.Blocks, tab: gr.Tab, data: DataTab, trained: TrainTab
) -> None:
    """The wiring between this tab and the form, which holds all settings."""
    form = trained.inputs.by_key
    keys, inputs = list(form), list(form.values())
    choices = [form[key] for key in forms.CHOICES]

    def config_of(given: tuple[Any, ...]) -> Any:
        return services.data.data_config(dict(zip(keys, given, strict=True)))

    @calm
    def open_source(name: str, split: str, known: str) -> tuple[Any, ...]:
        opened = services.data.open_data(name, split)
        is_other = opened.source != known  # else its held-out pairs stay as they were chosen
        return (
            gr.update(choices=services.data.source_choices(), value=opened.source),
            opened.source,
            opened.split,
            opened.heldout_source if is_other else gr.skip(),
            opened.heldout_split if is_other else gr.skip(),
        )

    @calm
    def show_used(*chosen: Any) -> list[Any]:
        return input_updates(dict(zip(forms.CHOICES, chosen, strict=True)), {}, MIRRORED)

    @calm
    def keep(file: str) -> str:
        return services.data.keep_upload(file)

    @calm
    def examine(*given: Any) -> Iterator[tuple[Any, ...]]:
        """Counts, then margins and figures as soon as the scores are there, and lengths where they
        are known. What of it cannot be made is said in its place."""
        try:
            config = config_of(given)
            facts = pair_views.facts(services.data.pair_set(config))
        except GapoError as error:
            yield views.warnings([str(error)]), "", "", ""
            return
        try:
            for done, total in services.data.measure_lexical(config):
                yield facts, views.subtle(f"comparing pair {done:,} of {total:,} …"), *_skip(2)
            drawn = _drawn(services, config)
        except GapoError as error:  # too few prompts to hold pairs out, say
            yield facts, views.warnings([str(error)]), "", ""
            return
        yield facts, *drawn, pair_views.lengths(services, config)

    @calm
    def count_few(*given: Any) -> Iterator[Any]:
        """Lengths of a set that is small, without being asked to."""
        try:
            config = config_of(given)
            if services.data.counts_tokens_unasked(config):
                yield from _counting(services, config)
            yield pair_views.lengths(services, config)
        except GapoError:  # said elsewhere already
            yield gr.skip()

    @calm
    def measure(*given: Any) -> Iterator[tuple[Any, ...]]:
        config = config_of(given)
        yield views.subtle("loading the encoder …"), gr.skip()
        for done, total in services.data.measure_bertscore(config):
            yield views.subtle(f"BERTScore: pair {done:,} of {total:,} …"), gr.skip()
        yield _drawn(services, config)

    @calm
    def count(*given: Any) -> Iterator[str]:
        yield from _counting(services, config_of(given))

    places: Sessions[int] = Sessions(lambda: 1)

    def browse(move: int = 0, *, anew: bool = False, typed: bool = False) -> Any:
        """From where the window is, as the server knows it: what the browser sends may be older
        than an answer that is on its way."""

        @calm
        def browsed(
            request: gr.Request, query: str, sort: str, place: Any, *given: Any
        ) -> tuple[Any, ...]:
            number = 1 if anew else places.get(request.session_hash) + move
            if typed and isinstance(place, int | float):
                number = int(place)
            try:
                found = services.data.browse(config_of(given), query, sort, number - 1)
            except GapoError as error:
                return 1, views.warnings([str(error)])
            number = found.index + 1 if found else 1
            places.put(request.session_hash, number)
            return number, pair_views.pair(found, query)

        return browsed

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    seen = [data.facts, data.margins, data.figures, data.lengths]
    browsed = [data.query, data.sort, data.place, *inputs]
    there = [data.place, data.pair]
    settings = [
        data.source, form["data.source"], form["data.split"],
        form["data.heldout_source"], form["data.heldout_split"],
    ]  # fmt: skip

    opening = gr.on(
        [data.load.click, data.source.input],
        open_source, [data.source, data.split, form["data.source"]], settings,
        api_name="open_data", show_progress="full", show_progress_on=data.facts,
    )  # fmt: skip
    uploading = data.upload.upload(keep, data.upload, data.source, api_name="upload").success(
        open_source, [data.source, data.split, form["data.source"]], settings,
        api_visibility="private", show_progress="full", show_progress_on=data.facts,
    )  # fmt: skip
    for key, mirror in (("data.source", data.source), ("data.split", data.split)):
        form[key].change(None, form[key], mirror, js="(value) => value")
    for key, mirror in data.mirrored.items():
        done = mirror.blur if key == "data.rating_columns" else mirror.input  # not at every letter
        copied = done(None, mirror, form[key], js="(value) => value")
        form[key].change(None, form[key], mirror, js="(value) => value")
        if key in forms.CHOICES:
            copied.then(
                chooser(trained.inputs, key), choices, trained.inputs.outputs,
                trigger_mode="always_last", api_visibility="private", **quiet,
            )  # fmt: skip
    on_last(
        [choice.change for choice in choices], show_used, choices, list(data.mirrored.values()),
        api_visibility="private", **quiet,
    )  # fmt: skip
    about = [key for key in keys if key in MIRRORED or key.startswith(("data.", "ef.", "model."))]
    last: dict[str, Any] = {"trigger_mode": "always_last", **quiet}
    examined = [
        demo.load(examine, inputs, seen, api_name="examine", **quiet),
        *(opened.success(examine, inputs, seen, api_visibility="private", **last)
          for opened in (opening, uploading)),
    ]  # fmt: skip
    browsing = [
        done.then(browse(), browsed, there, api_visibility="private", **quiet) for done in examined
    ]
    redrawn = on_last(
        [form[key].change for key in about] + [tab.select],
        examine, inputs, seen, api_name="margins", **quiet,
    )  # fmt: skip
    browsing.append(redrawn.then(browse(), browsed, there, api_visibility="private", **last))
    for done in browsing:  # last and apart: nothing has to wait until it has counted
        done.then(count_few, inputs, data.lengths, api_visibility="private", **last)
    few: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "measuring"}
    measuring = data.measure.click(
        measure, inputs, [data.margins, data.figures], api_name="measure_bertscore", **quiet, **few
    )
    wire_download(
        data.save,
        "margins_csv",
        lambda *given: services.data.margins_csv(dict(zip(keys, given, strict=True))),
        inputs,
    )
    counting = data.count.click(
        count, inputs, data.lengths, api_name="count_tokens", **quiet, **few
    )
    data.stop.click(None, cancels=[measuring, counting]).then(
        examine, inputs, seen, api_visibility="private", **last
    )
    for changed in ("data.source", "data.split", "ef.metric"):  # its result would be of another set
        form[changed].change(None, cancels=[measuring, counting])
    for trigger, browsing_to in (
        (data.previous.click, browse(-1)),
        (data.following.click, browse(1)),
        (data.place.submit, browse(typed=True)),
    ):
        trigger(browsing_to, browsed, there, api_visibility="private", **quiet)
    on_last(
        [data.query.change, data.sort.input],
        browse(anew=True), browsed, there, api_name="browse", **quiet,
    )  # fmt: skip


def _skip(number: int) -> tuple[Any, ...]:
    return (gr.skip(),) * number


def _drawn(services: Services, config: Any) -> tuple[str, str]:
    """What follows from the settings: in words, and as figures."""
    view = services.data.gaps(config)
    return pair_views.margins(view, config), pair_views.figures(view, config)


def _counting(services: Services, config: Any) -> Iterator[str]:
    for done, total in services.data.measure_lengths(config):
        yield views.subtle(f"counting tokens: pair {done:,} of {total:,} …")
    yield pair_views.lengths(services, config)
