"""The form: every setting, there and back, and the command that does the same."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from app import forms, formulas
from gapo_lite.config import load_config, parse_config, setting_keys
from gapo_lite.errors import ConfigError
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.runs import check_name

DEMO = next(iter(forms.PRESETS))


def changed(**values) -> dict:
    """The demo's form with some inputs changed; `__` stands for the dot."""
    own = {key.replace("__", "."): value for key, value in values.items()}
    return {**forms.values_of(forms.preset(DEMO)), **own}


def switched(objective: str, source: str | None = None, **values) -> dict:
    """The demo's form in which a person has chosen an objective, and then where its margin comes
    from."""
    form = {**changed(**values), "objective.name": objective, **forms.own_values(objective)}
    if source is not None:
        own = forms.own_values(objective, source)
        form |= {key: value for key, value in own.items() if key.startswith("margin.")}
    return form


EACH = [(name, source) for name, spec in OBJECTIVES.items() for source in (spec.margins or (None,))]


def test_every_setting_is_an_input_with_the_configurations_own_words():
    assert list(forms.fields()) == setting_keys()
    assert all(field.info for field in forms.fields().values())
    shown = [*forms.MAIN, *(f.key for fields in forms.folded().values() for f in fields)]
    assert sorted(shown) == sorted(setting_keys())
    assert len(forms.RUN) % 2 == 0  # two a row


@pytest.mark.parametrize("label", forms.PRESETS)
def test_a_preset_comes_back_from_the_form_as_it_was(label):
    config = forms.preset(label)
    assert forms.config_of(forms.values_of(config)) == config
    program, *words = forms.command(config, Path("runs")).split()
    assert (forms.RECIPES.parent / program).is_file()
    recipe = f"configs/{forms.PRESETS[label]}"
    assert words == ["train", recipe, "--name", forms.default_name(config)]


def test_every_recipe_is_a_preset():
    there = {path.name for path in forms.RECIPES.glob("*.yaml")}
    assert set(forms.PRESETS.values()) == there


HARD = {
    "training.sample_prompts": [
        "a\nb",
        "c: {d} # no",
        "back\\slash\\n",
        "  'quoted' \"both\" ",
        "日本",
    ],
    "lora.target_modules": ["q_proj", "v_proj"],
    "training.report_to": ["tensorboard"],
    "training.max_steps": 3,
    "training.learning_rate": 2e-5,
    "margin.gamma": 0.7,
    "data.source": "data/odd name & $(rm -rf).jsonl",
    "model.revision": "main",
    "lora.dropout": 0.1,
}


def hard_config():
    settings: dict = forms.preset(DEMO).model_dump(mode="json")
    for key, value in HARD.items():
        section, _, name = key.partition(".")
        settings[section][name] = value
    return parse_config(settings)


def test_settings_of_every_kind_come_back_from_the_form():
    config = hard_config()
    back = forms.config_of(forms.values_of(config))
    prompts = [prompt.strip() for prompt in config.training.sample_prompts]
    assert back.training.sample_prompts == prompts  # space around a prompt is not kept
    plain = {"training": config.training.model_copy(update={"sample_prompts": prompts})}
    assert back == config.model_copy(update=plain)


def test_the_command_trains_exactly_what_the_form_says():
    config = hard_config()
    words = shlex.split(forms.command(config, Path("other runs"), "my-run"))
    assert (Path(words[0]).name, words[1]) == ("gapo-lite", "train")
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert (given["--name"], given["--runs-dir"]) == ("my-run", "other runs")
    overrides = [b for a, b in pairwise(words) if a == "--set"]
    assert load_config(words[2], overrides) == config


def test_the_command_starts_from_the_nearest_recipe():
    config = forms.config_of(switched("simpo"))
    assert "gapo-lite train configs/demo-simpo.yaml" in forms.command(config, Path("runs"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("margin.gamma", -1, "greater than or equal to 0"),
        ("margin.gamma", "much", "margin.gamma"),
        ("margin.gamma", float("nan"), "margin.gamma"),
        ("training.batch_size", 2.5, "training.batch_size"),
        ("training.micro_batch_size", 0, "greater than or equal to 1"),
        ("training.gradient_checkpointing", "maybe", "gradient_checkpointing"),
        ("ef.metric", "bleu", "ef.metric"),
        ("model.name", "", "model.name"),
        ("lora.target_modules", "lm_head", "never lm_head"),
        ("training.report_to", ["twitter"], "report_to"),
        ("training.sample_prompts", {"a": 1}, ""),
        ("data.max_length", True, "data.max_length"),
        ("no.such", 1, "no.such"),
    ],
)
def test_a_bad_value_is_refused_by_its_key(key, value, words):
    if key == "training.sample_prompts":  # whatever it is, it becomes text or is refused
        assert isinstance(forms.config_of({**changed(), key: value}).training.sample_prompts, list)
        return
    with pytest.raises(ConfigError, match=words):
        forms.config_of({**changed(), key: value})


# -- objectives --


@pytest.mark.parametrize(("name", "source"), EACH)
def test_every_objective_comes_back_from_the_form_as_it_was(name, source):
    config = parse_config(
        {"objective": {"name": name}, "margin": {"source": source}, "training": {"seed": 7}}
    )
    values = forms.values_of(config)
    assert forms.config_of(values) == config
    holders = [key for key in values if key.startswith(("objective.", "margin."))]
    assert {key for key in holders if values[key] is not None} == forms.used(values) & {*holders}


