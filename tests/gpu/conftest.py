"""These tests need a GPU: a real one, or the one that tests/hostcuda emulates (`make test-gpu`)."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    reason = os.environ.get("HOSTCUDA_UNAVAILABLE", "`make test-gpu` runs it on an emulated one")
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.skip(reason=f"there is no NVIDIA GPU: {reason}"))
