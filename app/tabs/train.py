"""Train: the form on the left, the run as it goes on the right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import forms, formulas, live, views
from app.downloads import text_file
from app.live import View
from app.notices import calm, say
from app.services import Services
from app.tabs import fit
from app.tabs.downloads import download_button
from app.tabs.events import hide_at, on_last
from app.tabs.settings import Inputs, input_of, wire_choices
from gapo_lite.config import RunConfig
from gapo_lite.errors import ConfigError

SECTIONS = {
    "model": "Model: quantisation, precision, backend",
    "lora": "LoRA: scale, dropout, layers",
    "data": "Data: splits, lengths",
    "ef": "Evaluation factor: stemmer, tokenizer, BERTScore's encoder",
    "margin": "Margin: floor",
    "objective": "Objective: scale of the margin, reference",
    "training": "Training: schedule, memory, evaluation, prompts",
}
AXES = ("step", "epoch")
_AGAINST = (
    "Trains both with these settings on three seeds, SimPO's constant margin being the mean of "
    "GaPO's, and compares them in the Sweeps tab."
)


@dataclass(frozen=True, slots=True)
class TrainTab:
    """What other tabs need of this one: its inputs, the run that it shows, and the button that
    starts a sweep with its settings."""

    inputs: Inputs
    watched: gr.Dropdown
    preset: gr.Dropdown
    against_simpo: gr.Button


def build(services: Services, tab: gr.Tab, tabs: gr.Tabs, header: gr.Button) -> TrainTab:
    """The tab's layout and wiring.

    Args:
        services: what the tab may call.
        tab: this one.
        tabs: all of them: who starts from another tab is brought to this one.
        header: a second Start button, in sight of every tab.
    """
    with gr.Row():
        with gr.Column(scale=4, min_width=330):
            form = _Form(services)
        with gr.Column(scale=7, min_width=330):
            monitor = _Monitor(services)
    _wire_form(services, form, monitor, tab, tabs, header)
    _wire_monitor(services, monitor, tab)
    return TrainTab(form.inputs, monitor.watched, form.preset, form.against_simpo)


class _Form:
    """The inputs on the left."""

    def __init__(self, services: Services):
        first = next(iter(forms.PRESETS))
        config = forms.preset(first)
        values = forms.values_of(config)
        inputs: dict[str, Any] = {}
        sections: dict[str, gr.Accordion] = {}
        self.inputs = Inputs(inputs, sections)

        def place(key: str) -> None:
            field = forms.fields()[key]
            inputs[key] = input_of(field, values, _offered(services, key))

        self.preset = gr.Dropdown(
            list(forms.PRESETS),
            value=first,
            label="start from",
            info="Fills the form with a recipe. Everything can be changed afterwards.",
        )
        place("objective.name")
        self.formula = gr.HTML(formulas.html(config.objective.name), js_on_load=None)
        with gr.Row(elem_classes="loss-row"):
            for key in forms.LOSS:
                place(key)
        self.margin = gr.Markdown(services.data.margin_line(config), elem_classes="remark")
        for pair in zip(forms.RUN[::2], forms.RUN[1::2], strict=True):
            with gr.Row():
                for key in pair:
                    place(key)
            if pair[0] == "training.batch_size":
                self.batch = gr.Markdown(forms.batch_line(config), elem_classes="remark")
        with gr.Accordion("All other settings", open=False):
            for section, fields in forms.folded().items():
                with gr.Accordion(SECTIONS[section], open=False) as sections[section]:
                    for field in fields:
                        place(field.key)
        self.name = gr.Textbox(
            label="name of the run",
            placeholder=forms.default_name(config),
            max_lines=1,
            info="Empty: named after objective and margin.",
        )
        self.start = gr.Button("Start training", variant="primary", size="lg", render=False)
        self.fit = fit.Fit(self.start)
        self.against_simpo = gr.Button("GaPO against SimPO")
        gr.HTML(views.subtle(_AGAINST), js_on_load=None)
        self.problem = gr.HTML("", js_on_load=None)
        with gr.Accordion("YAML and command", open=False):
            self.yaml = gr.Code(
                config.to_yaml(),
                language="yaml",
                label="this form as YAML",
                interactive=False,
                max_lines=24,
            )
            self.command = gr.Code(
                forms.command(config, services.runs_dir),
                language="shell",
                label="the command that does the same",
                interactive=False,
                max_lines=14,
                wrap_lines=True,
            )
            with gr.Row():
                self.load = gr.UploadButton("Load a YAML", file_types=[".yaml", ".yml"], size="sm")
                download_button("Save this YAML", "save_yaml", self._saved, list(inputs.values()))

    def _saved(self, *given: Any) -> str:
        config = forms.config_of(dict(zip(self.inputs.by_key, given, strict=True)))
        return text_file(f"{forms.default_name(config)}.yaml", config.to_yaml())


class _Monitor:
    """The run on the right."""

    def __init__(self, services: Services):
        with gr.Row():
            self.watched = gr.Dropdown(
                services.run_names(), label="run", scale=3, min_width=160, value=None
            )
            self.smoothing = gr.Slider(
                0, 0.99, value=0.0, step=0.01, label="smoothing", scale=2, min_width=130
            )
            self.axis = gr.Radio(list(AXES), value="step", label="axis", scale=1, min_width=190)
        with gr.Row():
            running, resumable = ["when-running"], ["when-resumable"]
            self.stop = gr.Button("Stop (saves)", elem_classes=running, min_width=110)
            self.kill = gr.Button("Stop now, without saving", elem_classes=running, min_width=110)
            self.resume = gr.Button("Resume", elem_classes=resumable, min_width=110)
        self.asked = gr.Textbox("", visible=False)  # what the question is about
        with gr.Group(visible=False) as self.asking:
            self.loss = gr.Markdown()
            with gr.Row():
                self.really = gr.Button("Stop now and lose that", variant="stop")
                self.never_mind = gr.Button("Let it go on")
        self.live = gr.HTML("", js_on_load=None)
        with gr.Row():
            pictures = gr.Button("Save all figures as PNG", size="sm", min_width=110)
            pictures.click(
                None,
                js="() => gapoCharts.saveAll(document.querySelector('.live [data-part=figures]'))",
            )
            download_button("Save the numbers as CSV", "csv", services.history_csv, [self.watched])


def _offered(services: Services, key: str) -> list[str] | None:
    """What is proposed for a setting that can be any text."""
    if key == "model.name":
        return services.data.model_choices()
    return services.data.source_choices() if key == "data.source" else None


# -- what the form does --


def _wire_form(
    services: Services,
    form: _Form,
    monitor: _Monitor,
    tab: gr.Tab,
    tabs: gr.Tabs,
    header: gr.Button,
) -> None:
    keys, inputs = list(form.inputs.by_key), list(form.inputs.by_key.values())
    summary = [
        form.formula, form.margin, form.batch, form.yaml, form.command, form.problem, form.name,
    ]  # fmt: skip

    def values(given: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(keys, given, strict=True))

    @calm
    def summarise(name: Any, *given: Any) -> tuple[Any, ...]:
        formula = formulas.html(values(given)["objective.name"])
        try:
            return formula, *_summary(services, forms.config_of(values(given)), name)
        except ConfigError as error:
            nothing = (gr.skip(),) * 4
            return (formula, *nothing, views.warnings([str(error)]), gr.skip())

    @calm
    def fill_from_preset(label: str) -> list[Any]:
        return form.inputs.filled(forms.preset(label))

    @calm
    def fill_from_yaml(file: str) -> list[Any]:
        return form.inputs.filled(services.data.places.check_config(services.load_yaml(file)))

    @calm
    def start(name: Any, smoothing: float, axis: Any, *given: Any) -> tuple[Any, ...]:
        run = services.start(values(given), name)
        say(f"Started {run}.")
        return (run, gr.update(selected="train"), *_watch(services, run, smoothing, axis))

    on_last(
        [component.change for component in inputs] + [form.name.change, tab.select],
        summarise,
        [form.name, *inputs],
        summary,
        show_progress="hidden",
        api_name="summarise",
    )
    filled = form.inputs.outputs
    form.preset.input(
        fill_from_preset, form.preset, filled, show_progress="hidden", api_name="preset"
    )
    form.load.upload(fill_from_yaml, form.load, filled, api_name="load_yaml")
    wire_choices(form.inputs)
    fit.wire(services, form.fit, form.inputs)
    gr.on(
        [form.start.click, header.click],
        start,
        [form.name, monitor.smoothing, monitor.axis, *inputs],
        [form.name, tabs, monitor.watched, monitor.live],
        show_progress="minimal",
        api_name="start",
    ).success(
        lambda: "",
        None,
        form.name,
        js="() => setTimeout(() => document.querySelector('.live')?.scrollIntoView("
        "{behavior: 'smooth', block: 'center'}), 300)",
        show_progress="hidden",
        api_visibility="private",
    )


def _summary(services: Services, config: RunConfig, name: Any) -> tuple[Any, ...]:
    """What stands under and beside the form for usable settings."""
    config = services.data.places.check_config(config)  # with paths as a shell would take them
    name = name.strip() if isinstance(name, str) else ""
    command = forms.command(config, services.runs_dir, name)
    return (
        services.data.margin_line(config),
        forms.batch_line(config),
        config.to_yaml(),
        command,
        "",
        gr.update(placeholder=forms.default_name(config)),
    )


# -- what the monitor does --


def _watch(services: Services, run: str, smoothing: float, axis: Any) -> tuple[Any, ...]:
    """The list of runs with one chosen, and its live view."""
    view = View(run or "", smoothing, axis).checked()
    return gr.update(choices=services.run_names(), value=run or None), live.live_html(
        services, view
    )


def _wire_monitor(services: Services, monitor: _Monitor, tab: gr.Tab) -> None:
    view = [monitor.watched, monitor.smoothing, monitor.axis]

    @calm
    def show(run: str | None, smoothing: float, axis: Any) -> tuple[Any, ...]:
        runs, shown = _watch(services, run or services.watched(), smoothing, axis)
        # A run that was chosen is not chosen again: the person may have gone on to another one.
        return gr.update(choices=services.run_names()) if run else runs, shown

    @calm
    def stop(run: str) -> None:
        say(services.stop(run))

    @calm
    def resume(run: str, smoothing: float, axis: Any) -> tuple[Any, ...]:
        services.resume(run)
        say(f"{run} goes on.")
        return _watch(services, run, smoothing, axis)

    @calm
    def ask(run: str) -> tuple[Any, ...]:
        return gr.update(visible=True), services.lost_by_killing(run), run

    @calm
    def kill(run: str) -> Any:
        services.kill(run)
        say(f"{run} was stopped without saving.")
        return gr.update(visible=False)

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    on_last(  # else a choice made while another is drawn would be lost
        [monitor.watched.input, monitor.smoothing.change, monitor.axis.input, tab.select],
        show,
        view,
        [monitor.watched, monitor.live],
        api_name="watch",
        **quiet,
    )
    monitor.stop.click(stop, monitor.watched, None, api_name="stop", **quiet)
    monitor.kill.click(
        ask,
        monitor.watched,
        [monitor.asking, monitor.loss, monitor.asked],
        api_name="ask_kill",
        **quiet,
    )
    monitor.really.click(kill, monitor.asked, monitor.asking, api_name="kill", **quiet)
    hide_at([monitor.watched.change, monitor.never_mind.click], monitor.asking)
    monitor.resume.click(resume, view, [monitor.watched, monitor.live], api_name="resume", **quiet)
