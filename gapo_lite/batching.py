"""Pairs → tokens → batches.

The prompt is rendered with the model's own chat template up to the assistant's header, and
tokenised apart from the responses: it is then the same token row for both, and the row that
generation will see. A response's scored tokens are its text and the template's end-of-turn token
once, nothing after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gapo_lite.errors import DataError, ModelError
from gapo_lite.types import Message, PairBatch, PreferencePair, Segments, TokenizedPair

_PAIRS_A_CALL = 512


@dataclass(frozen=True, slots=True)
class TokenizedPairs:
    """What tokenising made of some pairs.

    Attributes:
        pairs: those with at least one scored token on each side, in order; their margins are 0 yet.
        indices: (len(pairs),) which of the given pairs they are.
        num_prompts_truncated: pairs whose prompt lost tokens on the left.
        num_responses_truncated: pairs of which a response lost tokens on the right.
        num_dropped: pairs left without a scored token.
    """

    pairs: list[TokenizedPair]
    indices: np.ndarray
    num_prompts_truncated: int
    num_responses_truncated: int
    num_dropped: int


def tokenize_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 2048,
    max_prompt_length: int = 1800,
) -> TokenizedPairs:
    """Tokenises pairs and cuts those that are too long.

    A pair is too long when its prompt and its longer response exceed `max_length` tokens. Then the
    prompt is shortened from the left (its first token is kept where that is the BOS token), only
    as far as needed and not below `max_prompt_length`; what is still too long of a response is cut
    from its right.

    Args:
        pairs: N pairs.
        tokenizer: with a chat template.
        max_length: tokens of prompt and response together.
        max_prompt_length: tokens that a prompt keeps in any case.

    Raises:
        ModelError: the tokenizer has no chat template, or one without an end of turn.
        DataError: the template refuses a conversation, or no pair is left.
    """
    kept, indices, short_prompts, short_responses = [], [], 0, 0
    for index, (prompt, w, l) in enumerate(encode_pairs(pairs, tokenizer)):
        longest = max(len(w), len(l))
        cut_prompt = _cut_left(
            prompt, max(max_length - longest, max_prompt_length), tokenizer.bos_token_id
        )
        room = max_length - len(cut_prompt)
        if room < 1:
            continue
        short_prompts += len(cut_prompt) < len(prompt)
        short_responses += longest > room
        kept.append(TokenizedPair(cut_prompt, w[:room], l[:room], margin=0.0))
        indices.append(index)
    if not kept:
        raise DataError(
            f"none of {len(pairs)} pairs has a token left to score: max_length is {max_length} "
            "and max_prompt_length "
            f"{max_prompt_length}. Raise data.max_length or lower data.max_prompt_length."
        )
    return TokenizedPairs(
        kept, np.array(indices), short_prompts, short_responses, len(pairs) - len(kept)
    )


def encode_pairs(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Token ids of each pair before any cut: its rendered prompt, and its chosen and rejected
    response with the end-of-turn token.

    Raises:
        ModelError: the tokenizer has no chat template, or one without an end of turn.
        DataError: the template refuses a conversation.
    """
    ending = turn_ending(tokenizer)
    end = np.array([ending.token_id], dtype=np.int32)
    for start in range(0, len(pairs), _PAIRS_A_CALL):
        some = pairs[start : start + _PAIRS_A_CALL]
        prompts = [render_prompt(tokenizer, pair.prompt) for pair in some]
        texts = [ending.text_of(text) for pair in some for text in (pair.chosen, pair.rejected)]
        responses = [
            np.concatenate((ids, end)) for ids in _token_ids(tokenizer, texts, split_special=True)
        ]
        prompt_ids = _token_ids(tokenizer, prompts, split_special=False)
        yield from zip(prompt_ids, responses[::2], responses[1::2], strict=True)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The conversation as the model reads it, up to and including the assistant's header.

    Raises:
        DataError: the template refuses the conversation (some know no system role, say).
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the model's chat template refuses a conversation of the turns {roles}: {error}. "
            "Remove what it cannot "
            "take (often the system message) from the data, or choose another model."
        ) from None


@dataclass(frozen=True, slots=True)
class TurnEnding:
    """How a chat template ends the assistant's turn.

    Attributes:
        token_id: the end-of-turn token, such as `<|eot_id|>`.
        trims: whether the template strips white space around a response.
    """

    token_id: int
    trims: bool

    def text_of(self, response: str) -> str:
        """The response as the template renders it."""
        return response.strip() if self.trims else response


