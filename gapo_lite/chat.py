"""Conversations with a run or a model, the base model beside the tuned one; `gapo-lite chat`.

conversation = Conversation(load_voice("demo", Path("runs")))
for piece in conversation.ask("What is a leap year?"): ...
for piece in conversation.ask_base(): ...       # the same question, without the adapter
"""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from gapo_lite.batching import render_prompt, turn_ending
from gapo_lite.compare import load_policy
from gapo_lite.config import ModelConfig, parse_config
from gapo_lite.errors import ConfigError, DataError, GapoError
from gapo_lite.generate import stream_answer
from gapo_lite.model import Policy, load_base, load_tokenizer, pick_device, pick_precision
from gapo_lite.runs import Run, open_run
from gapo_lite.terminal import note, visible
from gapo_lite.types import Message

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

HELP = """\
/base           answer the last question again without the adapter
/base QUESTION  ask the base model; neither question nor answer stays in the conversation
/reset          forget the conversation
/system TEXT    set the system message (without TEXT: remove it)
/help           this list
/quit           leave (also Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True, slots=True)
class Voice:
    """Who answers.

    Attributes:
        name: of the run or model.
        tokenizer: with a chat template.
        model: the policy, in eval mode.
        tuned: the same where it has an adapter that can be left out, else None.
        context: tokens that question and answer may have together; None if the model does not say.
        base: the base model's configured name.
        adapter: the folder that the adapter was loaded from.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    model: Policy
    tuned: PeftModel | None
    context: int | None
    base: str
    adapter: Path | None = None


def load_voice(name: str, runs_dir: Path) -> Voice:
    """A run (its name or folder) or a model (embedded name, folder or Hub id), ready to answer.

    Raises:
        GapoError: there is no such run or model, the run has saved nothing, or something of it
            cannot be loaded.
    """
    run = find_run(name, runs_dir)
    return voice_of(run) if run else base_voice(parse_config({"model": {"name": name}}).model)


def voice_of(run: Run) -> Voice:
    """A run, ready to answer; see `base_voice`.

    Raises:
        GapoError: it has saved nothing, or something of it cannot be loaded.
    """
    config, adapter = run.config(), run.trained_adapter()
    tokenizer, how = _how_to_load(config.model)
    tuned = load_policy(config, adapter, **how)
    return Voice(run.name, tokenizer, tuned, tuned, _context(tuned), config.model.name, adapter)


def base_voice(model: ModelConfig) -> Voice:
    """A model as it is, ready to answer. On a CPU it is not quantised: NF4 would answer ten times
    slower.

    Raises:
        GapoError: there is no such model, or something of it cannot be loaded.
    """
    tokenizer, how = _how_to_load(model)
    base = load_base(model.name, revision=model.revision, **how).eval()
    return Voice(model.name, tokenizer, base, None, _context(base), model.name)


def _how_to_load(model: ModelConfig) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """The tokenizer, and quantization, dtype and device on this machine."""
    tokenizer = load_tokenizer(model.name, model.revision)
    turn_ending(tokenizer)  # a model without chat template is refused before it is loaded
    device = pick_device()
    quantization = "none" if device.type == "cpu" else model.quantization
    dtype = pick_precision(model.precision, device)
    return tokenizer, {"quantization": quantization, "dtype": dtype, "device": device}


def find_run(name: str, runs_dir: Path) -> Run | None:
    """The run of that name or folder; None where the name can only mean a model.

    Raises:
        RunError: it means a run, which is not there.
    """
    is_run = any((path / "config.yaml").is_file() for path in (runs_dir / name, Path(name)))
    means_model = name.startswith("embedded:") or Path(name).is_dir()
    means_hub_id = name.count("/") == 1 and not Path(name).parent.is_dir()
    return None if not is_run and (means_model or means_hub_id) else open_run(name, runs_dir)


def _context(model: Policy) -> int | None:
    return model.config.get_text_config().to_dict().get("max_position_embeddings")