@pytest.mark.parametrize(("name", "source"), EACH)
def test_a_newly_chosen_objective_fills_in_its_own_values(name, source):
    config = forms.config_of(switched(name, source))
    own = parse_config({"objective": {"name": name}, "margin": {"source": source}})
    assert (config.objective, config.margin) == (own.objective, own.margin)
    assert config.model == forms.preset(DEMO).model  # and nothing else


@pytest.mark.parametrize(("name", "source"), EACH)
def test_the_command_of_every_objective_trains_just_that(name, source):
    config = forms.config_of(switched(name, source, training__seed=7))
    words = shlex.split(forms.command(config, Path("runs")))
    overrides = [b for a, b in pairwise(words) if a == "--set"]
    assert load_config(words[2], overrides) == config


def test_the_beta_of_gapo_does_not_stay_in_dpo():
    assert forms.values_of(forms.preset(DEMO))["objective.beta"] == 10
    assert switched("dpo")["objective.beta"] == 0.01
    assert (switched("dpo")["margin.gamma"], switched("dpo", "ef")["margin.gamma"]) == (0, 3)
    assert switched("orpo")["objective.beta"] is None


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_stands_in_hidden_inputs_does_not_count(name):
    form = switched(name)
    there = forms.used(form)
    rubbish = {key: "rubbish" for key in forms.OPTIONAL if key not in there}
    assert rubbish
    assert forms.config_of({**form, **rubbish}) == forms.config_of(form)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rubbish_in_an_input_in_sight_is_refused(name):
    form = switched(name)
    for key in forms.used(form) & {*forms.OPTIONAL} - {"data.rating_columns"}:
        with pytest.raises(ConfigError, match=key):
            forms.config_of({**form, key: "rubbish"})


def test_what_is_in_sight_and_empty_is_the_objectives_own():
    config = forms.config_of({**switched("dpo"), "objective.beta": None, "margin.gamma": None})
    assert (config.objective.beta, config.margin.gamma) == (0.01, 0)


NONE_SUCH = [None, "", "ppo", ["dpo"], {"a": 1}, 5, True, "DPO"]


@pytest.mark.parametrize("name", NONE_SUCH)
def test_an_objective_that_is_none_is_refused_by_its_name_alone(name):
    form = {**changed(), "objective.name": name, "objective.beta": "rubbish"}
    with pytest.raises(ConfigError, match="objective.name") as refused:
        forms.config_of(form)
    assert "beta:" not in str(refused.value)
    with pytest.raises(ConfigError, match="objective.name"):
        forms.own_values(name)
    assert formulas.html(name) == ""


@pytest.mark.parametrize("source", ["", "none", ["ef"], {"a": 1}, 5, True, "constant"])
def test_a_margin_from_nowhere_is_refused(source):
    with pytest.raises(ConfigError, match="margin.source"):
        forms.config_of(changed(margin__source=source))
    with pytest.raises(ConfigError, match="margin.source"):
        forms.own_values("gapo", source)


@pytest.mark.parametrize("metric", ["", "bleu", ["rougeL"], {"a": 1}, 5, None])
def test_a_metric_that_is_none_counts_only_where_one_is_used(metric):
    with pytest.raises(ConfigError, match="ef.metric"):
        forms.config_of(changed(ef__metric=metric))
    assert forms.config_of({**switched("kto"), "ef.metric": metric}).ef.metric == "rougeL"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_shows_its_formula_its_source_and_what_it_needs(name):
    shown, spec = formulas.html(name), OBJECTIVES[name]
    plain = re.sub(r"<sub>(\w)</sub>", r"_\1", shown)
    assert f"<code>{spec.formula}</code>" in plain
    assert spec.source in shown
    assert ("Needs the reference" in shown) == spec.uses_reference
    assert ("Needs no reference" in shown) != spec.uses_reference


def test_whole_numbers_may_come_as_decimals():
    assert forms.config_of(changed(training__max_steps=3.0)).training.max_steps == 3
    assert forms.config_of(changed(training__max_steps=None)).training.max_steps is None


@pytest.mark.parametrize(
    ("pairs", "tokens", "words"),
    [
        (None, None, "as many at once as fit"),
        (2, None, "at most 2 pairs at once"),
        (None, 8192, "at most 8,192 tokens at once"),
        (4, 8192, "at most 4 pairs and 8,192 tokens at once"),
    ],
)
def test_the_effective_batch_is_told(pairs, tokens, words):
    given = {"training__micro_batch_size": pairs, "training__micro_batch_tokens": tokens}
    config = forms.config_of(changed(training__batch_size=128, **given))
    assert forms.batch_line(config) == f"**128 pairs a step**, {words}"


@pytest.mark.parametrize(
    ("objective", "source", "name"),
    [
        ("gapo", None, "gapo-rougel"),
        ("gapo", "rating", "gapo-rating"),
        ("simpo", None, "simpo"),
        ("dpo", None, "dpo"),
        ("dpo", "ef", "dpo-rougel"),
        ("dpo", "rating", "dpo-rating"),
        ("kto", None, "kto"),
    ],
)
def test_a_run_is_named_after_objective_and_margin(objective, source, name):
    config = parse_config({"objective": {"name": objective}, "margin": {"source": source}})
    assert forms.default_name(config) == name
    check_name(name)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match="no preset"):
        forms.preset("../../etc/passwd")
