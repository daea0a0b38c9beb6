"""The form of the Sweeps tab: what a person fills in → SweepConfig.

A sweep starts from a grid of one's own, from a ready-made file under configs/sweeps/, or from GaPO
against SimPO; its base is a recipe or what the Train tab's form says. Over what it starts from go
up to ROWS settings with the values to try. The first contender is what the others are compared
with, where the file names no other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from app import forms
from app.places import Places
from gapo_lite.config import RunConfig, setting_keys
from gapo_lite.errors import ConfigError, GapoError
from gapo_lite.settings import read_yaml
from gapo_lite.sweep_config import Contender, SweepConfig, contenders, parse_sweep
from gapo_lite.sweep_presets import against_simpo, as_base

ROWS = 4
"""Settings that the form can vary."""
MOST_RUNS = 500
"""Of a sweep that the page starts; the command line takes more."""
TRAIN_FORM = "The Train tab's form"
OWN_GRID = "A grid of my own"
AGAINST = "GaPO against SimPO"

_READY = Path(__file__).parents[1] / "configs" / "sweeps"
_FIRST = (
    *("ef.metric", "margin.mapping", "margin.normalization", "margin.gamma", "objective.beta"),
    *("objective.name", "training.learning_rate"),
)
KEYS = (*_FIRST, *(key for key in setting_keys() if key not in (*_FIRST, "training.seed")))
"""Settings that can be varied, the usual ones first."""
_LONGEST = 1000  # characters of a text that is read as values

MeanMargin = Callable[[RunConfig], float]


@dataclass(frozen=True, slots=True)
class Filled:
    """What the inputs hold, checked to be of these kinds and no more.

    Attributes:
        start: OWN_GRID, AGAINST or a name of `ready_made`.
        base: TRAIN_FORM or a name of forms.PRESETS.
        rows: a setting's key ("" for none) and the values to try, as they were typed.
        seeds: separated by commas.
        hours, max_runs: budget; None for none.
        halving: whether losers are stopped early.
        first_steps: of its first round.
        prompts: to answer after each run; 0 for none.
        max_tokens: of the longest answer.
    """

    start: str
    base: str
    rows: tuple[tuple[str, str], ...]
    seeds: str
    hours: float | None
    max_runs: float | None
    halving: bool
    first_steps: float | None
    prompts: float | None
    max_tokens: float | None


def ready_made() -> dict[str, Path]:
    """Sweeps that come with the project, by name."""
    return {path.stem: path for path in sorted(_READY.glob("*.yaml"))}


def starts() -> list[str]:
    """What a sweep can start from."""
    return [OWN_GRID, AGAINST, *ready_made()]


def filled_from(start: Any) -> Filled:
    """What the form holds when a start is chosen.

    Raises:
        ConfigError: there is no such start, or its grid has more settings than the form.
    """
    given = _ready_settings(start)
    halving, answers = given.get("halving"), given.get("answers", {})
    answers = {"prompts": 0} if answers is None else answers
    recipe = str(given.get("base", "")).rpartition("/")[2]
    base = next((label for label, file in forms.PRESETS.items() if file == recipe), TRAIN_FORM)
    rows = [(key, _as_text(values)) for key, values in given.get("grid", {}).items()]
    if len(rows) > ROWS:
        raise ConfigError(
            f"{start} varies {len(rows)} settings, and this form holds {ROWS}: use gapo-lite sweep."
        )
    return Filled(
        start=start,
        base=base,
        rows=tuple((rows + [("", "")] * ROWS)[:ROWS]),
        seeds=", ".join(map(str, given.get("seeds", (42, 43, 44)))),
        hours=given.get("hours"),
        max_runs=given.get("max_runs"),
        halving=bool(halving),
        first_steps=halving["first_steps"] if halving else 20,
        prompts=answers.get("prompts", 16),
        max_tokens=answers.get("max_tokens", 192),
    )


def sweep_of(
    filled: Filled, train_form: Mapping[str, Any], places: Places, mean_margin: MeanMargin
) -> SweepConfig:
    """The sweep that a filled form means, ready to be started.

    Args:
        filled: the Sweeps tab's inputs.
        train_form: the Train tab's, as forms.config_of takes them.
        places: which data and models may be opened.
        mean_margin: of GaPO's training pairs; asked for AGAINST alone.

    Raises:
        GapoError: naming what is not usable, in the base or in any contender.
    """
    base = places.check_config(_base(filled.base, train_form))
    given = _ready_settings(filled.start)
    if filled.start == AGAINST:
        given = against_simpo(base, mean_margin(base)).model_dump(mode="json")
    else:
        given["base"] = as_base(base)
    given["grid"] = _grid(filled.rows, places)
    given |= _run_settings(filled)
    if given["grid"]:  # whose values are part of all names
        given["baseline"] = None
    _check_size(given)
    sweep = parse_sweep(given, source="The sweep")
    found = contenders(sweep)
    for one in found:
        _check_places(one, places)
    if sweep.baseline is None and len(found) > 1:
        return sweep.model_copy(update={"baseline": found[0].name})
    return sweep


def default_name(start: str) -> str:
    """A sweep's name where a person gives none."""
    return {OWN_GRID: "grid", AGAINST: "gapo-against-simpo"}.get(start, start)


