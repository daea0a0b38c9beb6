"""README says what is true: its Python runs, its map is complete, its commands exist."""

from __future__ import annotations

import contextlib
import io
import re
import tomllib

import pytest
from checkout import ROOT
from packaging.requirements import Requirement

from gapo_lite.cli import app

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_python_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    lines = out.getvalue().splitlines()
    assert lines[0] == "264 pairs, 0 rows that cannot be used"
    assert lines[1].startswith("mean target margin 0.300")
    assert lines[2].startswith("finished 0.")


def test_the_file_map_names_every_module_and_nothing_else():
    named = set(re.findall(r"^ {4}(?: {2})?([\w/.-]+\.py|[\w-]+/)(?= )", README, re.MULTILINE))
    packages = ("gapo_lite", "app")
    there = {path.name for package in packages for path in (ROOT / package).glob("*.py")}
    there -= {"__init__.py"} - named  # the page's says nothing but its name
    there |= {"data/", "ef/", "tabs/", "static/"}
    there |= {"configs/", "benchmarks/", "tests/", "gapo_lite/", "app/"}
    assert named == there


def test_the_commands_of_the_map_exist():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    told = set(re.findall(r"gapo-lite (\w+)", README))
    assert told <= commands
    assert {"train", "score", "evaluate", "chat", "export", "doctor"} <= told


def test_readme_opens_with_the_two_commands():
    indented = [
        line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    ")
    ]
    assert indented[:2] == ["make run", "make test"]


def test_every_pinned_version_lies_in_the_range_that_the_package_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {r.name.lower(): r.specifier for r in map(Requirement, project["dependencies"])}
    for file, older in (("requirements.txt", False), ("requirements-unsloth.txt", True)):
        lines = (ROOT / file).read_text().splitlines()
        pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
        names = {pin.name.lower() for pin in pins}
        assert names >= ranges.keys() - ({"unsloth"} if older else set())
        for pin in pins:
            (clause,) = pin.specifier
            if clause.operator == "==" and pin.name.lower() in ranges:
                assert clause.version in ranges[pin.name.lower()], f"{file}: {pin}"
