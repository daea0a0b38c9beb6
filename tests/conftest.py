"""What several test files share. Nothing here needs a network."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub: no test may reach out
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tests run side by side; tiny models gain nothing from threads

import pytest
from checkout import REAL_DATA, ROOT
from tiny_models import save_llama, short_settings

pytest.register_assert_rewrite("browsing", "commands", "forging", "liger_parity", "sweeping")


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


# Tests unpack the embedded model into a cache of the checkout's own, never into the user's.
os.environ.setdefault("GAPO_LITE_CACHE", str(ROOT / ".pytest_cache" / "gapo-lite"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama (float32) with the embedded model's tokenizer and chat
    template."""
    from gapo_lite.model import load_tokenizer

    tokenizer = load_tokenizer("embedded:smollm2-135m-instruct")
    return save_llama(
        tmp_path_factory.mktemp("models") / "tiny",
        tokenizer,
        head_dim=16,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
    )


@pytest.fixture(scope="session")
def tiny_settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Settings of a 12-step run of the tiny model in float32."""
    settings = short_settings(tiny_model, tmp_path_factory.mktemp("pairs"))
    settings["model"]["precision"] = "float32"
    return settings
