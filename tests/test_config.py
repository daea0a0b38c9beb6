from __future__ import annotations

import pytest
import yaml
from checkout import ROOT

from gapo_lite.config import RunConfig, load_config, parse_config, setting_keys, used_settings
from gapo_lite.errors import ConfigError
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.settings import read_yaml

RECIPES = ROOT / "configs"
CONFIGS = sorted(RECIPES.glob("*.yaml"))
SEVERAL_GPUS = sorted(RECIPES.glob("accelerate/llama*.yaml"))


def message_of(settings, overrides=()):
    with pytest.raises(ConfigError) as caught:
        parse_config(settings, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", [*CONFIGS, *SEVERAL_GPUS], ids=lambda path: path.stem)
def test_every_recipe_loads_and_opens_with_its_purpose_and_command(path):
    load_config(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"configs/{path.relative_to(RECIPES)}" in text or "make demo" in text
    assert "measured" in text


def test_there_is_a_recipe_for_every_objective():
    assert {load_config(path).objective.name for path in CONFIGS} == set(OBJECTIVES)


def test_the_paper_s_recipe_has_the_paper_s_settings():
    config = load_config(CONFIGS[0].parent / "llama3-8b-gapo-rougel.yaml")
    assert (config.objective.name, config.objective.beta, config.margin.gamma) == ("gapo", 10, 0.3)
    assert (config.ef.metric, config.margin.mapping, config.margin.normalization) == (
        "rougeL",
        "log",
        "scale",
    )
    assert (config.data.max_length, config.data.max_prompt_length) == (2048, 1800)
    training = config.training
    assert (training.batch_size, training.epochs, training.schedule) == (128, 1, "cosine")
    assert training.warmup_ratio == 0.1


def test_simpo_differs_from_gapo_in_nothing_but_the_margin():
    folder = CONFIGS[0].parent
    gapo, simpo = (
        load_config(folder / f"llama3-8b-{n}.yaml").model_dump() for n in ("gapo-rougel", "simpo")
    )
    assert gapo.pop("objective")["name"] != simpo.pop("objective")["name"]
    assert (gapo["margin"].pop("source"), simpo["margin"].pop("source")) == ("ef", "constant")
    assert gapo == simpo


def test_only_a_lexical_metric_is_given_the_tokenizer():
    config = parse_config({"ef": {"tokenizer": "unicode"}})
    assert config.ef.options() == {"use_stemmer": False, "tokenizer": "unicode"}
    assert parse_config({}).ef.options() == {"use_stemmer": False, "tokenizer": "rouge"}
    semantic = parse_config({"ef": {"metric": "bertscore_f1", "tokenizer": "unicode"}})
    assert set(semantic.ef.options()) == {"model", "layer", "batch_size"}


def test_all_problems_are_told_at_once_each_with_its_key_and_the_nearest_right_one():
    text = message_of(
        {"margin": {"gama": 1, "gamma": -1}, "modle": {}, "beta": 3, "training": {"epochs": True}},
        ["objective.name=ppo"],
    )
    assert "margin.gama: there is no such setting. Did you mean margin.gamma?" in text
    assert "modle: there is no such setting. Did you mean model?" in text
    assert "beta: there is no such setting. Did you mean objective.beta?" in text
    assert "margin.gamma: input should be greater than or equal to 0, but is -1" in text
    assert "training.epochs:" in text
    assert "objective.name: input should be 'gapo', 'simpo', 'dpo'" in text
    assert "but is 'ppo'" in text
    assert text.count("\n") == 6


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("margin.gamma=.nan", "finite number"),
        ("margin.gamma=.inf", "finite number"),
        ("margin.ef_floor=0", "greater than 0"),
        ("training.learning_rate=fast", "valid number"),
        ("training.batch_size=0", "greater than or equal to 1"),
        ("training.micro_batch_tokens=0", "greater than or equal to 1"),
        ("training.gradient_checkpointing=1.5", "less than or equal to 1"),
        ("training.gradient_checkpointing=all", "valid number"),
        ("lora.target_modules=[lm_head]", "never lm_head"),
        ("ef.metric=bleu", "rougeL"),
        ("gamma", "key=value"),
        ("=3", "key=value"),
        ("model.name.x=3", "not a section"),
        ("training.seed=-1", "greater than or equal to 0"),
        ("training=3", "training"),
    ],
)
def test_values_out_of_range_are_refused(override, says):
    assert says in message_of({"model": {"name": "x/y"}}, [override])


