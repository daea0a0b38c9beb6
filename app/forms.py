"""The form of the Train tab: RunConfig as fields that a person fills in, and back.

Every setting of the configuration is a field, with its own description, so that what the screen
shows, the YAML says and the command does are the same. A field's value is what its input holds:

    number   float; None or "" where it is empty      choice   one of `choices`
    integer  the same, whole                          flag     True or False
    text     str, "" for none                         many     list of some of `choices`
    names    str, separated by commas                 lines    str, an item a line

Which settings there are depends on the objective, on where its margin comes from and on the metric
(CHOICES): the others' inputs are out of sight, and what they hold does not count.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from gapo_lite.config import (
    RunConfig,
    differing_settings,
    load_config,
    parse_config,
    setting_keys,
    used_settings,
)
from gapo_lite.ef import EVALUATION_FACTORS
from gapo_lite.errors import ConfigError
from gapo_lite.objectives import OBJECTIVES

RECIPES = Path(__file__).parents[1] / "configs"

PRESETS = {
    "Demo: embedded model, CPU or GPU": "demo.yaml",
    "Demo with SimPO (the baseline)": "demo-simpo.yaml",
    "The paper: Llama-3-8B, GaPO with ROUGE-L": "llama3-8b-gapo-rougel.yaml",
    "SimPO: Llama-3-8B": "llama3-8b-simpo.yaml",
    "GaPO with ratings: Llama-3-8B": "llama3-8b-gapo-rating.yaml",
    "DPO: Llama-3-8B": "llama3-8b-dpo.yaml",
    "IPO: Llama-3-8B": "llama3-8b-ipo.yaml",
    "KTO: Llama-3-8B": "llama3-8b-kto.yaml",
    "CPO: Llama-3-8B": "llama3-8b-cpo.yaml",
    "ORPO: Llama-3-8B": "llama3-8b-orpo.yaml",
    "R-DPO: Llama-3-8B": "llama3-8b-rdpo.yaml",
    "SLiC: Llama-3-8B": "llama3-8b-slic.yaml",
    "RRHF: Llama-3-8B": "llama3-8b-rrhf.yaml",
    "DPOP: Llama-3-8B": "llama3-8b-dpop.yaml",
    "β-DPO: Llama-3-8B": "llama3-8b-beta-dpo.yaml",
    "WPO: Llama-3-8B": "llama3-8b-wpo.yaml",
    "RSO: Llama-3-8B": "llama3-8b-rso.yaml",
}
"""What the form can be filled with: words → a recipe under configs/."""

CHOICES = ("objective.name", "margin.source", "ef.metric")
"""Settings that decide which others there are."""

LOSS = (
    *(
        "margin.source",
        "data.rating_columns",
        "ef.metric",
        "margin.mapping",
        "margin.normalization",
        "margin.gamma",
    ),
    "objective.beta",
    *("objective.nll_weight", "objective.odds_weight", "objective.length_weight"),
    *("objective.delta", "objective.fall_weight"),
    *("objective.desirable_weight", "objective.undesirable_weight"),
    *("objective.beta_gain", "objective.gap_momentum"),
)
"""Settings of the loss, of which an objective has some; in sight where it has them."""

RUN = (
    *("model.name", "data.source", "training.learning_rate", "training.epochs"),
    *("training.batch_size", "training.micro_batch_size", "lora.rank", "training.seed"),
)
"""Settings that every run has and that are always in sight, two a row."""

MAIN = ("objective.name", *LOSS, *RUN)
"""Settings that are not folded away, in this order."""

OPTIONAL = tuple(
    key
    for key in setting_keys()
    if (key.startswith(("objective.", "margin.", "ef.")) and key != "objective.name")
    or key == "data.rating_columns"
)
"""Settings that are out of sight where they have no effect."""

_LABELS = {
    "objective.name": "objective",
    "ef.metric": "EF metric",
    "margin.source": "margin from",
    "margin.gamma": "γ (gamma)",
    "objective.beta": "β (beta)",
    "objective.nll_weight": "λ (NLL weight)",
    "objective.odds_weight": "λ (odds weight)",
    "objective.length_weight": "α (length weight)",
    "objective.delta": "δ (delta)",
    "objective.fall_weight": "λ (fall weight)",
    "objective.desirable_weight": "λ_w (desirable weight)",
    "objective.undesirable_weight": "λ_l (undesirable weight)",
    "objective.beta_gain": "α (beta gain)",
    "model.name": "model",
    "data.source": "data",
    "lora.rank": "LoRA rank",
}
_STEPS = {
    "margin.gamma": 0.05,
    "objective.beta": 0.5,
    "objective.nll_weight": 0.1,
    "objective.odds_weight": 0.1,
    "objective.length_weight": 0.01,
    "objective.delta": 0.1,
    "objective.desirable_weight": 0.1,
    "objective.undesirable_weight": 0.1,
    "objective.beta_gain": 0.1,
    "objective.gap_momentum": 0.05,
    "margin.ef_floor": 0.005,
    "training.learning_rate": 1e-6,
    "training.epochs": 0.5,
    "training.max_chosen_fall": 0.05,
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


def used(values: Mapping[str, Any]) -> frozenset[str]:
    """Keys of the settings that have an effect, so that their inputs are in sight.

    Args:
        values: those of CHOICES count; one that is none is in sight, to be mended.
    """
    name = values.get("objective.name", "gapo")
    if not isinstance(name, str) or name not in OBJECTIVES:
        return frozenset({*setting_keys()} - {*OPTIONAL})
    source, metric = values.get("margin.source"), values.get("ef.metric")
    return _used(
        name,
        source if isinstance(source, str) and source in OBJECTIVES[name].margins else None,
        metric if isinstance(metric, str) and metric in EVALUATION_FACTORS else None,
    )


def own_values(objective: Any, source: Any = None) -> dict[str, Any]:
    """What a newly chosen objective fills in: all of objective.* but its name, and all of margin.*,
    None for what it has not.

    Args:
        objective: a key of OBJECTIVES.
        source: where its margin comes from; None for its own default.

    Raises:
        ConfigError: there is no such objective, or it takes no margin from there.
    """
    settings = {"objective": {"name": objective}, "margin": {"source": source}}
    shown = values_of(parse_config(settings, source="The form"))
    del shown["objective.name"]
    return {k: v for k, v in shown.items() if k.partition(".")[0] in ("objective", "margin")}


def values_of(config: RunConfig) -> dict[str, Any]:
    """What the inputs hold for a configuration, by key: of objective.* and margin.*, None for what
    has no effect."""
    dump, there = config.model_dump(mode="json"), used_settings(config)
    return {
        key: None
        if section in ("objective", "margin") and key not in there
        else _shown(field, dump[section][name])
        for key, field in fields().items()
        for section, _, name in [key.partition(".")]
    }


def config_of(values: Mapping[str, Any]) -> RunConfig:
    """The configuration that a filled form means. What is out of sight in it does not count; what
    is in sight and empty is the objective's own.

    Raises:
        ConfigError: naming every setting that is unknown, missing or out of range.
    """
    settings: dict[str, Any] = {}
    there = used(values)
    for key, value in values.items():
        if key not in fields():
            raise ConfigError(f"there is no setting {key!r}.")
        section, _, name = key.partition(".")
        if key in there:
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
    recipe = min(PRESETS.values(), key=lambda file: len(differing_settings(config, _recipe(file))))
    program = Path(sys.executable).parent / "gapo-lite"  # need not be on the PATH
    words = [_portable(program), "train", _portable(RECIPES / recipe)]
    for override in _overrides(config, recipe):
        words += ["--set", override]
    words += ["--name", name or default_name(config)]
    if runs_dir != Path("runs"):
        words += ["--runs-dir", str(runs_dir)]
    return shlex.join(words)


def default_name(config: RunConfig) -> str:
    """A run's name where a person gives none: objective, and what its margin comes from."""
    margins = {"ef": f"-{config.ef.metric.lower()}", "rating": "-rating"}
    return config.objective.name + margins.get(config.margin.source or "", "")


