"""The form of the Train tab: RunConfig as fields that a person fills in, and back.

Every setting of the configuration is a field, with its own description, so that what the screen
shows, the YAML says and the command does are the same. A field's value is what its input holds:

    number   float, or None where it is empty        choice   one of `choices`
    integer  the same, whole                          flag     True or False
    text     str, "" for none                         many     list of some of `choices`
    names    str, separated by commas                 lines    str, an item a line
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from app.gaps import CONSTANT_MARGINS
from gapo_lite.config import (
    RunConfig,
    differing_settings,
    load_config,
    parse_config,
    setting_keys,
)
from gapo_lite.errors import ConfigError

RECIPES = Path(__file__).parents[1] / "configs"

PRESETS = {
    "Demo: embedded model, CPU or GPU": "demo.yaml",
    "Demo with SimPO (the baseline)": "demo-simpo.yaml",
    "The paper: Llama-3-8B, GaPO with ROUGE-L, 80 GB": "llama3-8b-gapo-rougel.yaml",
    "The paper on 24 GB": "llama3-8b-gapo-rougel-24gb.yaml",
    "SimPO: Llama-3-8B, 80 GB": "llama3-8b-simpo.yaml",
    "SimPO on 24 GB": "llama3-8b-simpo-24gb.yaml",
}
"""What the form can be filled with: words → a recipe under configs/."""

MAIN = (
    "objective.name",
    "ef.metric",
    "margin.mapping",
    "margin.normalization",
    "margin.gamma",
    "objective.beta",
    "model.name",
    "data.source",
    "training.learning_rate",
    "training.epochs",
    "training.batch_size",
    "training.micro_batch_size",
    "lora.rank",
    "training.seed",
)
"""Settings that are always in sight, in this order; all others are folded away."""

_LABELS = {
    "objective.name": "objective",
    "ef.metric": "EF metric",
    "margin.gamma": "γ (gamma)",
    "objective.beta": "β (beta)",
    "model.name": "model",
    "data.source": "data",
    "lora.rank": "LoRA rank",
}
_STEPS = {
    "margin.gamma": 0.05,
    "objective.beta": 0.5,
    "margin.ef_floor": 0.005,
    "training.learning_rate": 1e-6,
    "training.epochs": 0.5,
}


@dataclass(frozen=True, slots=True)
class FormField:
    """One input.

    Attributes:
        key: dotted, as in the YAML.
        kind: see the module's table.
        label: over the input.
        info: the configuration's own explanation.
        choices: of a choice or many.
        step: of a number's arrows.
    """

    key: str
    kind: str
    label: str
    info: str
    choices: tuple[str, ...] = ()
    step: float = 1


@cache
def fields() -> dict[str, FormField]:
    """Every setting's input by its key, in the configuration's order."""
    return {key: _field(key) for key in setting_keys()}


def folded() -> dict[str, list[FormField]]:
    """The settings that are not in MAIN, by section."""
    sections: dict[str, list[FormField]] = {}
    for key, field in fields().items():
        if key not in MAIN:
            sections.setdefault(key.partition(".")[0], []).append(field)
    return sections


def values_of(config: RunConfig) -> dict[str, Any]:
    """What the inputs hold for a configuration, by key."""
    dump = config.model_dump(mode="json")
    return {
        key: _shown(field, dump[section][name])
        for key, field in fields().items()
        for section, _, name in [key.partition(".")]
    }


def config_of(values: Mapping[str, Any]) -> RunConfig:
    """The configuration that a filled form means.

    Raises:
        ConfigError: naming every setting that is unknown, missing or out of range.
    """
    settings: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields():
            raise ConfigError(f"there is no setting {key!r}.")
        section, _, name = key.partition(".")
        settings.setdefault(section, {})[name] = _meant(fields()[key], value)
    return parse_config(settings, source="The form")


def preset(label: str) -> RunConfig:
    """A recipe by its words.

    Raises:
        ConfigError: there is no such recipe.
    """
    if label not in PRESETS:
        raise ConfigError(f"there is no preset of that name. There are: {'; '.join(PRESETS)}.")
    return load_config(RECIPES / PRESETS[label])


def command(config: RunConfig, runs_dir: Path, name: str = "") -> str:
    """The shell command that trains exactly this: the nearest recipe and what differs from it.

    Args:
        config: what the form says.
        runs_dir: folder of all runs.
        name: of the run; "" for the default.
    """
    recipe, differences = min(
        (
            (file, differing_settings(config, load_config(RECIPES / file)))
            for file in PRESETS.values()
        ),
        key=lambda candidate: len(candidate[1]),
    )
    program = Path(sys.executable).parent / "gapo-lite"  # need not be on the PATH
    words = [_portable(program), "train", _portable(RECIPES / recipe)]
    for key, (value, _) in differences.items():
        words += ["--set", f"{key}={_yaml_value(value)}"]
    words += ["--name", name or default_name(config)]
    if runs_dir != Path("runs"):
        words += ["--runs-dir", str(runs_dir)]
    return shlex.join(words)


def default_name(config: RunConfig) -> str:
    """A run's name where a person gives none: objective and metric."""
    name = config.objective.name
    return name if name in CONSTANT_MARGINS else f"{name}-{config.ef.metric.lower()}"