def test_overrides_are_yaml_and_leave_the_settings_alone():
    settings = {"margin": {"gamma": 0.1}}
    config = parse_config(
        settings, ["margin.gamma=0.5", "training.report_to=[wandb]", "training.learning_rate=1e-6"]
    )
    assert (config.margin.gamma, config.training.learning_rate) == (0.5, 1e-6)
    assert config.training.report_to == ["wandb"]
    assert settings == {"margin": {"gamma": 0.1}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no settings"),
        ("- a", "holds no settings"),
        ("margin: {gamma: 1", "not readable as YAML"),
        ("margin:\n  gamma: 1\n  gamma: 2\n", "'gamma' is given twice"),
        ("data: {source: 2026-13-45}", "not readable as YAML"),
        (f"seed: {'9' * 5000}", "not readable as YAML"),
        ("[" * 3000, "not readable as YAML: .*recursion"),
        ("? [a, b]\n: 1\n? [a, b]\n: 2\n", "not readable as YAML: .*unhashable key"),
        ("margin: !!python/object/apply:os.system ['true']", "not readable as YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_message(tmp_path, text, says):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_config(path)


def test_sections_may_be_merged_as_yaml_allows(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  <<: {source: a.jsonl, max_length: 300}\n  max_length: 200\n")
    config = load_config(path)
    assert (config.data.source, config.data.max_length) == ("a.jsonl", 200)


def test_what_was_merged_into_a_section_may_be_merged_again(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "x: &x {k: 1, m: 2}\ntemplates: {deep: {inner: &a {<<: *x, k: 5}}}\nb: {<<: *a, z: 1}\n"
    )
    assert read_yaml(path) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize("value", ["2026-02-30", "[" * 3000])
def test_an_override_that_yaml_cannot_read_is_text(value):
    assert parse_config({}, [f"data.source={value}"]).data.source == value


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "demo.yaml").write_text("model: {}")
    with pytest.raises(ConfigError, match=r"Did you mean .*demo\.yaml"):
        load_config(tmp_path / "dmo.yaml")


def test_a_resolved_configuration_reads_back_the_same(tmp_path):
    config = parse_config({}, ["margin.gamma=0.123456789012345", "training.learning_rate=1e-6"])
    (tmp_path / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


def test_every_setting_has_an_explanation():
    for name, section in RunConfig.model_fields.items():
        for key, field in section.annotation.model_fields.items():
            assert field.description, f"{name}.{key}"
    assert "training.learning_rate" in setting_keys()


def test_a_configuration_cannot_be_changed_after_it_was_checked():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().margin.gamma = 3


# -- what an objective has and has not --


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"objective": {"name": "kto"}, "margin": {"gamma": 0.3}}, "kto has no margin.gamma"),
        ({"objective": {"name": "ipo"}, "margin": {"source": "ef"}}, "ipo has no margin.source"),
        ({"objective": {"name": "dpo", "delta": 1}}, "dpo has no delta"),
        ({"objective": {"name": "slic", "beta": 1}}, "slic has no beta"),
        ({"objective": {"name": "gapo", "reference": "cached"}}, "gapo has no reference"),
        ({"margin": {"source": "constant"}}, "with a constant margin it is simpo"),
        ({"objective": {"name": "dpo", "beta": 0}}, "objective.beta"),
        ({"objective": {"name": "beta_dpo", "gap_momentum": 1}}, "objective.gap_momentum"),
        ({"data": {"rating_columns": ["a", "b", "c"]}}, "data.rating_columns"),
    ],
)
def test_what_an_objective_has_not_is_refused_and_not_passed_over(settings, says):
    assert says in message_of(settings)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_its_own_settings_and_they_are_written_and_read_again(name):
    config = parse_config({"objective": {"name": name}})
    spec, own = OBJECTIVES[name], config.objective.model_dump(exclude_none=True)
    assert own.keys() == {"name", *spec.parameters, *(["reference"] * spec.uses_reference)}
    assert (config.margin.source is None) == (not spec.takes_margin)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
    used = used_settings(config)
    assert {f"objective.{key}" for key in own} <= used <= set(setting_keys())
    assert ("margin.gamma" in used) == spec.takes_margin


def test_a_constant_margin_is_the_plain_method_but_for_simpo():
    gammas = {
        name: parse_config({"objective": {"name": name}, "margin": {"source": "constant"}})
        for name, spec in OBJECTIVES.items()
        if "constant" in spec.margins
    }
    assert {name: config.margin.gamma for name, config in gammas.items()} == {
        "simpo": 0.3, "dpo": 0, "cpo": 0, "rdpo": 0, "slic": 0, "dpop": 0, "beta_dpo": 0,
        "wpo": 0, "rso": 0,
    }  # fmt: skip


def test_problems_of_objective_and_margin_are_told_together():
    text = message_of({"objective": {"name": "dpo", "delta": 1}, "ef": {"metric": "bleu"}})
    assert "dpo has no delta" in text
    assert "ef.metric" in text