def batch_line(config: RunConfig) -> str:
    """How the effective batch comes about, in words."""
    training = config.training
    at_once = [
        f"{limit:,} {unit}"
        for limit, unit in (
            (training.micro_batch_size, "pairs"),
            (training.micro_batch_tokens, "tokens"),
        )
        if limit is not None
    ]
    most = f"at most {' and '.join(at_once)} at once" if at_once else "as many at once as fit"
    return f"**{training.batch_size} pairs a step**, {most}"


@cache
def _used(name: str, source: str | None, metric: str | None) -> frozenset[str]:
    ef = {} if metric is None else {"metric": metric}
    settings = {"objective": {"name": name}, "margin": {"source": source}, "ef": ef}
    return frozenset(used_settings(parse_config(settings)))


def _overrides(config: RunConfig, recipe: str) -> list[str]:
    """What has to be set so that a recipe becomes a configuration. Another objective brings other
    values of its own where the recipe says nothing, so that these are set too."""
    differences = differing_settings(config, _recipe(recipe))
    given: dict[str, str] = {}
    while differences:
        given |= {key: f"{key}={_yaml_value(value)}" for key, (value, _) in differences.items()}
        differences = differing_settings(config, load_config(RECIPES / recipe, [*given.values()]))
    return list(given.values())


def _recipe(file: str) -> RunConfig:
    return _read_recipe(file, (RECIPES / file).stat().st_mtime_ns)


@lru_cache(maxsize=100)
def _read_recipe(file: str, changed_ns: int) -> RunConfig:
    """A recipe as it is since then: reading all of them takes too long for every change of a
    form."""
    return load_config(RECIPES / file)


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
    if field.kind in ("number", "integer") and value == "":
        return None
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
