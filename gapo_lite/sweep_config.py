"""What a sweep tries: a YAML file → contenders → cells.

    base: ../demo.yaml                     # a complete configuration, beside this file
    settings: {training.max_steps: 16}     # of all its runs
    variants:                              # named sets of settings, over those of all runs …
      - {name: simpo, settings: {objective.name: simpo}}
      - {name: gapo, settings: {}}
    grid: {margin.gamma: [0.1, 0.3]}       # … each with every combination of these
    seeds: [42, 43, 44]
    baseline: simpo-gamma-0.3

A *contender* is one combination, a *cell* a contender with a seed: one ordinary run. Every cell's
configuration is checked before anything is trained. Importing this imports no torch.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator

from gapo_lite.config import (
    RunConfig,
    Section,
    parse_config,
    setting_keys,
    used_settings,
)
from gapo_lite.ef import EVALUATION_FACTORS
from gapo_lite.errors import ConfigError
from gapo_lite.settings import apply_override, describe_invalid, read_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
MOST_CELLS = 5000


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Refuses what would not reach a run as it was written: a whole section, whose other settings
    would be lost, and what is neither number, text nor a list of them, such as YAML's dates."""
    for key, value in settings.items():
        if key in RunConfig.model_fields and value != {}:
            raise ValueError(
                f"has {key}, which is a section: write its settings as {key}.NAME, or {{}} to "
                "leave out all that the base says of it"
            )
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise ValueError(
                f"has a value for {key} that is neither a finite number nor text nor a list of "
                'them; put text that YAML takes for something else in quotes ("2026-01-31")'
            ) from None
    return settings


_Settings = Annotated[dict[str, Any], AfterValidator(_plain)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as training.seed


class Variant(Section):
    """A named set of settings."""

    name: str = Field(description="Letters, digits, '.', '_' and '-': part of its runs' names.")
    settings: _Settings = Field(
        default_factory=dict, description="Dotted keys and values, over the base's."
    )

    @field_validator("name")
    @classmethod
    def _part_of_a_run_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("takes letters, digits, '.', '_' and '-', at most 60")
        return value


class Halving(Section):
    """Successive halving: all contenders train some steps, the better ones go on to more.

    Those come first that most seeds have brought to the end of the round (none of one that failed
    or that the drift guard stopped), then those with the higher mean. The baseline always goes on,
    and takes no other contender's place.
    """

    first_steps: int = Field(ge=1, description="Optimizer steps of the first round.")
    keep: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of the contenders that goes on beside the baseline, at least one.",
    )
    growth: float = Field(
        2.0, gt=1, le=100, description="Each round has so many times the steps of the one before."
    )
    metric: Literal["logps/accuracies", "rewards/accuracies", "rewards/margins"] = Field(
        "logps/accuracies",
        description="Held-out measure, mean over the seeds that got there; the first compares all "
        "objectives.",
    )


class Answers(Section):
    """Greedy answers to held-out prompts after each run, for their length."""

    prompts: int = Field(16, ge=1, le=1000, description="Held-out prompts, the first ones.")
    max_tokens: int = Field(192, ge=1, le=4096, description="Longest answer, in tokens.")
    batch_size: int = Field(16, ge=1, le=1024, description="Prompts answered at once.")


