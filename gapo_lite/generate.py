"""Answers from a policy: streamed for chat, whole for samples."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from transformers import (
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from gapo_lite.batching import render_prompt, turn_ending
from gapo_lite.model import Policy
from gapo_lite.types import Message


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
        with torch.random.fork_rng(enabled=bool(sampling)):
            if sampling:
                torch.manual_seed(seed)
            cast(Any, model.generate)(
                **inputs.to(model.device),
                **(
                    {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
                    | sampling
                ),
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
