"""From a configuration to pairs with margins and tokens: all that is done before a GPU is taken.

file → pairs → EF → margins → tokens
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from gapo_lite.batching import TokenizedPairs, tokenize_pairs
from gapo_lite.config import RunConfig
from gapo_lite.data import load_pairs, split_pairs
from gapo_lite.data.report import describe_problems
from gapo_lite.ef import EVALUATION_FACTORS, find_unseen
from gapo_lite.ef.cache import cached_scores
from gapo_lite.errors import ConfigError
from gapo_lite.margins import Margins, constant_margins, estimate_margins, rating_margins
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.progress import scoring_progress
from gapo_lite.types import LoadedPairs, PreferencePair, TokenizedPair

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class PreparedData:
    """The pairs of one split that have a token to score, N of them, in order.

    Attributes:
        pairs: N pairs.
        ef: (N,) evaluation factors, unclamped; NaN where the margin is made without them.
        margins: (N,) target margins and what is known of them.
        tokenized: the pairs as tokens, and what was cut or dropped.
    """

    pairs: list[PreferencePair]
    ef: np.ndarray
    margins: Margins
    tokenized: TokenizedPairs


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a configuration's data came to.

    Attributes:
        train: what is learned from.
        heldout: what is evaluated on, None where nothing is held out.
        loaded: what the source held.
        notes: what a person should know of the data, a sentence each.
    """

    train: PreparedData
    heldout: PreparedData | None
    loaded: LoadedPairs
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Shared:
    """What several configurations have in common: pairs and their tokens, made once.

    Evaluation factors and the reference's log-probabilities are kept on disk for all anyway.
    """

    _made: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gave for this key the first time."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def prepare(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    show_progress: bool = False,
    shared: Shared | None = None,
) -> Prepared:
    """Loads, splits, scores and tokenises.

    Args:
        config: the settings.
        tokenizer: the model's.
        show_progress: a bar while pairs are scored.
        shared: what was made for other configurations in this process, and is to be kept for more.

    Raises:
        GapoError: data or settings cannot be used.
    """
    shared = shared or Shared()
    loaded, train_pairs, heldout_pairs, notes = split_once(config, shared)
    notes = list(notes)
    with scoring_progress(config.ef.metric, show_progress) as progress:
        train_ef = _score(config, train_pairs, progress, notes)
        heldout_ef = _score(config, heldout_pairs, progress, notes)
    tokens = [
        shared.once(
            (side, config.model.name, config.model.revision, config.data.model_dump_json()),
            partial(_tokens, config, tokenizer, pairs),
        )
        for side, pairs in (("train", train_pairs), ("heldout", heldout_pairs))
        if pairs
    ]
    train = _split_data(config, train_pairs, tokens[0], train_ef, None)
    heldout = None
    if heldout_pairs:
        mean_gap = train.margins.mean_gap
        heldout = _split_data(config, heldout_pairs, tokens[1], heldout_ef, mean_gap)
    notes += [_about_margins(config, train), *_about_lengths(train, heldout)]
    return Prepared(train, heldout, loaded, notes)


def split_once(
    config: RunConfig, shared: Shared
) -> tuple[LoadedPairs, list[PreferencePair], list[PreferencePair], list[str]]:
    """`load_and_split` and its notes, once for all configurations with the same data."""

    def make() -> tuple[LoadedPairs, list[PreferencePair], list[PreferencePair], list[str]]:
        notes: list[str] = []
        return (*load_and_split(config, notes), notes)

    return shared.once(("pairs", config.data.model_dump_json()), make)


def heldout_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """The held-out pairs of a configuration, with the margins that training gave them.

    Raises:
        ConfigError: it holds none out.
    """
    heldout = prepare(config, tokenizer).heldout
    if heldout is None:
        raise ConfigError(
            "this configuration holds no pairs out: set data.heldout_fraction or "
            "data.heldout_source."
        )
    return heldout


def load_and_split(
    config: RunConfig, notes: list[str]
) -> tuple[LoadedPairs, list[PreferencePair], list[PreferencePair]]:
    """What the sources hold, and the pairs to train on and to hold out; adds to `notes` what a
    person should know of them.

    Raises:
        DataError: they cannot be used.
    """
    data = config.data
    loaded = _load(config, data.source, data.split, notes)
    if data.heldout_source:
        train_pairs = loaded.pairs[: data.max_pairs]
        heldout_pairs = _load(config, data.heldout_source, data.heldout_split, notes).pairs
        trained = {str(pair.prompt) for pair in train_pairs}
        shared = sum(str(pair.prompt) in trained for pair in heldout_pairs)
        if shared:
            notes.append(
                f"{shared} of {len(heldout_pairs)} held-out pairs have a prompt that is also "
                "trained on: their scores flatter the model."
            )
        return loaded, train_pairs, heldout_pairs
    train_pairs, heldout_pairs = split_pairs(
        loaded.pairs, heldout_fraction=data.heldout_fraction, seed=data.split_seed
    )
    return loaded, train_pairs[: data.max_pairs], heldout_pairs


