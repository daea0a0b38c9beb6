"""Evaluation factors: how alike the chosen and the rejected response of a pair are, in [0, 1].

    score_pairs(["the cat sat"], ["the cat ran"], "rougeL")    # array([0.66666667])

1 is the same text (by what the factor looks at), 0 nothing in common. The factors are those of the
paper's Table 1. Importing this module does not import torch; the BERTScore factors do when called.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapo_lite.ef.lexical import lexical_scores
from gapo_lite.ef.words import TOKENIZERS, Unseen, count_unseen, find_unseen, share_unseen
from gapo_lite.errors import ConfigError, DataError

__all__ = [
    "EVALUATION_FACTORS",
    "EvaluationFactor",
    "Unseen",
    "check_options",
    "check_pairs",
    "count_unseen",
    "find_unseen",
    "score_pairs",
    "share_unseen",
]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class EvaluationFactor:
    """One row of the paper's Table 1.

    Attributes:
        description: what it measures, in the paper's words.
        family: "lexical" or "semantic", a key of OPTIONS.
        symmetric: whether swapping chosen and rejected leaves the score as it is.
        score: (chosen, rejected, progress=…, and the family's options) → (N,) scores.
    """

    description: str
    family: str
    symmetric: bool
    score: Callable[..., NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Option:
    """A setting of a family: its default, and which values it takes, as a test and in words."""

    default: Any
    accepts: Callable[[Any], bool]
    values: str


def score_pairs(
    chosen: Sequence[str],
    rejected: Sequence[str],
    ef: str = "rougeL",
    *,
    progress: Progress | None = None,
    **options: Any,
) -> NDArray[np.float64]:
    """Evaluation factor of each pair, before any floor.

    Args:
        chosen: N preferred responses; the reference for BERTScore, the target for ROUGE.
        rejected: N dispreferred responses; the candidate or prediction.
        ef: a key of EVALUATION_FACTORS.
        progress: called with (pairs done, N) whenever a chunk is finished.
        options: lexical factors take `use_stemmer` (False) and `tokenizer` ("rouge": a–z and 0–9;
            "unicode": any script). BERTScore takes `model` ("roberta-large"; also a local folder or
            "embedded:all-minilm-l6-v2"), `layer` (None: bert-score's own for the model),
            `batch_size` (64), `device` (None: the GPU if any).

    Returns:
        (N,) in [0, 1].

    Raises:
        ConfigError: `ef` or an option is unknown, or an option has a value that it cannot take.
        DataError: the two have different lengths, or an item is not a string.
        ModelError: the encoder of a BERTScore cannot be loaded.
    """
    settings = check_options(ef, options)
    chosen, rejected = check_pairs(chosen, rejected)
    return EVALUATION_FACTORS[ef].score(chosen, rejected, progress=progress, **settings)


def check_options(ef: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the factor `ef`: those given, and the defaults of the others.

    Raises:
        ConfigError: `ef` or an option is unknown, or an option has a value that it cannot take.
    """
    if ef not in list(EVALUATION_FACTORS):
        raise ConfigError(_unknown(f"evaluation factor {ef!r}", ef, EVALUATION_FACTORS))
    known = OPTIONS[EVALUATION_FACTORS[ef].family]
    for name, value in options.items():
        if name not in known:
            raise ConfigError(_unknown(f"option {name!r} of {ef}", name, known))
        if not known[name].accepts(value):
            raise ConfigError(
                f"The option {name} of {ef} is {value!r}; it has to be {known[name].values}."
            )
    return {name: option.default for name, option in known.items()} | dict(options)


def check_pairs(chosen: Iterable[str], rejected: Iterable[str]) -> tuple[list[str], list[str]]:
    """Both as lists of the same length.

    Raises:
        DataError: they have different lengths, or an item is not a string.
    """
    chosen, rejected = _texts("chosen", chosen), _texts("rejected", rejected)
    if len(chosen) != len(rejected):
        raise DataError(
            f"There are {len(chosen)} chosen and {len(rejected)} rejected responses, so from index "
            f"{min(len(chosen), len(rejected))} on they do not make pairs. Pass one of each a pair."
        )
    return chosen, rejected


def _texts(side: str, texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise DataError(f"{side} is {_kind(texts)}; it has to be a list of strings, one a pair.")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(
                f"{side}[{index}] is {_kind(text)}, and only text can be compared. "
                "Leave the pair out or give its response as a string."
            )
    return texts


def _kind(value: object) -> str:
    return f"{value!r:.40} ({type(value).__name__})"


def _unknown(what: str, name: object, known: Iterable[str]) -> str:
    by_lowercase = {key.lower(): key for key in known}
    near = difflib.get_close_matches(str(name).lower(), by_lowercase, n=1, cutoff=0)[0]
    every = ", ".join(by_lowercase.values())
    return f"There is no {what}. Did you mean {by_lowercase[near]!r}? All: {every}."


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _lexical(
    ef: str, chosen: list[str], rejected: list[str], **settings: Any
) -> NDArray[np.float64]:
    return lexical_scores(chosen, rejected, [ef], **settings)[ef]


def _semantic(
    column: int, chosen: list[str], rejected: list[str], **settings: Any
) -> NDArray[np.float64]:
    from gapo_lite.ef.semantic import bert_scores  # imports torch

    return bert_scores(chosen, rejected, **settings)[:, column]


OPTIONS: dict[str, dict[str, Option]] = {
    "lexical": {
        "use_stemmer": Option(False, lambda value: isinstance(value, bool), "True or False"),
        "tokenizer": Option(
            "rouge", lambda value: value in list(TOKENIZERS), " or ".join(map(repr, TOKENIZERS))
        ),
    },
    "semantic": {
        "model": Option(
            "roberta-large",
            lambda value: isinstance(value, str) and value != "",
            "a name on the Hub, a local folder or 'embedded:all-minilm-l6-v2'",
        ),
        "layer": Option(
            None, lambda value: value is None or _is_count(value), "a whole number from 1, or None"
        ),
        "batch_size": Option(64, _is_count, "a whole number from 1"),
        "device": Option(
            None,
            lambda value: value is None or isinstance(value, str),
            "None or a device's name, such as 'cpu' or 'cuda'",
        ),
    },
}

EVALUATION_FACTORS: dict[str, EvaluationFactor] = {
    "jaccard": EvaluationFactor(
        "The similarity between two sets by comparing the intersection and the union of the sets.",
        "lexical",
        True,
        partial(_lexical, "jaccard"),
    ),
    "rouge1": EvaluationFactor(
        "The overlap of unigrams.", "lexical", True, partial(_lexical, "rouge1")
    ),
    "rouge2": EvaluationFactor(
        "The overlap of bigrams.", "lexical", True, partial(_lexical, "rouge2")
    ),
    "rougeL": EvaluationFactor(
        "The longest common subsequence (LCS).", "lexical", True, partial(_lexical, "rougeL")
    ),
    "bertscore_p": EvaluationFactor(
        "The precision using BERT embeddings to evaluate the similarity.",
        "semantic",
        False,
        partial(_semantic, 0),
    ),
    "bertscore_r": EvaluationFactor(
        "The recall using BERT embeddings to evaluate the similarity.",
        "semantic",
        False,
        partial(_semantic, 1),
    ),
    "bertscore_f1": EvaluationFactor(
        "The F1 score using the precision and recall from BERT embeddings.",
        "semantic",
        True,
        partial(_semantic, 2),
    ),
}
