"""What a sweep tries, and every way of getting it wrong. Nothing is trained."""

from __future__ import annotations

import textwrap
from datetime import date
from pathlib import Path

import pytest
import yaml
from checkout import ROOT

from gapo_lite.config import load_config
from gapo_lite.errors import ConfigError
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.sweep_config import (
    cells_of,
    contenders,
    load_begun,
    load_sweep,
    parse_sweep,
    to_yaml,
)

RECIPES = ROOT / "configs"
SWEEPS = sorted((RECIPES / "sweeps").glob("*.yaml"))
BASE = {"model": {"name": "embedded:smollm2-135m-instruct"}}


def refusal(**given: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_sweep({"base": BASE, **given})
    return str(caught.value)


def names(**given: object) -> list[str]:
    return [one.name for one in contenders(parse_sweep({"base": BASE, **given}))]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_recipe_loads_and_opens_with_its_purpose_and_command(path: Path) -> None:
    sweep = load_sweep(path)
    assert path.stem == "gamma_beta" or sweep.baseline
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"gapo-lite sweep configs/sweeps/{path.name}" in text


def test_the_example_of_the_docs_is_a_sweep() -> None:
    text = (RECIPES.parent / "docs" / "sweeps.md").read_text(encoding="utf-8")
    lines = text.partition("## The file")[2].partition("A *contender*")[0]
    given = yaml.safe_load(textwrap.dedent(lines))
    assert len(contenders(parse_sweep({**given, "base": BASE}))) == 4


def test_the_recipes_are_the_issue_s_and_each_table_has_its_rows() -> None:
    found = {path.stem: contenders(load_sweep(path)) for path in SWEEPS}
    assert set(found) == {
        *("demo", "gamma_beta", "objectives", "results", "table3", "table4", "tuning")
    }
    metrics = {one.config.ef.metric for one in found["table3"] if one.name != "simpo"}
    assert len(metrics) == 7
    assert {one.config.objective.name for one in found["objectives"]} == set(OBJECTIVES)
    how = {(one.config.margin.mapping, one.config.margin.normalization) for one in found["table4"]}
    assert how == {
        *(("linear", "scale"), ("square", "scale"), ("sqrt", "scale")),
        *(("log", "none"), ("log", "shift"), ("log", "scale")),
    }
    # docs/results.md: all objectives and EFs of one, mappings and normalisations of the other
    assert [one.name for one in found["results"]][:2] == ["simpo", "dpo"]
    assert {one.config.ef.metric for one in found["results"][2:]} == metrics
    assert len(found["results"]) == 9
    (rouge,) = [one.config for one in found["results"] if one.name == "rougeL"]
    tuned = [one.config for one in found["tuning"]]
    settings = [(one.margin.mapping, one.margin.normalization) for one in [rouge, *tuned]]
    assert set(settings) == how
    assert len(tuned) == 11
    assert {one.objective.name for one in tuned} == {"gapo"}


def test_objectives_of_a_sweep_have_their_own_defaults_not_the_base_s() -> None:
    for one in contenders(load_sweep(RECIPES / "sweeps" / "objectives.yaml")):
        own = OBJECTIVES[one.config.objective.name].parameters
        if one.name not in ("gapo", "simpo"):
            assert one.config.objective.beta == own.get("beta"), one.name


def test_a_grid_is_every_combination_and_goes_over_variants() -> None:
    variants = [{"name": "a"}, {"name": "b", "settings": {"ef.metric": "rouge1"}}]
    grid = {"margin.gamma": [0.1, 0.3], "objective.beta": [2, 10]}
    assert names(grid=grid) == [
        *("gamma-0.1-beta-2", "gamma-0.1-beta-10", "gamma-0.3-beta-2", "gamma-0.3-beta-10"),
    ]
    assert names(variants=variants, grid={"margin.gamma": [0.1, 1]}) == [
        *("a-gamma-0.1", "a-gamma-1", "b-gamma-0.1", "b-gamma-1"),
    ]
    assert names() == ["base"]


def test_values_of_any_kind_become_names() -> None:
    grid = {"training.max_steps": [None, 3], "lora.target_modules": [["q_proj", "v_proj"]]}
    assert names(grid=grid) == [
        "max_steps-null-target_modules-q-proj-v-proj",
        "max_steps-3-target_modules-q-proj-v-proj",
    ]


def test_cells_come_seed_by_seed_so_that_a_short_budget_compares_all() -> None:
    sweep = parse_sweep({"base": BASE, "grid": {"margin.gamma": [0.1, 0.3]}, "seeds": [7, 8]})
    cells = cells_of(sweep, "s")
    assert [cell.run for cell in cells] == [
        *("s-gamma-0.1-s7", "s-gamma-0.3-s7", "s-gamma-0.1-s8", "s-gamma-0.3-s8"),
    ]
    assert [cell.config.training.seed for cell in cells] == [7, 7, 8, 8]
    assert [cell.config.margin.gamma for cell in cells] == [0.1, 0.3, 0.1, 0.3]


def test_a_sweep_written_out_is_the_same_sweep(tmp_path: Path) -> None:
    sweep = load_sweep(RECIPES / "sweeps" / "demo.yaml")
    (tmp_path / "sweep.yaml").write_text(to_yaml(sweep), encoding="utf-8")
    again = load_sweep(tmp_path / "sweep.yaml")
    assert again == sweep
    assert cells_of(again, "x") == cells_of(sweep, "x")
    assert cells_of(sweep, "x")[1].config == load_config(RECIPES / "demo.yaml")


def test_overrides_reach_the_sweep_and_its_runs() -> None:
    path = RECIPES / "sweeps" / "table3.yaml"
    overrides = ["base=../demo.yaml", "seeds=[1]", "answers.prompts=3", "training.max_steps=9"]
    sweep = load_sweep(path, overrides)
    assert sweep.seeds == [1]
    assert sweep.answers is not None
    assert sweep.answers.prompts == 3
    configs = [cell.config for cell in cells_of(sweep, "s")]
    assert {config.training.max_steps for config in configs} == {9}
    assert {config.model.name for config in configs} == {"embedded:smollm2-135m-instruct"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"grid": {"margin.gama": [1]}}, ["contender gama-1", "Did you mean margin.gamma?"]),
        ({"grid": {"margin.gamma": [-1, 0.1, -2]}}, ["gamma--1", "gamma--2", "greater than"]),
        ({"grid": {"margin.gamma": []}}, ["no values for margin.gamma"]),
        ({"grid": {"training.seed": [1]}}, ["seeds go under `seeds`"]),
        ({"grid": {"margin.gamma": [1]}, "settings": {"margin.gamma": 2}}, ["cannot be in the"]),
        ({"seeds": []}, ["seeds"]),
        ({"seeds": [1, 1]}, ["names a seed twice"]),
        ({"sedes": [1]}, ["sedes: there is no such setting. Did you mean seeds?"]),
        ({"hours": 0}, ["hours"]),
        ({"hours": True}, ["hours"]),
        ({"variants": [{"name": "../up"}]}, ["name", "letters"]),
        ({"variants": [{"name": "a"}, {"name": "a", "settings": {"margin.gamma": 1}}]}, ["called"]),
        ({"variants": [{"name": "a"}, {"name": "b"}]}, ["a and b have the same settings"]),
        ({"baseline": "simpo"}, ["no contender", "base"]),
        ({"decile_metric": "rouge9"}, ["must be one of jaccard"]),
        ({"halving": {"first_steps": 0}}, ["halving.first_steps"]),
        ({"grid": {"margin.gamma": list(range(2000))}}, ["6,000 runs"]),
        ({"settings": {"training.seed": 7}}, ["cannot be in settings", "seeds go under `seeds`"]),
        (
            {"variants": [{"name": n, "settings": {"training.seed": 7}} for n in "ab"]},
            ["cannot be in the variant a, the variant b: seeds go under"],
        ),
        (
            {"halving": {"first_steps": 60}, "settings": {"training.max_steps": 16}},
            ["halving.first_steps is 60, but no run has more than 16 steps"],
        ),
        (  # 2 passes over ⌈100 / 16⌉ = 7 steps
            {
                "halving": {"first_steps": 14},
                "grid": {"training.epochs": [1, 2.0]},
                "settings": {"data.max_pairs": 100, "training.batch_size": 16},
            },
            ["no run has more than 14 steps"],
        ),
        (
            {"settings": {"margin.gama": 1}, "grid": {"lora.rank": [1, 2, 3, 4]}},
            ["contenders rank-1, rank-2, rank-3 and 1 more: settings"],
        ),
        ({"grid": {"ef.bertscore_model": ["x" * 80]}}, ["Give variants a name"]),
        ({"base": "demo.yaml"}, ["was not read"]),
    ],
)
def test_mistakes_are_told_in_words(given: dict, says: list[str]) -> None:
    message = refusal(**given)
    for words in says:
        assert words in message


