"""What several test files share. Nothing here needs a network."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub: no test may reach out
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"


def read_real_rows(name: str) -> list[dict]:
    """Rows of one of the real files beside the checkout; skips the test where they are not."""
    path = REAL_DATA / name
    if not path.is_file():
        pytest.skip(f"real preference pairs are not on this machine: {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def real_rows() -> list[dict]:
    """All 3,101 real pairs (CC BY-NC: never copied into the project)."""
    return read_real_rows("alpaca_pairs_train.jsonl.gz") + read_real_rows(
        "alpaca_pairs_test.jsonl.gz"
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test session scores into a cache of its own, never into the user's."""
    monkeypatch.setenv("GAPO_LITE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
