"""GaPO-Lite: Gap-Aware Preference Optimization on one GPU.

The public names are imported when first asked for, so that `import gapo_lite` (and `gapo-lite
--help`) stays quick and does not import torch.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
from typing import Any

__version__ = "0.1.0"

# Before bitsandbytes is imported: it notes the lack of a CPU kernel that training does not use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Before torch is imported: with passes of many lengths its allocator of GPU memory reserves 2 %
# more than is used instead of 8 %. A person's own setting wins, under either of its names. Not
# under WSL2, where drivers before R615 fail with the first allocation (pytorch#192330).
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and "microsoft" not in platform.release().lower():
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

_PUBLIC = {
    "GapoTrainer": "gapo_lite.trainer",
    "RunConfig": "gapo_lite.config",
    "estimate_margins": "gapo_lite.margins",
    "gapo_loss": "gapo_lite.objectives",
    "load_config": "gapo_lite.config",
    "load_pairs": "gapo_lite.data",
    "score_pairs": "gapo_lite.ef",
    "train": "gapo_lite.training",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
