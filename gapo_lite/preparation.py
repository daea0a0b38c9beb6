"""From a configuration to pairs with margins and tokens: all that is done before a GPU is taken.

file → pairs → EF → margins → tokens
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from gapo_lite.batching import TokenizedPairs, tokenize_pairs
from gapo_lite.config import RunConfig
from gapo_lite.data import load_pairs, split_pairs
from gapo_lite.data.report import describe_problems
from gapo_lite.ef.cache import cached_scores
from gapo_lite.errors import ConfigError
from gapo_lite.margins import Margins, constant_margins, estimate_margins
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.progress import scoring_progress
from gapo_lite.types import LoadedPairs, PreferencePair

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Pairs of one split, scored and tokenised.

    Attributes:
        pairs: the pairs.
        ef: (N,) evaluation factors, unclamped; NaN for objectives without them.
        margins: their target margins.
        tokenized: what is left of them as tokens.
    """

    pairs: list[PreferencePair]
    ef: np.ndarray
    margins: Margins
    tokenized: TokenizedPairs


def prepare(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, show_progress: bool = False
) -> tuple[PreparedData, PreparedData | None, LoadedPairs]:
    """Loads, splits, scores and tokenises: (training data, held-out data or None, what the source
    held).

    Raises:
        GapoError: see `train`.
    """
    loaded, train_pairs, heldout_pairs = _load_and_split(config)
    with scoring_progress(config.ef.metric, show_progress) as progress:
        train_ef = _score(config, train_pairs, progress)
        heldout_ef = _score(config, heldout_pairs, progress)
    train_margins = _margins(config, train_ef, None)
    train_data = _tokenized(config, tokenizer, train_pairs, train_ef, train_margins)
    if not heldout_pairs:
        return train_data, None, loaded
    heldout_margins = _margins(config, heldout_ef, train_margins.mean_gap)
    return (
        train_data,
        _tokenized(config, tokenizer, heldout_pairs, heldout_ef, heldout_margins),
        loaded,
    )


def heldout_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """The held-out pairs of a configuration, with the margins that training gave them.

    Raises:
        ConfigError: it holds none out.
    """
    _, heldout, _ = prepare(config, tokenizer)
    if heldout is None:
        raise ConfigError(
            "this configuration holds no pairs out: set data.heldout_fraction or "
            "data.heldout_source."
        )
    return heldout


def _load_and_split(
    config: RunConfig,
) -> tuple[LoadedPairs, list[PreferencePair], list[PreferencePair]]:
    data = config.data
    loaded = load_pairs(data.source, split=data.split)
    if loaded.problems:
        logger.warning("%s", describe_problems(loaded))
    if data.heldout_source:
        train_pairs = loaded.pairs
        heldout_pairs = load_pairs(data.heldout_source, split=data.heldout_split).pairs
        _warn_of_shared_prompts(train_pairs, heldout_pairs)
    else:
        train_pairs, heldout_pairs = split_pairs(
            loaded.pairs, heldout_fraction=data.heldout_fraction, seed=data.split_seed
        )
    return loaded, train_pairs[: data.max_pairs], heldout_pairs


def _warn_of_shared_prompts(
    train_pairs: list[PreferencePair], heldout_pairs: list[PreferencePair]
) -> None:
    trained = {str(pair.prompt) for pair in train_pairs}
    shared = sum(str(pair.prompt) in trained for pair in heldout_pairs)
    if shared:
        logger.warning(
            "%d of %d held-out pairs have a prompt that is also trained on: their scores flatter "
            "the model.",
            shared,
            len(heldout_pairs),
        )


def _score(config: RunConfig, pairs: list[PreferencePair], progress: Any) -> np.ndarray:
    if OBJECTIVES[config.objective.name].takes_margin == "constant" or not pairs:
        return np.full(len(pairs), np.nan)
    chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
    return cached_scores(chosen, rejected, config.ef.metric, config.ef.options(), progress)


def _margins(config: RunConfig, ef: np.ndarray, mean_gap: float | None) -> Margins:
    if OBJECTIVES[config.objective.name].takes_margin == "constant":
        return constant_margins(len(ef), config.margin.gamma)
    return estimate_margins(ef, **config.margin.model_dump(), mean_gap=mean_gap)


def _tokenized(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[PreferencePair],
    ef: np.ndarray,
    margins: Margins,
) -> PreparedData:
    tokenized = tokenize_pairs(
        pairs,
        margins.values,
        tokenizer,
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
    )
    return PreparedData(pairs, ef, margins, tokenized)