@dataclass(slots=True)
class Conversation:
    """Turns with one voice; the oldest are dropped when they no longer fit the model's context.

    Attributes:
        voice: who answers.
        system: the system message, "" for none.
        temperature: 0 takes the likeliest token each time.
        top_p: share of probability that is sampled from.
        max_tokens: longest answer, in tokens.
        seed: of the sampling; each question adds one.
        tell: hears about dropped turns.
        turns: questions and answers so far, without the system message.
        asked: what the last answer was an answer to, as `turns` then were; [] at the start.
    """

    voice: Voice
    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0
    tell: Callable[[str], None] = note
    turns: list[Message] = field(default_factory=list)
    asked: list[Message] = field(default_factory=list)
    _num_forgotten: int = 0  # turns
    _seed: int = 0  # of the last answer

    def ask(self, question: str) -> Generator[str, None, None]:
        """Pieces of the answer; what there is of it when the generator is closed is kept as a turn.

        Raises:
            GapoError: the question does not fit, or the chat template refuses the conversation.
        """
        self.asked, self._seed = self._fitting(question)
        self._num_forgotten += len(self.turns) + 1 - len(self.asked)
        text = ""
        with closing(self._stream(self.asked, self._seed)) as pieces:
            try:
                for piece in pieces:
                    text += piece
                    yield piece
            finally:
                if text:
                    self.turns = [*self.asked, {"role": "assistant", "content": text}]

    def ask_base(self, question: str = "") -> Generator[str, None, None]:
        """Pieces of the answer without the adapter, to a question or the last one; none is kept.

        Raises:
            GapoError: see `ask`; or nothing was asked yet, or there is no adapter.
        """
        tuned = self.voice.tuned
        if tuned is None:
            raise ConfigError(
                f"{self.voice.name} is a base model itself: it has no adapter to leave out."
            )
        if not question and not self.asked:
            raise ConfigError(
                "nothing has been asked yet: ask a question first, or write /base QUESTION."
            )
        turns, seed = self._fitting(question) if question else (self.asked, self._seed)
        with tuned.disable_adapter(), closing(self._stream(turns, seed)) as pieces:
            yield from pieces

    def reset(self) -> None:
        """Forgets all turns; the system message stays."""
        self.turns, self.asked, self._num_forgotten = [], [], 0

    def _stream(self, turns: list[Message], seed: int) -> Generator[str, None, None]:
        yield from stream_answer(
            self.voice.model,
            self.voice.tokenizer,
            self._with_system(turns),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns

    def _fitting(self, question: str) -> tuple[list[Message], int]:
        """The turns with the question, without the oldest questions and answers that the context
        has no room for; and the seed of the answer, for which the forgotten ones count too."""
        turns = kept = [*self.turns, {"role": "user", "content": question}]
        seed = self.seed + (self._num_forgotten + len(turns)) // 2
        if self.voice.context is None:
            return kept, seed
        while (length := self._num_tokens(kept)) + self.max_tokens > self.voice.context:
            if len(kept) == 1:
                raise DataError(
                    f"the question has {length} tokens with its system message and the answer may "
                    f"have {self.max_tokens}, but {self.voice.name} reads {self.voice.context} "
                    "tokens at once. Shorten the question, or lower --max-tokens."
                )
            kept = kept[2:]
        if dropped := len(turns) - len(kept):
            self.tell(
                f"(the conversation no longer fits into {self.voice.context} tokens: the oldest "
                f"{dropped} turns are forgotten)"
            )
        return kept, seed

    def _num_tokens(self, turns: list[Message]) -> int:
        text = render_prompt(self.voice.tokenizer, self._with_system(turns))
        return len(self.voice.tokenizer(text, add_special_tokens=False)["input_ids"])


# -- the loop of `gapo-lite chat` --


def talk(conversation: Conversation) -> None:
    """Reads lines from stdin and answers on stdout; a pipe gets the answers alone, no prompts."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # bytes that are no text must not end the talk
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        import readline  # noqa: F401 — gives input() its line editing and history

        note(f"Talking with {conversation.voice.name}. /help lists the commands; Ctrl-D leaves.")
    while (line := _read_line("you> " if terminal else "")) is not None:
        if not line.strip():
            continue
        try:
            if _obey(conversation, line.strip(), terminal):
                return
        except GapoError as error:
            note(f"error: {error}")


def _read_line(prompt: str) -> str | None:
    """None at the end of the input, or at Ctrl-C."""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        if prompt:
            print()
        return None


def _obey(conversation: Conversation, line: str, terminal: bool) -> bool:
    """Does what a line asks for; True to leave."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if not command.startswith("/"):
        _speak(conversation.ask(line), conversation.voice.name if terminal else "")
    elif command == "/base":
        _speak(conversation.ask_base(rest), "base" if terminal else "")
    elif command == "/reset":
        conversation.reset()
        note("(the conversation is forgotten)")
    elif command == "/system":
        conversation.system = rest
        note("(the system message is set)" if rest else "(there is no system message now)")
    elif command == "/help":
        print(HELP)
    elif command == "/quit":
        return True
    else:
        note(f"There is no command {command}.\n{HELP}")
    return False


def _speak(answer: Generator[str, None, None], speaker: str) -> None:
    """Prints the pieces as they come; Ctrl-C stops this answer only, at its next token."""
    with _ctrl_c_noted() as stop, closing(answer) as pieces:
        if speaker:
            print(f"{speaker}> ", end="", flush=True)
        for piece in pieces:
            print(visible(piece), end="", flush=True)
            if stop.is_set():
                break
    print(flush=True)
    if stop.is_set():
        note("(stopped)")


@contextmanager
def _ctrl_c_noted() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, instead of breaking in anywhere; a second Ctrl-C does that."""
    noted = threading.Event()

    def handler(signum: int, frame: FrameType | None) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
