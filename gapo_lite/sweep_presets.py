"""Sweeps that are made from one configuration, without a file.

    against_simpo(config, mean_margin(config))      # GaPO against SimPO, on the same seeds

Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gapo_lite.config import RunConfig, parse_config
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.sweep_config import SweepConfig, parse_sweep

SEEDS = (42, 43, 44)

_SHARED = ("gapo", "simpo")  # objectives that mean the same by β, γ and their scale


def against_simpo(
    config: RunConfig, margin: float | None = None, seeds: Sequence[int] = SEEDS
) -> SweepConfig:
    """GaPO and SimPO that differ in nothing but where each pair's target margin comes from: SimPO's
    is the mean of GaPO's.

    Args:
        config: settings of both; what is only of another objective does not count.
        margin: `mean_margin(config)`; None computes it, which reads the pairs under
            `normalization: none` and imports torch for their tokens.
        seeds: of each.

    Raises:
        GapoError: the settings or, where the pairs have to be read, the data are not usable.
    """
    gapo = as_gapo(config)
    constant = mean_margin(gapo) if margin is None else margin
    simpo = {"objective.name": "simpo", "margin.source": "constant", "margin.gamma": constant}
    return parse_sweep(
        {
            "base": gapo.model_dump(mode="json"),
            "variants": [{"name": "simpo", "settings": simpo}, {"name": "gapo"}],
            "baseline": "simpo",
            "seeds": list(seeds),
        },
        source="GaPO against SimPO",
    )


def as_gapo(config: RunConfig) -> RunConfig:
    """The same settings with GaPO's objective and margins from evaluation factors."""
    settings = config.model_dump(mode="json")
    if config.objective.name not in _SHARED:
        settings["objective"] = settings["margin"] = {}
    settings["objective"] = {**settings["objective"], "name": "gapo"}
    settings["margin"] = {**settings["margin"], "source": "ef"}
    return parse_config(settings)


def mean_margin(config: RunConfig) -> float:
    """Mean target margin of GaPO's training pairs, before β.

    Under `scale` and `shift` that is γ, whatever the pairs; under `none` they are read, tokenised
    (those without room do not count) and scored.

    Raises:
        GapoError: the data are not usable.
    """
    gapo = as_gapo(config)
    if gapo.margin.normalization != "none":
        assert gapo.margin.gamma is not None, "GaPO has a gamma of its own"
        return gapo.margin.gamma
    from gapo_lite.model import load_tokenizer  # imports torch
    from gapo_lite.preparation import prepare

    tokenizer = load_tokenizer(gapo.model.name, gapo.model.revision)
    return float(prepare(gapo, tokenizer).train.margins.values.mean())


def as_base(config: RunConfig) -> dict[str, Any]:
    """Settings for a sweep's `base`, from a configuration that is written out: without what the
    objective would take anyway, so that contenders with another one take that one's own.

    It means the same: `parse_config(as_base(config)) == config`.
    """
    settings = config.model_dump(mode="json")
    own = parse_config(
        {"objective": {"name": config.objective.name}, "margin": _source(config)}
    ).model_dump(mode="json")
    for section in ("objective", "margin"):
        settings[section] = {
            key: value
            for key, value in settings[section].items()
            if key == "name" or value != own[section][key]
        }
    if not _is_own_source(config):
        settings["margin"]["source"] = config.margin.source
    return settings


def _source(config: RunConfig) -> dict[str, Any]:
    return {} if config.margin.source is None else {"source": config.margin.source}


def _is_own_source(config: RunConfig) -> bool:
    margins = OBJECTIVES[config.objective.name].margins
    return config.margin.source == (margins[0] if margins else None)
