"""Many prompts → answers: in batches by length, each answer kept as it comes.

Batches are made of all prompts, whether they are answered already or not, so that work that was
killed is completed by the batches that it would have had.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from gapo_lite.answers import Answered, Turn
from gapo_lite.batching import render_prompt
from gapo_lite.chat import Voice
from gapo_lite.embedded import model_state
from gapo_lite.errors import DataError, RunError
from gapo_lite.generate import Answer, answer_batch
from gapo_lite.journal import Journal, digest
from gapo_lite.memory import is_out_of_memory
from gapo_lite.model import causal_model
from gapo_lite.prompts import Prompt
from gapo_lite.runs import now
from gapo_lite.types import Message

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when the same settings give other answers


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperatures: one a prompt; 0 takes the likeliest token each time.
        top_p: share of probability that is sampled from.
        max_tokens: longest answer, in tokens.
        seed: with the conversation it makes each answer's own seed.
    """

    temperatures: Sequence[float]
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0


@dataclass(slots=True)
class Speaker:
    """A voice that answers in batches, with or without its adapter.

    Attributes:
        voice: who.
        state: digest of weights and arithmetic.
        batch_size: conversations at once; halved when memory runs out.
        base: whether the adapter is left out.
    """

    voice: Voice
    state: str
    batch_size: int
    base: bool = False

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Within it, the model is the one that is to answer."""
        tuned = self.voice.tuned if self.base else None
        with tuned.disable_adapter() if tuned else nullcontext():
            yield


@dataclass(frozen=True, slots=True)
class _Asked:
    """A conversation that waits for its answer."""

    place: int  # of its prompt
    conversation: list[Message]
    temperature: float
    length: int
    seed: int
    key: str


def speaker(voice: Voice, *, batch_size: int, base: bool = False) -> Speaker:
    """The voice as it is now; `base` leaves its adapter out."""
    model = causal_model(voice.model)
    weight: Any = model.get_input_embeddings().weight
    adapter = None if base or voice.adapter is None else _adapter_state(voice.adapter)
    state = digest(
        FORMAT_VERSION,
        voice.base,
        _base_state(voice.base),
        str(weight.dtype),
        str(model.config.to_dict().get("quantization_config")),
        adapter,
    )
    return Speaker(voice, state, batch_size, base)


def answer_prompts(
    who: Speaker,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    journal: Journal,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answered]:
    """The answers to all prompts, turn after turn.

    A prompt that the model cannot take (too long, or refused by its chat template) is told of and
    gets an empty answer; the rest go on.

    Args:
        who: answers; its batch size may be less afterwards.
        prompts: N of them.
        sampling: with N temperatures.
        journal: what is in it is not asked again.
        progress: called with (answers done, answers in all).

    Returns:
        N of them.

    Raises:
        RunError: memory runs out with one conversation; the disk is full.
    """
    with who.speaking():
        return _Talks(who, prompts, sampling, journal, progress).all()


class _Talks:
    """The conversations that the prompts become, one turn after the other."""

    def __init__(
        self,
        who: Speaker,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        journal: Journal,
        progress: Callable[[int, int], None] | None,
    ):
        self._who, self._prompts, self._sampling, self._journal = who, prompts, sampling, journal
        self._progress = progress
        self._talks: list[list[Message]] = [list(prompt.messages) for prompt in prompts]
        self._said: list[list[Turn]] = [[] for _ in prompts]
        self._problems = [""] * len(prompts)
        self._total = sum(1 + len(prompt.followups) for prompt in prompts)

    def all(self) -> list[Answered]:
        for number in range(max(1 + len(prompt.followups) for prompt in self._prompts)):
            self._next_turn(number)
        return [
            Answered(turns, problem)
            for turns, problem in zip(self._said, self._problems, strict=True)
        ]

    def _next_turn(self, number: int) -> None:
        """Everyone's answer to question `number`, counted from 0."""
        places = [p for p, prompt in enumerate(self._prompts) if len(prompt.followups) >= number]
        for place in places if number else []:
            question = self._prompts[place].followups[number - 1]
            self._talks[place].append({"role": "user", "content": question})
        asked = list(_asked(self._who, self._talks, places, self._problems, self._sampling))
        for place in {*places} - {one.place for one in asked}:
            self._keep(place, Turn("", 0, False, now()))
        for place, turn in _answer_all(self._who, asked, self._sampling, self._journal):
            self._keep(place, turn)

    def _keep(self, place: int, turn: Turn) -> None:
        self._said[place].append(turn)
        self._talks[place].append({"role": "assistant", "content": turn.text})
        if self._progress:
            self._progress(sum(map(len, self._said)), self._total)