def turn_ending(tokenizer: PreTrainedTokenizerBase) -> TurnEnding:
    """Finds the end of the assistant's turn by rendering one; a template without one ends with EOS.

    Raises:
        ModelError: there is no chat template, or neither an end of turn nor an EOS token.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"{tokenizer.name_or_path} has no chat template, so a conversation cannot be "
            "rendered as it was trained. "
            "Choose a chat (instruct) model, or add a chat template to its tokenizer."
        )
    probe, spaces = "gapo-probe", "  "
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": spaces + probe + spaces},
    ]
    try:
        tail = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(probe)[2]
    except TemplateError as error:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} cannot render a question "
            f"and its answer: {error}."
        ) from None
    trims = not tail.startswith(spaces)
    ids = tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"]
    special = {
        *tokenizer.all_special_ids,
        *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special),
    }
    if ids and ids[0] in special:
        return TurnEnding(ids[0], trims)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} ends a turn with no special token."
        )
    return TurnEnding(tokenizer.eos_token_id, trims)


@dataclass(frozen=True, slots=True)
class MicroBatchLimits:
    """The most that goes through the model at once; None is no limit. A pair is never cut.

    Attributes:
        pairs: number of pairs.
        tokens: tokens of all pairs together, padding included.
    """

    pairs: int | None = None
    tokens: int | None = None

    def micro_batches(self, sizes: Sequence[int], *, packed: bool) -> list[list[int]]:
        """Cuts an optimizer step's pairs into what goes through the model together.

        First fit, longest pair first: few passes, each well filled, and in the padded layout pairs
        of like length together. How a step is cut changes its gradients by rounding only.

        Args:
            sizes: of each pair, as `num_tokens` has it.
            packed: else a pair costs what the longest of its micro-batch does.

        Returns:
            For each micro-batch, which pairs are in it.
        """
        cut: list[list[int]] = []
        totals: list[int] = []
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            for place, group in enumerate(cut):
                total = totals[place] + sizes[index if packed else group[0]]
                if len(group) < (self.pairs or len(sizes)) and total <= (self.tokens or total):
                    group.append(index)
                    totals[place] = total
                    break
            else:
                cut.append([index])
                totals.append(sizes[index])
        return cut

    def halved(self, sizes: Sequence[int]) -> MicroBatchLimits:
        """Limits under which a micro-batch of pairs of these sizes, two or more, is cut in two."""
        if self.tokens is None:
            return replace(self, pairs=math.ceil(len(sizes) / 2))
        return replace(self, tokens=math.ceil(min(self.tokens, sum(sizes)) / 2))


def num_tokens(prompt: int, chosen: int, rejected: int, *, packed: bool) -> int:
    """Tokens of a pair of these lengths as it goes through the model; in the padded layout, two
    rows as long as its longer one."""
    return prompt + chosen + rejected if packed else 2 * (prompt + max(chosen, rejected))


def pack(pairs: Sequence[TokenizedPair]) -> PairBatch:
    """The default layout: one row without padding, each prompt once. See PairBatch and Segments."""
    ids, positions, kv_index, lengths, start = [], [], [], [], 0
    predict: list[list] = [[], []]
    cu_q, cu_k = [0], [0]
    for pair in pairs:
        p, w, l = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
        middle, end = start + p + w, start + p + w + l
        ids += [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]
        positions += [np.arange(p + w), np.arange(p, p + l)]
        kv_index += [np.arange(start, middle), np.arange(start, start + p), np.arange(middle, end)]
        cu_q += [cu_q[-1] + p + w, cu_q[-1] + p + w + l]
        cu_k += [cu_k[-1] + p + w, cu_k[-1] + p + w + p + l]
        last = start + p - 1  # the last prompt position predicts the first token of both responses
        predict[0] += [np.arange(last, middle - 1)]
        predict[1] += [[last], np.arange(middle, end - 1)]
        lengths.append((p, w, l))
        start = end
    segments = Segments(
        lengths=tuple(lengths),
        kv_index=_tensor(kv_index),
        cu_seq_q=torch.tensor(cu_q, dtype=torch.int32),
        cu_seq_k=torch.tensor(cu_k, dtype=torch.int32),
        max_q=max(max(p + w, l) for p, w, l in lengths),
        max_k=max(p + max(w, l) for p, w, l in lengths),
    )
    return PairBatch(
        input_ids=_tensor(ids)[None],
        position_ids=_tensor(positions)[None],
        attention_mask=None,
        segments=segments,
        predict_index=_tensor(predict[0] + predict[1]),
        num_tokens=start,
        **_targets(pairs),
    )


def pad(pairs: Sequence[TokenizedPair], pad_id: int) -> PairBatch:
    """The reference layout: 2B rows, chosen first, padded on the right with `pad_id`. See
    PairBatch."""
    rows = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [
        (p.prompt_ids, p.rejected_ids) for p in pairs
    ]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
    predict: list[np.ndarray] = []
    for row, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        input_ids[row, :length] = _tensor([prompt, response])
        attention_mask[row, :length] = 1
        predict.append(row * width + np.arange(len(prompt) - 1, length - 1))
    return PairBatch(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(len(rows), -1),
        attention_mask=attention_mask,
        segments=None,
        predict_index=_tensor(predict),
        num_tokens=int(attention_mask.sum()),
        **_targets(pairs),
    )


def _targets(pairs: Sequence[TokenizedPair]) -> dict[str, Any]:
    responses = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    return {
        "target_ids": _tensor(responses),
        "lengths": torch.tensor([len(response) for response in responses]),
        "margin": torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        "reference": _references(pairs),
    }


def _references(pairs: Sequence[TokenizedPair]) -> torch.Tensor | None:
    known = [pair.reference for pair in pairs if pair.reference is not None]
    if len(known) < len(pairs):
        return None
    chosen, rejected = zip(*known, strict=True)
    return torch.tensor(chosen + rejected, dtype=torch.float32)


def _tensor(parts: Sequence[Sequence[int] | np.ndarray]) -> torch.Tensor:
    """One (sum of lengths,) int64 tensor."""
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, split_special: bool
) -> list[np.ndarray]:
    """Token ids of each text. With `split_special`, a response that spells out `<|eot_id|>` stays
    plain text."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,  # the template has written them already
        split_special_tokens=split_special,
        return_attention_mask=False,
    )
    return [np.array(row, dtype=np.int32) for row in encoded["input_ids"]]


def _cut_left(prompt: np.ndarray, room: int, bos_id: int | None) -> np.ndarray:
    if len(prompt) <= room:
        return prompt
    if prompt[0] == bos_id:
        return np.concatenate((prompt[:1], prompt[len(prompt) - room + 1 :]))
    return prompt[len(prompt) - room :]
