"""Answers from a policy: streamed for chat, whole for samples, in batches for many prompts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from gapo_lite.batching import render_prompt, turn_ending
from gapo_lite.errors import ModelError
from gapo_lite.model import Policy
from gapo_lite.types import Message

_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer.

    Attributes:
        text: without special tokens.
        num_tokens: how many the model wrote, without the end of its turn.
        cut_short: whether `max_tokens` ended it, not the model.
    """

    text: str
    num_tokens: int
    cut_short: bool


def answer(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """The whole answer to a conversation; see `stream_answer`."""
    pieces = stream_answer(
        model,
        tokenizer,
        messages,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    return "".join(pieces)


def stream_answer(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Pieces of the answer as they are made; closing the iterator stops the model.

    Args:
        model: the policy; disable its adapter around the whole iteration for the base model's
            answer.
        tokenizer: with a chat template.
        messages: the conversation so far; its last turn is the user's.
        max_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token each time.
        top_p: share of probability that is sampled from.
        seed: of the sampling.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = threading.Event()
    failure: list[Exception] = []
    arguments = (
        model,
        tokenizer,
        messages,
        streamer,
        stop,
        failure,
        max_tokens,
        temperature,
        top_p,
        seed,
    )
    worker = threading.Thread(target=_generate, args=arguments, daemon=True)
    try:
        worker.start()
        yield from streamer
    finally:
        stop.set()
        worker.join()
    if failure:
        raise failure[0]


def answer_batch(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | int = 0,
) -> list[Answer]:
    """The whole answers to several conversations, in one batch padded on the left.

    Its naive equivalent is one conversation a call: a row sees nothing of the others, and draws
    from a generator of its own. Padding changes how sums are rounded: in float32 that has not
    changed a token in the tests; in bfloat16 it can, where two tokens are nearly as likely, and
    the rest of that answer with it. (The draws are not those of `answer`.)

    Args:
        model: see `stream_answer`; its mode is restored.
        tokenizer: with a chat template.
        conversations: B of them; the last turn of each is the user's.
        max_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token each time.
        top_p: share of probability that is sampled from.
        seeds: of the sampling, one a conversation or one for all.

    Returns:
        B answers.

    Raises:
        DataError: the chat template refuses a conversation.
        ModelError: there is no chat template, or the model's logits are not numbers.
    """
    if not conversations:
        return []
    if isinstance(seeds, int):
        seeds = [seeds] * len(conversations)
    drawing = [_Drawing(temperature, top_p, seeds)] if temperature else []
    stop_ids = _stop_ids(model, tokenizer)
    inputs = _left_padded(tokenizer, [render_prompt(tokenizer, c) for c in conversations])
    training = model.training
    try:
        model.eval()
        ids = cast(Any, model.generate)(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            **_GREEDY,
            max_new_tokens=max_tokens,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
            logits_processor=LogitsProcessorList(drawing),
        )
    finally:
        model.train(training)
    written = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return [_until_stop(tokenizer, row, stop_ids) for row in written]


def _left_padded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, (B, T) each.

    A row is padded with its own first token, so that what looks at a row's tokens without its mask
    (a generation_config's repetition_penalty) finds none that the prompt does not have.
    """
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row[:1] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def _until_stop(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop_ids: list[int]) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return Answer(str(text), len(ids[:end]), end is None)


class _Drawing(LogitsProcessor):
    """Draws each row's next token and leaves it as the only one that greedy decoding can take.

    `generate(do_sample=True)` would draw all rows from one generator, so that an answer depended
    on what else is in the batch. The draw is the largest of log-probability plus Gumbel noise: with
    the same noise, a rounding error changes it only where two sums are that close.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]):
        self._temperature, self._top_p, self._seeds = temperature, top_p, seeds
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) → the same shape, -inf but for one token a row, which is 0."""
        if not self._generators:  # where the scores are, which may not be where the model begins
            self._generators = [
                torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds
            ]
        if scores.isnan().any():
            raise ModelError(
                "the model's logits are not numbers, so no token can be drawn: its weights are "
                "damaged, or the training that made them has diverged."
            )
        scaled = (scores.double() - scores.amax(1, keepdim=True)) / self._temperature
        noise = torch.stack(
            [self._noise(row, g) for row, g in zip(scaled, self._generators, strict=True)]
        )
        drawn = (self._likeliest(scaled) + noise).argmax(1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)

    def _likeliest(self, scaled: torch.Tensor) -> torch.Tensor:
        """-inf for what lies outside the fewest tokens that have `top_p` together; (B, V)."""
        if self._top_p >= 1:
            return scaled
        probs, tokens = scaled.softmax(1).sort(dim=1, descending=True, stable=True)
        outside = probs.cumsum(1) - probs >= self._top_p
        return scaled.masked_fill(torch.zeros_like(outside).scatter(1, tokens, outside), -torch.inf)

    @staticmethod
    def _noise(row: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """(V,) of Gumbel(0, 1), all of them finite."""
        drawn = torch.empty_like(row).exponential_(generator=generator)
        return -drawn.clamp_(min=1e-300).log_()


class _Stopped(StoppingCriteria):
    def __init__(self, stop: threading.Event):
        self.stop = stop

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


def _generate(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    streamer: TextIteratorStreamer,
    stop: threading.Event,
    failure: list[Exception],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    training = model.training
    try:
        model.eval()
        inputs = tokenizer(
            render_prompt(tokenizer, messages), add_special_tokens=False, return_tensors="pt"
        )
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
        )
        devices = [model.device] if model.device.type == "cuda" else []  # not of every GPU
        with torch.random.fork_rng(devices, enabled=bool(sampling)):
            if sampling:
                torch.manual_seed(seed)
            cast(Any, model.generate)(
                **inputs.to(model.device),
                **(_GREEDY | sampling),
                max_new_tokens=max_tokens,
                eos_token_id=_stop_ids(model, tokenizer),
                pad_token_id=tokenizer.eos_token_id,
                stopping_criteria=StoppingCriteriaList([_Stopped(stop)]),
                streamer=streamer,
            )
    except Exception as error:  # handed to the reader's thread, which raises it
        failure.append(error)
        streamer.end()
    finally:
        model.train(training)


def _stop_ids(model: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = model.generation_config.eos_token_id
    ids = {turn_ending(tokenizer).token_id, tokenizer.eos_token_id}
    ids.update(configured if isinstance(configured, list) else [configured])
    return sorted(i for i in ids if i is not None)
