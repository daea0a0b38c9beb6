"""Settings as a person writes them: a YAML file, `key=value` over it, and what is wrong with them
in words. Knows no schema."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gapo_lite.errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        ConfigError: it is missing, empty or not YAML.
    """
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1
        )
        hint = f" Did you mean {path.with_name(near[0])}?" if near else " Recipes lie in configs/."
        raise ConfigError(f"there is no configuration file {path}.{hint}")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path} is not readable as YAML: {reason}") from None
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{path} holds no settings: expected sections such as `model:` and `training:`."
        )
    return settings


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Puts the value of `key=value` (a dotted key, a YAML value) into nested settings.

    Raises:
        ConfigError: it is not of that form, or a part of the key is a value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: write key=value, for example margin.gamma=0.5.")
    try:
        value = yaml.safe_load(text)
    except _UNREADABLE:
        value = text
    *parents, last = key.strip().split(".")
    for parent in parents:
        below = settings.setdefault(parent, {})
        if below is None:
            below = settings[parent] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section.")
        settings = below
    settings[last] = value


def describe_invalid(error: ValidationError, known: Sequence[str]) -> str:
    """Every problem of some settings, a line each; `known` are the keys that there are."""
    lines = [f"  {_describe(problem, known)}" for problem in error.errors()]
    noun = "setting is" if len(lines) == 1 else f"{len(lines)} settings are"
    return f"{noun} not usable.\n" + "\n".join(lines)


_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises: dates such as 2026-13-45 and numbers of 5,000 digits are its ValueErrors,
thousands of open brackets a RecursionError."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (PyYAML would silently keep the last)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = sorted(name for name, count in names.items() if count > 1)
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]!r} is given twice", node.start_mark
            )
        return node


def _describe(problem: Any, known: Sequence[str]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{key}: there is no such setting.{_nearest(key, known)}"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], dict) else f", but is {problem['input']!r}"
    return f"{key}: {message[0].lower()}{message[1:]}{given}"


def _nearest(key: str, known: Sequence[str]) -> str:
    section, _, last = key.rpartition(".")
    same_section = [k for k in known if k.rpartition(".")[0] == section]
    by_name = {k.rpartition(".")[2]: k for k in known}
    near = (
        difflib.get_close_matches(key, same_section, n=1, cutoff=0.7)
        or [
            by_name[name]
            for name in difflib.get_close_matches(last, list(by_name), n=1, cutoff=0.7)
        ]
        or difflib.get_close_matches(key, {k.partition(".")[0] for k in known}, n=1)
    )
    return f" Did you mean {near[0]}?" if near else ""
