"""Which of two answers is better, by a reward model: a sequence classifier with one output.

The conversation with the answer at its end goes through the model's chat template and through the
model, one at a time, so that padding plays no part. Its code is never run (`trust_remote_code` is
off), so a model that brings its own cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from gapo_lite.embedded import model_state
from gapo_lite.errors import ModelError, RunError
from gapo_lite.journal import Journal, digest
from gapo_lite.judge import Verdict, settled
from gapo_lite.memory import is_out_of_memory
from gapo_lite.model import (
    load_model_config,
    load_tokenizer,
    loading,
    pick_device,
    pick_precision,
    resolve_model,
)
from gapo_lite.pairing import AnswerPair, Entry


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A loaded reward model.

    Attributes:
        name: as it was asked for.
        model: with one output, in eval mode.
        tokenizer: with a chat template.
        context: tokens that it reads at most; None if it does not say.
        state: digest of what it is.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    state: str


def load_reward_model(name: str) -> RewardModel:
    """A folder's or the Hub's sequence classifier.

    Raises:
        ModelError: it cannot be loaded, has another number of outputs than one or no chat template.
    """
    config = load_model_config(name)
    if config.num_labels != 1 or not _is_classifier(config.architectures):
        raise ModelError(
            f"{name} is no reward model that can be used here: it has {config.num_labels} outputs "
            f"and is a {', '.join(config.architectures or ['model of no named kind'])}, but a "
            "sequence classifier with one output is needed."
        )
    tokenizer = load_tokenizer(name)
    if not tokenizer.chat_template:
        raise ModelError(f"{name} has no chat template, so conversations cannot be rendered.")
    device = pick_device()
    dtype = pick_precision("auto", device) if device.type == "cuda" else torch.float32
    with loading(name):
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            resolve_model(name),
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
        )
    context = config.get_text_config().to_dict().get("max_position_embeddings")
    state = digest("reward", name, model_state(name), str(dtype))
    return RewardModel(name, model.eval(), tokenizer, context, state)


def score_pairs_by(
    reward: RewardModel,
    pairs: Sequence[AnswerPair],
    journal: Journal,
    progress: Callable[[int, int], None] | None = None,
) -> list[Verdict]:
    """The verdicts on N pairs: the higher score wins.

    An answer that the model cannot take makes its pair unusable.

    Args:
        progress: called with (pairs done, N).

    Raises:
        RunError: memory runs out; the disk is full.
    """
    verdicts = []
    for number, pair in enumerate(pairs, start=1):
        verdicts.append(settled(pair) or _compare(reward, pair, journal))
        if progress:
            progress(number, len(pairs))
    return verdicts


def _compare(reward: RewardModel, pair: AnswerPair, journal: Journal) -> Verdict:
    try:
        a, b = (_kept_score(reward, entry, journal) for entry in pair)
    except _UnscorableError as error:
        return Verdict(None, "unusable", reason=str(error))
    return Verdict(0.5 if a == b else float(a > b), "judged", scores=[a, b])


def _kept_score(reward: RewardModel, entry: Entry, journal: Journal) -> float:
    key = digest(reward.state, entry.messages)
    row = journal.get(key) or journal.add(key, {"score": _score(reward, entry)})
    return float(row["score"])


class _UnscorableError(Exception):
    pass


@torch.no_grad()
def _score(reward: RewardModel, entry: Entry) -> float:
    try:
        text = str(reward.tokenizer.apply_chat_template(entry.messages, tokenize=False))
    except TemplateError as error:
        raise _UnscorableError(f"the chat template refuses the conversation: {error}") from None
    inputs = reward.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if reward.context is not None and length > reward.context:
        raise _UnscorableError(
            f"an answer has {length} tokens with its question, but {reward.name} reads "
            f"{reward.context} at once"
        )
    try:
        logits = reward.model(**inputs.to(reward.model.device)).logits
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"out of memory while scoring an answer of {length} tokens with {reward.name}. What "
            f"was scored is kept. ({str(error)[:200]})"
        ) from None
    score = float(logits.float().reshape(-1)[-1])
    if score != score:
        raise _UnscorableError("the score is not a number")
    return score


def _is_classifier(architectures: list[str] | None) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in architectures or [])