class SweepConfig(Section):
    """Everything that decides a sweep."""

    base: str | dict[str, Any] = Field(
        description="A configuration file, from the sweep file's folder; or its settings."
    )
    settings: _Settings = Field(
        default_factory=dict, description="Dotted keys and values for all runs."
    )
    variants: list[Variant] = Field(default_factory=list, description="Named sets of settings.")
    grid: Annotated[dict[str, list[Any]], AfterValidator(_plain)] = Field(
        default_factory=dict, description="Dotted key → values; every combination is tried."
    )
    seeds: list[_Seed] = Field(
        [42, 43, 44], min_length=1, description="training.seed of each contender's runs."
    )
    baseline: str | None = Field(
        None, description="The contender that others are compared with, seed by seed."
    )
    answers: Answers | None = Field(
        Answers(), description="How answers are measured; null measures none."
    )
    halving: Halving | None = Field(None, description="Stops losers early; null trains all.")
    decile_metric: str = Field(
        "rougeL", description="Evaluation factor by whose deciles accuracy is shown."
    )
    hours: float | None = Field(
        None, gt=0, description="Budget of one call: no training goes on after it."
    )
    max_runs: int | None = Field(None, ge=1, description="Budget of one call: runs trained.")

    @field_validator("seeds")
    @classmethod
    def _different(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("names a seed twice")
        return value

    @field_validator("grid")
    @classmethod
    def _values_to_try(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        empty = [key for key, values in value.items() if not values]
        if empty:
            raise ValueError(f"has no values for {', '.join(empty)}")
        return value

    @field_validator("decile_metric")
    @classmethod
    def _known_metric(cls, value: str) -> str:
        if value not in EVALUATION_FACTORS:
            raise ValueError(f"must be one of {', '.join(EVALUATION_FACTORS)}")
        return value


@dataclass(frozen=True, slots=True)
class Contender:
    """One combination of settings.

    Attributes:
        name: unique in its sweep, part of its runs' names.
        settings: dotted keys and values, over the base's.
        config: the whole, with the first seed.
    """

    name: str
    settings: dict[str, Any]
    config: RunConfig


@dataclass(frozen=True, slots=True)
class Cell:
    """A contender with a seed: one run.

    Attributes:
        contender: name of the contender.
        seed: training.seed.
        run: name of the run.
        config: the run's configuration.
    """

    contender: str
    seed: int
    run: str
    config: RunConfig


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Reads a sweep's YAML file; its `base` becomes that configuration's settings.

    Args:
        path: the file.
        overrides: `key=value`, over what the file says: of the sweep (`seeds=[1,2]`,
            `answers.prompts=4`), or of all its runs (`training.max_steps=8`).

    Raises:
        ConfigError: the file or its base is missing or not YAML, a setting of the sweep or of any
            of its contenders is unknown or out of range, or one would be without effect.
    """
    given = read_yaml(path)
    if "base" not in given and not given.keys().isdisjoint(RunConfig.model_fields):
        raise ConfigError(f"{path} is a run's configuration, not a sweep: gapo-lite train {path}")
    of_runs: dict[str, Any] = {}
    for override in overrides:
        if override.partition("=")[0].strip().split(".")[0] in SweepConfig.model_fields:
            apply_override(given, override)
        else:
            of_runs |= _dotted(override)
    known = given.get("settings") or {}
    if of_runs and isinstance(known, dict):  # else the check of the whole says so
        given["settings"] = {**known, **of_runs}
    if isinstance(given.get("base"), str):
        given["base"] = read_yaml(path.parent / given["base"])
    sweep = parse_sweep(given, source=str(path))
    for key in of_runs:
        _check_reaches_all(key, sweep)
    return sweep


def load_begun(path: Path) -> SweepConfig:
    """Reads the sweep.yaml of a sweep that has begun, also one that would not be begun now: what it
    has found can still be read.

    Raises:
        ConfigError: as `load_sweep`.
    """
    sweep = _validated(read_yaml(path), str(path))
    _check_contenders(sweep, str(path))
    return sweep


def _dotted(override: str) -> dict[str, Any]:
    """`a.b=value` as {"a.b": value}.

    Raises:
        ConfigError: it is not of that form, or no run has such a setting.
    """
    key = override.partition("=")[0].strip()
    settings: dict[str, Any] = {}
    apply_override(settings, override)
    if key not in setting_keys():
        try:
            RunConfig.model_validate(settings)
        except ValidationError as error:
            known = [*SweepConfig.model_fields, *setting_keys()]
            raise ConfigError(f"--set {override}: {describe_invalid(error, known)}") from None
    value: Any = settings
    for part in key.split("."):
        value = value[part]
    return {key: value}


def _check_reaches_all(key: str, sweep: SweepConfig) -> None:
    """Refuses a --set of all runs that some variants would undo."""
    undo = [
        one.name
        for one in sweep.variants
        if any(key == own or key.startswith(f"{own}.") for own in one.settings)
    ]
    if undo:
        raise ConfigError(
            f"--set {key} is meant for all runs, but variants set it themselves: "
            f"{', '.join(undo)}. Change it there, in a copy of the file."
        )


def parse_sweep(given: dict[str, Any], source: str = "sweep") -> SweepConfig:
    """Checks a sweep that is to begin, and the configuration of each of its cells.

    Raises:
        ConfigError: naming every unknown or bad setting, and the contenders that it is of; or a
            setting would be without effect.
    """
    sweep = _validated(given, source)
    _check_seeds(sweep, source)
    _check_halving(sweep, _check_contenders(sweep, source), source)
    return sweep


def _validated(given: dict[str, Any], source: str) -> SweepConfig:
    try:
        return SweepConfig.model_validate(given)
    except ValidationError as error:
        raise ConfigError(
            f"{source}: {describe_invalid(error, list(SweepConfig.model_fields))}"
        ) from None


def _check_contenders(sweep: SweepConfig, source: str) -> list[Contender]:
    """Whether all can be trained, and the baseline is one of them; returns them."""
    found = contenders(sweep, source)
    if sweep.baseline is not None and sweep.baseline not in {one.name for one in found}:
        names = ", ".join(one.name for one in found)
        raise ConfigError(
            f"{source}: baseline is {sweep.baseline!r}, which is no contender. There are: {names}."
        )
    return found


def _check_seeds(sweep: SweepConfig, source: str) -> None:
    """Refuses training.seed where each run's own would replace it."""
    places = {"settings": sweep.settings}
    places |= {f"the variant {one.name}": one.settings for one in sweep.variants}
    if taken := [place for place, settings in places.items() if "training.seed" in settings]:
        raise ConfigError(
            f"{source}: training.seed cannot be in {', '.join(taken)}: seeds go under `seeds`, and "
            "all contenders have the same."
        )


def _check_halving(sweep: SweepConfig, found: list[Contender], source: str) -> None:
    """Refuses a first round in which all runs would come to their end, where the settings tell."""
    most = max(_most_steps(one.config) for one in found)
    if sweep.halving and sweep.halving.first_steps >= most:
        raise ConfigError(
            f"{source}: halving.first_steps is {sweep.halving.first_steps}, but no run has more "
            f"than {most:,} steps: all would end in the first round, and none be dropped. Lower "
            "it, or let the runs have more steps."
        )


def _most_steps(config: RunConfig) -> float:
    """Optimizer steps that a run can have, whatever its data."""
    training = config.training
    if training.max_steps:
        return training.max_steps
    if config.data.max_pairs is None:
        return math.inf
    return math.ceil(training.epochs * math.ceil(config.data.max_pairs / training.batch_size))


def contenders(sweep: SweepConfig, source: str = "sweep") -> list[Contender]:
    """All combinations, in the order of the file.

    Raises:
        ConfigError: settings of one are not usable, or two are the same.
    """
    _check_size(sweep, source)
    found: list[Contender] = []
    problems: dict[str, list[str]] = {}
    for name, settings in _combinations(sweep):
        merged = {**sweep.settings, **settings}
        try:
            config = resolve(sweep, merged, sweep.seeds[0])
        except ConfigError as error:
            problems.setdefault(str(error), []).append(name)
        else:
            found.append(Contender(name, settings, config))
    if problems:
        told = (f"{_called(names)}: {problem}" for problem, names in problems.items())
        raise ConfigError(f"{source}:\n" + "\n".join(told))
    _check_different(found, source)
    return found


def _called(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{'contender' if len(names) == 1 else 'contenders'} {shown}"


def resolve(sweep: SweepConfig, settings: dict[str, Any], seed: int) -> RunConfig:
    """The base's settings with others over them.

    Raises:
        ConfigError: they are not usable.
    """
    # As YAML, which is what they are read as: JSON's emoji are not YAML's.
    overrides = [f"{key}={_as_yaml(value)}" for key, value in settings.items()]
    if not isinstance(sweep.base, dict):
        raise ConfigError(f"the base {sweep.base!r} was not read.")
    config = parse_config(sweep.base, [*overrides, f"training.seed={seed}"])
    if not (config.data.heldout_fraction or config.data.heldout_source):
        raise ConfigError(
            "it holds no pairs out, so a sweep would have nothing to compare. Set "
            "data.heldout_fraction or data.heldout_source."
        )
    return config


def cells_of(sweep: SweepConfig, name: str) -> list[Cell]:
    """All runs of the sweep `name`: one seed of every contender, then the next seed, so that what
    is there when time runs out compares all of them."""
    found = contenders(sweep)
    return [
        Cell(one.name, seed, run_name(name, one.name, seed), _seeded(one.config, seed))
        for seed in sweep.seeds
        for one in found
    ]


def run_name(sweep: str, contender: str, seed: int) -> str:
    """Name of a cell's run."""
    return f"{sweep}-{contender}-s{seed}"


def to_yaml(sweep: SweepConfig) -> str:
    """The sweep with its base written out, as `load_sweep` reads it."""
    return yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n")


def _seeded(config: RunConfig, seed: int) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})


def _combinations(sweep: SweepConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and settings; settings of the grid go over a variant's."""
    variants: list[Variant | None] = [*sweep.variants] or [None]
    for variant, values in itertools.product(variants, itertools.product(*sweep.grid.values())):
        chosen = dict(zip(sweep.grid, values, strict=True))
        parts = [variant.name] if variant else []
        parts += [f"{key.rpartition('.')[2]}-{_slug(value)}" for key, value in chosen.items()]
        yield "-".join(parts) or "base", {**(variant.settings if variant else {}), **chosen}


def _slug(value: Any) -> str:
    if isinstance(value, int | float):
        return json.dumps(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "none"


def _check_size(sweep: SweepConfig, source: str) -> None:
    taken = [key for key in ("training.seed", *sweep.settings) if key in sweep.grid]
    if taken:
        raise ConfigError(
            f"{source}: {', '.join(taken)} cannot be in the grid: seeds go under `seeds`, and what "
            "`settings` says holds for all runs."
        )
    number = max(len(sweep.variants), 1) * len(sweep.seeds)
    for values in sweep.grid.values():
        number *= len(values)
    if number > MOST_CELLS:
        raise ConfigError(
            f"{source}: {number:,} runs are more than a sweep can have ({MOST_CELLS:,}). Try fewer "
            "values or seeds."
        )


def _check_different(found: list[Contender], source: str) -> None:
    """Two names for one thing, and one name for two, are mistakes."""
    names: set[str] = set()
    same: dict[str, str] = {}
    for one in found:
        if one.name in names:
            raise ConfigError(f"{source}: two contenders are called {one.name}.")
        if not _NAME.fullmatch(one.name):
            raise ConfigError(
                f"{source}: {one.name!r} would be the name of a contender, which has at most 60 "
                "letters, digits, '.', '_' and '-'. Give variants a name instead of a grid."
            )
        names.add(one.name)
        used = used_settings(one.config)
        content = json.dumps(
            {
                f"{section}.{key}": value
                for section, values in one.config.model_dump(mode="json").items()
                for key, value in values.items()
                if f"{section}.{key}" in used
            }
        )
        if content in same:
            raise ConfigError(
                f"{source}: the contenders {same[content]} and {one.name} have the same settings, "
                "so one of them would be trained twice."
            )
        same[content] = one.name
