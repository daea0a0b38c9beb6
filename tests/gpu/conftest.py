"""These tests need a GPU: a real one, or the one that tests/hostcuda emulates (`make test-gpu`)."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    is_emulated = "hostcuda" in os.environ.get("PYTHONPATH", "")
    reason = os.environ.get("HOSTCUDA_UNAVAILABLE", "`make test-gpu` runs it on an emulated one")
    if is_emulated and "HOSTCUDA_UNAVAILABLE" not in os.environ:
        pytest.exit("the emulated GPU is broken: see the first lines of the output", returncode=1)
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.skip(reason=f"there is no NVIDIA GPU: {reason}"))