def _asked(
    who: Speaker,
    talks: Sequence[list[Message]],
    places: Sequence[int],
    problems: list[str],
    sampling: Sampling,
) -> Iterator[_Asked]:
    """What can be asked; `problems` gets the rest."""
    repeated: Counter[str] = Counter()
    for place in places:
        if problems[place]:
            continue
        talk, temperature = list(talks[place]), sampling.temperatures[place]
        try:
            length = _fitting_length(who.voice, talk, sampling.max_tokens)
        except DataError as error:
            problems[place] = str(error)
            logger.warning("prompt %d is not answered: %s", place + 1, error)
            continue
        settings = [temperature, sampling.top_p if temperature else 1.0, sampling.max_tokens]
        seed_of = digest(sampling.seed, talk) if temperature else digest(talk)
        repeated[seed_of] += 1
        row_digest = digest(seed_of, repeated[seed_of])
        key = digest(who.state, settings, row_digest)
        yield _Asked(place, talk, temperature, length, int(row_digest[:15], 16), key)


def _fitting_length(voice: Voice, talk: Sequence[Message], max_tokens: int) -> int:
    text = render_prompt(voice.tokenizer, talk)
    length = len(voice.tokenizer(text, add_special_tokens=False)["input_ids"])
    if voice.context is not None and length + max_tokens > voice.context:
        raise DataError(
            f"it has {length} tokens and its answer may have {max_tokens}, but {voice.name} reads "
            f"{voice.context} tokens at once. Shorten it, or lower --max-tokens."
        )
    return length


def _answer_all(
    who: Speaker,
    asked: Sequence[_Asked],
    sampling: Sampling,
    journal: Journal,
) -> Iterator[tuple[int, Turn]]:
    """Place and answer of each; the longest prompts first, so that memory runs out early if at
    all."""
    order = sorted(asked, key=lambda one: (one.temperature, -one.length, one.place))
    for batch in _batches(order, who.batch_size):
        rows = [journal.get(one.key) for one in batch]
        if not all(rows):
            answers = _answer_batch(who, batch, sampling)
            rows = [
                row or journal.add(one.key, _row(answer))
                for one, row, answer in zip(batch, rows, answers, strict=True)
            ]
        for one, row in zip(batch, rows, strict=True):
            if row:
                yield (
                    one.place,
                    Turn(row["text"], row["num_tokens"], row["cut_short"], row["tstamp"]),
                )


def _batches(order: Sequence[_Asked], size: int) -> Iterator[list[_Asked]]:
    """At most `size` neighbours of one temperature."""
    batch: list[_Asked] = []
    for one in order:
        if batch and (len(batch) == size or batch[0].temperature != one.temperature):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _answer_batch(who: Speaker, batch: Sequence[_Asked], sampling: Sampling) -> list[Answer]:
    answers: list[Answer] = []
    while len(answers) < len(batch):
        part = batch[len(answers) : len(answers) + who.batch_size]
        try:
            answers += answer_batch(
                who.voice.model,
                who.voice.tokenizer,
                [one.conversation for one in part],
                max_tokens=sampling.max_tokens,
                temperature=part[0].temperature,
                top_p=sampling.top_p,
                seeds=[one.seed for one in part],
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            _halve(who, part, error)
    return answers


def _halve(who: Speaker, part: Sequence[_Asked], error: RuntimeError) -> None:
    if len(part) == 1:
        raise RunError(
            f"out of memory while answering one prompt of {part[0].length} tokens: lower "
            f"--max-tokens, or take a smaller model. ({str(error)[:200]})"
        ) from None
    who.batch_size = len(part) // 2
    logger.warning("Out of memory: answering %d prompt(s) at a time from here on.", who.batch_size)


def _row(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "num_tokens": answer.num_tokens,
        "cut_short": answer.cut_short,
        "tstamp": now(),
    }


def _base_state(name: str) -> list[object]:
    """Of a model on the Hub, the snapshot in which it was downloaded."""
    return model_state(name) or [str(try_to_load_from_cache(name, "config.json"))]


def _adapter_state(folder: Path) -> list[str]:
    names = ("adapter_config.json", "adapter_model.safetensors")
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