def own_words(sweep: SweepConfig) -> list[tuple[str, str]]:
    """Name and settings of each contender."""
    return [
        (one.name, ", ".join(f"{key} = {_one_value(v)}" for key, v in one.settings.items()))
        for one in contenders(sweep)
    ]


def _base(name: Any, train_form: Mapping[str, Any]) -> RunConfig:
    return forms.config_of(train_form) if name == TRAIN_FORM else forms.preset(name)


def _ready_settings(start: Any) -> dict[str, Any]:
    """What the file of a start says; nothing for the others."""
    if start in (OWN_GRID, AGAINST):
        return {}
    files = ready_made()
    if not isinstance(start, str) or start not in files:
        raise ConfigError("there is no such sweep to start from: choose one of the list.")
    return read_yaml(files[start])


def _run_settings(filled: Filled) -> dict[str, Any]:
    halving = None
    if filled.halving:
        halving = {"first_steps": _whole(filled.first_steps, "the steps of the first round")}
        kept = _ready_settings(filled.start).get("halving") or {}
        halving = {**kept, **halving}
    prompts = _whole(filled.prompts or 0, "the number of prompts to answer")
    answers = None
    if prompts:
        answers = {
            "prompts": prompts,
            "max_tokens": _whole(filled.max_tokens, "the length of answers"),
            "batch_size": min(16, max(1, prompts)),
        }
    max_runs = filled.max_runs
    return {
        "seeds": [_seed(one) for one in _values("seeds", filled.seeds)],
        "halving": halving,
        "answers": answers,
        "hours": filled.hours,
        "max_runs": None if max_runs is None else _whole(max_runs, "the most runs at once"),
    }


def _seed(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**32:
        raise ConfigError(f"{value!r:.50} is no seed: give whole numbers from 0, such as 42, 43.")
    return value


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ConfigError(f"{what} must be a whole number.")
    return int(value)


def _grid(rows: Sequence[tuple[str, str]], places: Places) -> dict[str, list[Any]]:
    """Settings and values of the rows that are used.

    Raises:
        ConfigError: naming every row that is not usable.
    """
    grid: dict[str, list[Any]] = {}
    problems = []
    for key, text in rows:
        try:
            if not key and not text.strip():
                continue
            if key not in KEYS:
                raise ConfigError(f"choose the setting that {text!r:.60} are values of.")
            if key in grid:
                raise ConfigError(f"{key} is there twice: write all its values into one row.")
            grid[key] = [_opened(key, value, places) for value in _values(key, text)]
        except GapoError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return grid


def _values(key: str, text: str) -> list[Any]:
    """Values separated by commas, each as YAML."""
    refusal = ConfigError(
        f"{key}: {text!r:.60} are no values: separate them by commas, as in 0.1, 0.3, 1."
    )
    if not text.strip():
        raise ConfigError(f"{key} has no values to try: separate them by commas.")
    if len(text) > _LONGEST or any(sign in text for sign in "&*!"):  # aliases, tags
        raise refusal
    try:
        found = yaml.safe_load(f"[{text}]")
        json.dumps(found, allow_nan=False)  # dates are none, nor is what has no end
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError):
        raise refusal from None
    if not isinstance(found, list) or not found:
        raise refusal
    return [_meant(key, value) for value in found]


def _meant(key: str, value: Any) -> Any:
    """1e-5 is a number, though not to YAML; data that are held out nowhere have no name."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,3}", value, re.A):
        return float(value)
    return None if value == "none" and key.startswith("data.") else value


def _opened(key: str, value: Any, places: Places) -> Any:
    """A value of the grid, with data and models as the checks of places return them."""
    checks = {
        "data.source": places.check_source,
        "data.heldout_source": places.check_source,
        "model.name": places.check_model,
        "ef.bertscore_model": places.check_encoder,
    }
    return value if value is None or key not in checks else checks[key](value)


def _check_places(one: Contender, places: Places) -> None:
    """No contender may open what the Train tab could not, wherever its settings come from.

    Raises:
        ConfigError: it would.
    """
    try:
        checked = places.check_config(one.config)
    except GapoError as error:
        raise ConfigError(f"contender {one.name}: {error}") from None
    if checked != one.config:
        raise ConfigError(f"contender {one.name} names data or models by a way round.")


def _check_size(given: Mapping[str, Any]) -> None:
    """Before thousands of configurations are checked for a browser that waits.

    Raises:
        ConfigError: there would be too many runs.
    """
    number = max(1, len(given.get("variants", []))) * len(given["seeds"])
    for values in given["grid"].values():
        number *= len(values)
    if number > MOST_RUNS:
        raise ConfigError(
            f"{number:,} runs are more than this page starts at once ({MOST_RUNS}): try fewer "
            "values or seeds, or use gapo-lite sweep."
        )


def _as_text(values: Sequence[Any]) -> str:
    return ", ".join(map(_one_value, values))


def _one_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