def batch_line(config: RunConfig) -> str:
    """How the effective batch comes about, in words."""
    training = config.training
    accumulation = training.batch_size // training.micro_batch_size
    return (
        f"**{training.batch_size} pairs a step** = {training.micro_batch_size} at once × "
        f"{accumulation} accumulated"
    )


def _field(key: str) -> FormField:
    section, _, name = key.partition(".")
    schema = RunConfig.model_fields[section].annotation
    assert schema is not None
    info = schema.model_fields[name]
    kind, choices = _kind(info.annotation)
    label = _LABELS.get(key, name.replace("_", " "))
    return FormField(key, kind, label, info.description or "", choices, _STEPS.get(key, 1))


def _kind(annotation: Any) -> tuple[str, tuple[str, ...]]:
    """Kind of input and choices for a setting's type."""
    if get_origin(annotation) is Literal:
        return "choice", get_args(annotation)
    if get_origin(annotation) is list:
        (item,) = get_args(annotation)
        return ("many", get_args(item)) if get_origin(item) is Literal else ("lines", ())
    if get_origin(annotation) in (Union, UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return ("names", ()) if len(parts) > 1 else _kind(parts[0])
    return {bool: "flag", int: "integer", float: "number", str: "text"}[annotation], ()


def _shown(field: FormField, value: Any) -> Any:
    if field.kind == "lines":
        return "\n".join(_on_one_line(item) for item in value)
    if field.kind == "names":
        return value if isinstance(value, str) else ", ".join(value)
    return "" if value is None and field.kind == "text" else value


def _meant(field: FormField, value: Any) -> Any:
    if field.kind == "lines":
        return [_on_its_lines(line) for line in str(value or "").split("\n") if line.strip()]
    if field.kind == "names":
        names = [name.strip() for name in str(value or "").split(",") if name.strip()]
        return names[0] if names == ["all-linear"] else names
    if field.kind == "text":
        text = value.strip() if isinstance(value, str) else value
        return text or None
    if field.kind == "integer" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _on_one_line(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _on_its_lines(line: str) -> str:
    """Undoes `_on_one_line`."""
    parts = line.strip().split("\\\\")
    return "\\".join(part.replace("\\n", "\n") for part in parts)


def _yaml_value(value: Any) -> str:
    """A value as one line of YAML, which `--set` reads."""
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)  # is YAML too
    text: str = yaml.safe_dump(value, allow_unicode=True, width=10**9)
    return text.removesuffix("...\n").strip()


def _portable(path: Path) -> str:
    """Relative to the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
