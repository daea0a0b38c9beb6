"""The page as a user starts it: a server process of its own, and headless Chromium.

Tests of the page are skipped, visibly, only where there is no Chromium (`make test` installs
Debian's where it can).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Server, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """A server for a module's tests; local models are those beside the tiny one."""
    with serving(tmp_path_factory.mktemp("page"), tiny_model.parent) as served:
        yield served


@pytest.fixture(scope="session")
def chromium():
    """A headless browser, with no network but this machine's."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
