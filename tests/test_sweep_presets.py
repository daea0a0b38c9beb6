"""GaPO against SimPO from one configuration, and a configuration as a sweep's base."""

from __future__ import annotations

import copy

import pytest

from gapo_lite.config import RunConfig, load_config, parse_config
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.sweep_config import cells_of, contenders, parse_sweep
from gapo_lite.sweep_presets import against_simpo, as_base, as_gapo, mean_margin


def config(**sections: dict) -> RunConfig:
    return parse_config(sections)


@pytest.mark.parametrize("normalization", ["scale", "shift"])
def test_simpo_has_the_mean_of_gapos_margins_which_is_gamma(normalization):
    given = config(
        margin={"gamma": 0.45, "normalization": normalization, "mapping": "sqrt"},
        objective={"name": "gapo", "beta": 4, "margin_scale": "one"},
        ef={"metric": "rouge2"},
    )
    simpo, gapo = contenders(against_simpo(given))
    assert (simpo.name, gapo.name) == ("simpo", "gapo")
    assert gapo.config == given
    assert simpo.config.objective.name == "simpo"
    assert simpo.config.margin.source == "constant"
    assert simpo.config.margin.gamma == 0.45
    assert simpo.config.objective.beta == 4
    assert simpo.config.objective.reward_scale == gapo.config.objective.reward_scale == 1.0


def test_they_differ_in_the_margins_source_alone_on_the_same_seeds():
    sweep = against_simpo(load_config("configs/demo.yaml"), seeds=(1, 2))
    assert sweep.baseline == "simpo"
    assert [cell.run for cell in cells_of(sweep, "s")] == [
        *("s-simpo-s1", "s-gapo-s1", "s-simpo-s2", "s-gapo-s2")
    ]
    simpo, gapo = (one.config for one in contenders(sweep))
    for section in ("model", "lora", "data", "ef", "training"):
        assert getattr(simpo, section) == getattr(gapo, section)


def test_without_normalization_the_mean_is_that_of_the_trained_pairs(tiny_settings):
    given = copy.deepcopy(tiny_settings)
    given["margin"] = {"normalization": "none"}
    found = mean_margin(parse_config(given))
    scaled = copy.deepcopy(tiny_settings)
    scaled["margin"] = {"gamma": 2.5}
    assert mean_margin(parse_config(scaled)) == 2.5
    from gapo_lite.model import load_tokenizer
    from gapo_lite.preparation import prepare

    pairs = prepare(parse_config(given), load_tokenizer(given["model"]["name"])).train
    assert found == float(pairs.margins.gaps.mean()) > 0.5
    simpo, gapo = contenders(against_simpo(parse_config(given)))
    assert simpo.config.margin.gamma == found
    assert gapo.config.margin.normalization == "none"


def test_another_objectives_settings_give_way_to_gapos_own():
    given = config(objective={"name": "dpo", "beta": 0.05}, training={"learning_rate": 3e-4})
    gapo = as_gapo(given)
    assert (gapo.objective.beta, gapo.margin.gamma) == (10.0, 0.3)
    assert gapo.training.learning_rate == 3e-4
    rated = as_gapo(config(margin={"source": "rating", "gamma": 0.2}))
    assert (rated.margin.source, rated.margin.gamma) == ("ef", 0.2)


@pytest.mark.parametrize(
    ("name", "source"),
    [(name, source) for name, spec in OBJECTIVES.items() for source in ("own", *spec.margins)],
)
def test_a_base_means_the_same_configuration(name, source):
    margin = {} if source == "own" else {"source": source, "gamma": 0.7}
    given = config(objective={"name": name}, margin=margin)
    assert parse_config(as_base(given)) == given


def test_a_contender_with_another_objective_takes_that_ones_own_values():
    base = as_base(config(training={"learning_rate": 1e-4}))
    sweep = parse_sweep({"base": base, "grid": {"objective.name": ["gapo", "simpo", "dpo", "kto"]}})
    found = {one.config.objective.name: one.config for one in contenders(sweep)}
    assert found["simpo"].margin.source == "constant"
    assert found["dpo"].objective.beta == 0.01
    assert found["kto"].margin.source is None
    assert {one.training.learning_rate for one in found.values()} == {1e-4}
