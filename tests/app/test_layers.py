"""Who may import whom: the core nothing of the page, the page's services nothing of Gradio."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWS = {"notices.py", "theme.py", "ui.py", "__main__.py"}
HEAVY = ("torch", "transformers", "peft", "datasets", "pyarrow", "bitsandbytes")
OWN_PROCESS = {"worker.py", "chat_worker.py"}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "gapo_lite").rglob("*.py")), ids=lambda p: p.name)
def test_the_core_knows_nothing_of_the_page(path):
    assert not imported(path) & {"app", "gradio", "starlette", "fastapi"}


@pytest.mark.parametrize("path", sorted((ROOT / "app").glob("*.py")), ids=lambda p: p.name)
def test_only_what_is_shown_knows_gradio(path):
    assert "gradio" not in imported(path) or path.name in SHOWS


@pytest.mark.parametrize("path", sorted((ROOT / "app").rglob("*.py")), ids=lambda p: p.name)
def test_the_server_never_loads_a_model_library(path):
    assert not imported(path) & set(HEAVY) or path.name in OWN_PROCESS