def _load(config: RunConfig, source: str, split: str, notes: list[str]) -> LoadedPairs:
    loaded = load_pairs(source, split=split, rating_columns=config.data.rating_columns)
    if loaded.problems:
        notes.append(describe_problems(loaded))
    return loaded


def _score(
    config: RunConfig, pairs: list[PreferencePair], progress: Any, notes: list[str]
) -> np.ndarray:
    if config.margin.source != "ef" or not pairs:
        return np.full(len(pairs), np.nan)
    chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
    if EVALUATION_FACTORS[config.ef.metric].family == "lexical":
        unseen = find_unseen(chosen, rejected, config.ef.tokenizer)
        remedy = "ef.tokenizer: unicode, or ef.metric: bertscore_f1 with a multilingual encoder"
        if warning := unseen.warning(config.ef.metric, remedy):
            notes.append(warning)
    return cached_scores(chosen, rejected, config.ef.metric, config.ef.options(), progress)


def _tokens(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, pairs: list[PreferencePair]
) -> TokenizedPairs:
    limits = config.data.model_dump(include={"max_length", "max_prompt_length"})
    return tokenize_pairs(pairs, tokenizer, **limits)


def _split_data(
    config: RunConfig,
    pairs: list[PreferencePair],
    tokenized: TokenizedPairs,
    ef: np.ndarray,
    mean_gap: float | None,
) -> PreparedData:
    """After the tokens, so that pairs without room for a scored token don't count in the mean
    gap."""
    ef = ef[tokenized.indices]
    kept = [pairs[index] for index in tokenized.indices]
    margins = _margins(config, ef, kept, mean_gap)
    ready = [
        replace(pair, margin=float(margin))
        for pair, margin in zip(tokenized.pairs, margins.values, strict=True)
    ]
    if OBJECTIVES[config.objective.name].statistic == "kl":
        ready = _with_mismatched(ready, config.data.max_length)
    return PreparedData(kept, ef, margins, replace(tokenized, pairs=ready))


def _margins(
    config: RunConfig, ef: np.ndarray, pairs: list[PreferencePair], mean_gap: float | None
) -> Margins:
    margin = config.margin
    how = margin.model_dump(exclude={"source"})
    if margin.source == "ef":
        return estimate_margins(ef, **how, mean_gap=mean_gap)
    if margin.source == "rating":
        gaps = np.array([pair.rating_gap for pair in pairs])
        how = margin.model_dump(include={"normalization", "gamma"})
        return rating_margins(gaps, **how, mean_gap=mean_gap)
    return constant_margins(len(ef), margin.gamma or 0.0)


def _with_mismatched(pairs: list[TokenizedPair], max_length: int) -> list[TokenizedPair]:
    """Each with the responses of the next one to its own prompt, cut to what there is room for."""
    following = [*pairs[1:], pairs[0]]
    return [
        replace(pair, mismatched=_mismatched(pair, other, max_length - len(pair.prompt_ids)))
        for pair, other in zip(pairs, following, strict=True)
    ]


def _mismatched(pair: TokenizedPair, other: TokenizedPair, room: int) -> TokenizedPair:
    return TokenizedPair(
        pair.prompt_ids, other.chosen_ids[:room], other.rejected_ids[:room], margin=0.0
    )


def _about_margins(config: RunConfig, train: PreparedData) -> str:
    margins, margin, mean = train.margins, config.margin, float(train.margins.values.mean())
    count = f"{len(train.pairs)} training pairs"
    if margin.source is None:
        return f"{count}; {config.objective.name} has no target margin."
    beta = "" if config.objective.beta is None else f", β = {config.objective.beta:g}"
    text = (
        f"{count}. γ = {margin.gamma:g}{beta}: average target margin {mean:.4g}, in reward units "
        f"{mean * config.objective.reward_scale:.4g}"
    )
    if margin.source == "constant":
        return f"{text}, the same for all pairs."
    if margin.source == "rating":
        unrated = sum(np.isnan(pair.rating_gap) for pair in train.pairs)
        return (
            f"{text} (differences of ratings, {margin.normalization}); {unrated} pairs without "
            f"ratings have the average margin, {margins.num_negative} a negative one."
        )
    return (
        f"{text} ({config.ef.metric}, {margin.mapping}, {margin.normalization}); "
        f"{margins.num_floored} pairs raised to the EF floor {margin.ef_floor:g}, "
        f"{margins.num_equal} with EF = 1, {margins.num_negative} with a negative margin."
    )


def _about_lengths(train: PreparedData, heldout: PreparedData | None) -> list[str]:
    notes = []
    for name, data in (("training", train), ("held-out", heldout)):
        if data is None:
            continue
        tokens = data.tokenized
        counts = (tokens.num_prompts_truncated, tokens.num_responses_truncated, tokens.num_dropped)
        if any(counts):
            notes.append(
                f"Of the {name} pairs, {counts[0]} had their prompt shortened, {counts[1]} a "
                f"response cut, and {counts[2]} were dropped for want of room."
            )
    return notes
