"""`gapo-lite …` as a test calls it."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from gapo_lite.cli import app


def call(*arguments):
    """The outcome of `gapo-lite …`: .exit_code, .stdout, .stderr, .exception."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(result, *says):
    """One message on stderr with all of `says`, exit code 2, nothing on stdout, no traceback."""
    assert result.exit_code == 2, result.stderr
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    for text in says:
        assert text in result.stderr
    assert result.stdout == ""


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