def test_settings_that_one_contender_has_no_use_for_do_not_make_it_another() -> None:
    """γ means nothing to KTO, so two of them would be one."""
    grid = {"ef.metric": ["rouge1", "rougeL"]}
    settings = {"objective.name": "simpo"}
    assert "same settings" in refusal(settings=settings, grid=grid)


def test_a_missing_base_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"base": "nowhere.yaml"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="there is no configuration file .*nowhere.yaml"):
        load_sweep(path)


def test_a_sweep_that_holds_nothing_out_is_refused_before_anything_is_trained() -> None:
    says = refusal(settings={"data.heldout_fraction": 0})
    assert "contender base: it holds no pairs out" in says
    assert "data.heldout_fraction" in says
    assert names(settings={"data.heldout_fraction": 0, "data.heldout_source": "x.jsonl"})


def test_every_seed_is_checked_not_only_the_first() -> None:
    assert "seeds.1" in refusal(seeds=[1, -5])
    assert "seeds.1" in refusal(seeds=[1, 2**32])


@pytest.mark.parametrize(
    "value",
    [date(2026, 1, 31), b"x", {1, 2}, float("nan"), 10**5000],
    ids=lambda v: type(v).__name__,
)
def test_values_that_are_no_settings_are_told_with_their_key(value: object) -> None:
    assert "data.source" in refusal(grid={"data.source": [value]})
    assert "data.source" in refusal(settings={"data.source": value})
    assert "data.source" in refusal(variants=[{"name": "a", "settings": {"data.source": value}}])


