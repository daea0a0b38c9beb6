"""The form: every setting, there and back, and the command that does the same."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from app import forms
from gapo_lite.config import load_config, parse_config, setting_keys
from gapo_lite.errors import ConfigError

DEMO = next(iter(forms.PRESETS))


def changed(**values) -> dict:
    """The demo's form with some inputs changed; `__` stands for the dot."""
    own = {key.replace("__", "."): value for key, value in values.items()}
    return {**forms.values_of(forms.preset(DEMO)), **own}


def test_every_setting_is_an_input_with_the_configurations_own_words():
    assert list(forms.fields()) == setting_keys()
    assert all(field.info for field in forms.fields().values())
    shown = [*forms.MAIN, *(f.key for fields in forms.folded().values() for f in fields)]
    assert sorted(shown) == sorted(setting_keys())
    assert len(forms.MAIN) % 2 == 0  # two a row


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
    config = forms.config_of({**changed(), "objective.name": "simpo"})
    assert "gapo-lite train configs/demo-simpo.yaml" in forms.command(config, Path("runs"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("margin.gamma", None, "margin.gamma"),
        ("margin.gamma", -1, "greater than or equal to 0"),
        ("margin.gamma", "much", "margin.gamma"),
        ("margin.gamma", float("nan"), "margin.gamma"),
        ("training.batch_size", 2.5, "training.batch_size"),
        ("training.batch_size", 7, "multiple of micro_batch_size"),
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


def test_whole_numbers_may_come_as_decimals():
    assert forms.config_of(changed(training__max_steps=3.0)).training.max_steps == 3
    assert forms.config_of(changed(training__max_steps=None)).training.max_steps is None


def test_the_effective_batch_is_told():
    config = forms.config_of(changed(training__batch_size=128, training__micro_batch_size=2))
    assert forms.batch_line(config) == "**128 pairs a step** = 2 at once × 64 accumulated"


@pytest.mark.parametrize(
    ("objective", "metric", "name"),
    [("gapo", "rougeL", "gapo-rougel"), ("simpo", "rougeL", "simpo")],
)
def test_a_run_is_named_after_objective_and_metric(objective, metric, name):
    config = forms.config_of(changed(objective__name=objective, ef__metric=metric))
    assert forms.default_name(config) == name


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match="no preset"):
        forms.preset("../../etc/passwd")
