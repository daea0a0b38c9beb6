"""Who may import whom: the core nothing of the page, the page's services nothing of Gradio."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from checkout import ROOT

CORE = sorted((ROOT / "gapo_lite").rglob("*.py"))
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


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.name)
def test_the_core_knows_nothing_of_the_page(path):
    assert not imported(path) & {"app", "gradio", "starlette", "fastapi"}


@pytest.mark.parametrize("path", sorted((ROOT / "app").glob("*.py")), ids=lambda p: p.name)
def test_only_what_is_shown_knows_gradio(path):
    assert "gradio" not in imported(path) or path.name in SHOWS


@pytest.mark.parametrize("path", sorted((ROOT / "app").rglob("*.py")), ids=lambda p: p.name)
def test_the_server_never_loads_a_model_library(path):
    assert not imported(path) & set(HEAVY) or path.name in OWN_PROCESS


def test_no_file_of_the_core_imports_one_further_down_the_readme_s_map():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    core = readme.partition("    gapo_lite/ ")[2].partition("\n    app/")[0]
    order = re.findall(r"^      (\w+)(?:\.py|/) ", core, re.MULTILINE)
    modules = {path.relative_to(ROOT / "gapo_lite"): path for path in CORE}
    assert {path.parts[0].removesuffix(".py") for path in modules} == set(order)
    for relative, path in modules.items():
        own = order.index(relative.parts[0].removesuffix(".py"))
        later = imported_modules(path) & set(order[own + 1 :])
        assert not later, f"{relative} imports {later}"


def imported_modules(path: Path) -> set[str]:
    """Parts of the core that a file imports, but for its annotations."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {
        name
        for node in froms
        if (node.module or "").partition(".")[0] == "gapo_lite"
        for name in (
            [node.module.split(".")[1]] if "." in node.module else [a.name for a in node.names]
        )
    }