def test_a_whole_section_is_refused_as_the_base_s_other_settings_would_be_lost() -> None:
    says = refusal(settings={"training": {"max_steps": 4}})
    assert "training.NAME" in says


@pytest.mark.parametrize("source", ["pairs 😀.jsonl", "yes", "1e5", "~", "# x", "a: b", "a\u2028b"])
def test_text_reaches_the_runs_as_it_was_written(source: str) -> None:
    (one,) = contenders(parse_sweep({"base": BASE, "settings": {"data.source": source}}))
    assert one.config.data.source == source


def test_overrides_of_settings_that_are_no_settings_are_told(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("base: {}\nsettings: 5\n")
    with pytest.raises(ConfigError, match="settings"):
        load_sweep(tmp_path / "s.yaml", ["training.max_steps=3"])


def test_halving_is_refused_only_where_it_could_drop_nobody() -> None:
    halving = {"first_steps": 8}
    assert names(halving=halving)  # how many steps there are depends on the data
    assert names(halving=halving, grid={"training.max_steps": [4, 16]})


def test_a_sweep_that_would_not_be_begun_now_can_still_be_read(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    given = {"base": BASE, "settings": {"training.seed": 7, "training.max_steps": 4}}
    path.write_text(yaml.safe_dump({**given, "halving": {"first_steps": 8}}))
    assert load_begun(path).halving
    with pytest.raises(ConfigError, match=r"training\.seed"):
        load_sweep(path)


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    """A sweep of three contenders, two of which set their own learning rate."""
    path = tmp_path / "s.yaml"
    variants = [
        {"name": "low", "settings": {"training.learning_rate": 1e-5}},
        {"name": "high", "settings": {"training.learning_rate": 3e-5}},
        {"name": "other", "settings": {"margin": {}}},
    ]
    path.write_text(yaml.safe_dump({"base": BASE, "variants": variants}))
    return path


def test_an_override_that_variants_would_undo_is_refused_with_their_names(rates: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set training\.learning_rate .*: low, high\."):
        load_sweep(rates, ["training.learning_rate=3e-4"])
    with pytest.raises(ConfigError, match=r"--set margin\.gamma .*: other\."):
        load_sweep(rates, ["margin.gamma=0.5"])
    assert load_sweep(rates, ["training.max_steps=3"])


def test_an_override_s_seed_is_refused(rates: Path) -> None:
    with pytest.raises(ConfigError, match="seeds go under `seeds`"):
        load_sweep(rates, ["training.seed=7"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("nope=3", "nope: there is no such setting."),
        ("sedes=[1]", "Did you mean seeds?"),
        ("margin.gama=1", "Did you mean margin.gamma?"),
        ("margin=1", "margin"),
    ],
)
def test_an_override_of_no_setting_is_told_once(rates: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep(rates, [override])
    message = str(caught.value)
    assert message.startswith(f"--set {override}: ")
    assert says in message
    assert message.count(override.partition("=")[0] + ":") == 1
    assert "contender" not in message


def test_a_run_s_configuration_is_no_sweep_and_the_reverse() -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep(RECIPES / "demo.yaml")
    assert str(caught.value).endswith(f"gapo-lite train {RECIPES / 'demo.yaml'}")
    with pytest.raises(ConfigError) as caught:
        load_config(RECIPES / "sweeps" / "demo.yaml")
    assert str(caught.value).endswith(f"gapo-lite sweep {RECIPES / 'sweeps' / 'demo.yaml'}")
    assert "\n" not in str(caught.value)
