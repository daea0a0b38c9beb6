"""The inputs of settings: one for each, filled together, and only those in sight that the chosen
objective has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr
from gradio.components import Component

from app import forms
from app.forms import FormField
from app.notices import calm
from app.tabs.events import on_last
from gapo_lite.config import RunConfig
from gapo_lite.errors import ConfigError

HIDDEN: Literal["hidden"] = "hidden"
"""Out of sight, but still there: it keeps its value, and says when that changes."""

_LINES = {"data.rating_columns": 2}
"""Of a text that cannot have more."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """A form's inputs, and the sections that they are folded away in.

    Attributes:
        by_key: every setting's input.
        sections: what holds the folded settings of a section, by its name.
    """

    by_key: dict[str, Any]
    sections: dict[str, gr.Accordion]

    @property
    def outputs(self) -> list[Any]:
        """What `filled` and `redrawn` are for."""
        return [*self.by_key.values(), *self.sections.values()]

    def filled(self, config: RunConfig) -> list[Any]:
        """The whole form for a configuration."""
        values = forms.values_of(config)
        return self.redrawn(values, values)

    def redrawn(self, chosen: Mapping[str, Any], values: Mapping[str, Any]) -> list[Any]:
        """New values, and which inputs are in sight.

        Args:
            chosen: values of forms.CHOICES.
            values: what is filled in; inputs of other settings keep what they hold.
        """
        there = forms.used(chosen)
        updates = input_updates(chosen, values, list(self.by_key))
        for section in self.sections:
            keys = [field.key for field in forms.folded()[section]]
            updates.append(gr.update(visible=not there.isdisjoint(keys) or HIDDEN))
        return updates


def input_updates(
    chosen: Mapping[str, Any], values: Mapping[str, Any], keys: Sequence[str]
) -> list[Any]:
    """What changes in the inputs of some settings; see `Inputs.redrawn`."""
    there = forms.used(chosen)
    updates = []
    for key in keys:
        changed = {"value": held(key, values[key])} if key in values else {}
        if key in forms.OPTIONAL:
            changed |= {"visible": key in there or HIDDEN} | _hints(key, chosen)
        updates.append(gr.update(**changed) if changed else gr.skip())
    return updates


def held(key: str, value: Any) -> Any:
    """What the input of a setting is given: an empty number is "", because Gradio's makes a 0 of
    None when it comes into sight, which to a share of layers, say, is not the same."""
    is_number = forms.fields()[key].kind in ("number", "integer")
    return "" if value is None and is_number else value


def input_of(
    field: FormField, values: Mapping[str, Any], offered: Sequence[str] | None = None
) -> Component:
    """The component for a setting.

    Args:
        field: which one.
        values: of the whole form at first.
        offered: choices of a text that may be any other, too.
    """
    shared: dict[str, Any] = {
        "label": field.label,
        "info": field.info,
        "value": held(field.key, values[field.key]),
        "min_width": 140,
        "visible": field.key not in forms.OPTIONAL or field.key in forms.used(values) or HIDDEN,
    }
    if offered is not None:
        return gr.Dropdown(list(offered), allow_custom_value=True, **shared)
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), **shared)
    if field.kind == "many":
        return gr.CheckboxGroup(list(field.choices), **shared)
    if field.kind == "flag":
        return gr.Checkbox(**shared)
    if field.kind in ("number", "integer"):
        about = {"step": field.step, "placeholder": "not set", **_hints(field.key, values)}
        return gr.Number(**shared, **about)
    return gr.Textbox(
        **shared,
        lines=_LINES.get(field.key, 3) if field.kind == "lines" else 1,
        max_lines=_LINES.get(field.key, 10) if field.kind == "lines" else 1,
        placeholder="one a line" if field.kind == "lines" else None,
    )


def wire_choices(inputs: Inputs) -> None:
    """What a person chooses as objective, source of the margin or metric fills in and shows what
    belongs to it. Values that a program fills in set off nothing."""
    for key in forms.CHOICES:
        on_last(
            [inputs.by_key[key].input],
            chooser(inputs, key),
            [inputs.by_key[each] for each in forms.CHOICES],
            inputs.outputs,
            show_progress="hidden",
            api_name=f"choose_{key.partition('.')[2]}",
        )


def chooser(inputs: Inputs, key: str) -> Any:
    """The handler of one of forms.CHOICES: their values → Inputs.outputs."""

    @calm
    def choose(objective: Any, source: Any, metric: Any) -> list[Any]:
        values: dict[str, Any] = {}
        if key == "objective.name":
            values = forms.own_values(objective)
            source = values["margin.source"]
        elif key == "margin.source":
            own = forms.own_values(objective, source)
            values = {k: v for k, v in own.items() if k.startswith("margin.") and k != key}
        chosen = dict(zip(forms.CHOICES, (objective, source, metric), strict=True))
        return inputs.redrawn(chosen, values)

    return choose


def _hints(key: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Of a number that an objective has a value of its own for: that one where it is empty, and
    arrows that suit it."""
    own = _own_values(*(chosen.get(each) for each in forms.CHOICES[:2])).get(key)
    if own is None or forms.fields()[key].kind != "number":
        return {}
    step = {"step": own / 20} if key == "objective.beta" else {}  # 0.01 and 10 are both usual
    return {"placeholder": f"{own:g}", **step}


def _own_values(objective: Any, source: Any) -> dict[str, Any]:
    try:
        return forms.own_values(objective, source)
    except ConfigError:  # which is told beside the form
        return {}
