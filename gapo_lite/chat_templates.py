"""A tokenizer's chat template (Jinja) → the Go template that Ollama renders conversations with.

Jinja cannot be translated in general, so the template is asked instead: it renders conversations
whose messages are known words, and what stands between those words are the parts of a Go template.
The result counts only if it renders other conversations exactly as the tokenizer does.

Ollama hands a template `.System` (the system message) and `.Messages` (all of them, in order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gapo_lite.errors import ModelError
from gapo_lite.types import Message

_SYSTEM, _ASKED, _ANSWERED, _AGAIN = "gapoSystem", "gapoAsked", "gapoAnswered", "gapoAgain"

Around = tuple[str, str]
"""What stands before and after a message."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The parts that a conversation is rendered from, without the token that the tokenizer itself
    begins with.

    Attributes:
        system: around the system message; None for a model that takes none.
        default_system: the system message of a conversation without one; "" for none.
        no_system: in place of a system message where there is none, not even a default one.
        user, assistant: around their messages.
        generation: before the answer to be generated.
    """

    system: Around | None
    default_system: str
    no_system: str
    user: Around
    assistant: Around
    generation: str

    def render(self, messages: Sequence[Message]) -> str:
        """What Ollama makes of a conversation with `go()` and `default_system`."""
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        system = system or self.default_system
        text = system.join(self.system) if system and self.system else self.no_system
        for message in messages:
            if message["role"] != "system":
                around = self.user if message["role"] == "user" else self.assistant
                text += message["content"].join(around)
        return text + self.generation

    def go(self) -> str:
        """The Go template."""
        system = self.no_system
        if self.system:
            before, after = self.system
            otherwise = f"{{{{ else }}}}{self.no_system}" if self.no_system else ""
            system = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{otherwise}{{{{ end }}}}"
        return (
            f"{system}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{"{{ .Content }}".join(self.user)}'
            f'{{{{ else if eq .Role "assistant" }}}}{"{{ .Content }}".join(self.assistant)}'
            f"{{{{ end }}}}{{{{ end }}}}{self.generation}"
        )

    def parts(self) -> tuple[str, ...]:
        """All text of the model's own, as it stands in `go()`."""
        system = self.system or ("", "")
        return (
            *(*system, self.no_system, *self.user, *self.assistant),
            self.generation,
        )


def read_chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Finds the parts of a tokenizer's chat template, and that they are all there is to it.

    White space around a message, which some templates strip, is kept by Ollama.

    Raises:
        ModelError: there is no chat template, or Ollama's cannot say the same.
    """
    if not tokenizer.chat_template:
        raise ModelError(f"{tokenizer.name_or_path} has no chat template to write for Ollama.")
    if "strftime_now" in str(tokenizer.chat_template):
        raise _inexpressible("it writes the date of the day")
    found = _derived(tokenizer)
    if found is None:
        raise _inexpressible("the text around its messages is not the same in every conversation")
    if any("{{" in part or "}}" in part for part in found.parts()):
        raise _inexpressible("it has {{ or }} in its text")
    for messages in _EXAMPLES:
        expected = _rendered(tokenizer, messages)
        if expected is None and messages[0]["role"] == "system" and not found.system:
            continue
        if expected is None or found.render(messages) != _without_bos(tokenizer, expected):
            roles = ", ".join(message["role"] for message in messages)
            raise _inexpressible(f"a conversation of the turns {roles} comes out differently")
    return found


def _inexpressible(why: str) -> ModelError:
    return ModelError(
        "the model's chat template cannot be written as one of Ollama's: "
        f"{why}. Export without --ollama; with --gguf instead, llama.cpp's own programs read the "
        "model's own template (llama-server --jinja)."
    )


def _conversation(*turns: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]


_ODD = 'It\'s "so":\n\n  1 < 2 & {x} 日本 🌱'
_TALK = (("user", "one"), ("assistant", _ODD), ("user", _ODD), ("assistant", "four"), ("user", "5"))
_EXAMPLES = (
    _conversation(("user", _ODD)),
    _conversation(*_TALK),
    _conversation(("system", _ODD), ("user", "Hi")),
    _conversation(("system", "Be brief."), *_TALK),
)


def _derived(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The parts that explain three small conversations; None where there are none."""
    asked, again = ("user", _ASKED), ("user", _AGAIN)
    answered = ("assistant", _ANSWERED)
    alone = _pieces(tokenizer, asked, generation=False)
    prompted = _pieces(tokenizer, asked)
    whole = _pieces(tokenizer, asked, answered, generation=False)
    talk = _pieces(tokenizer, asked, answered, again)
    if not (alone and prompted and whole and talk):
        return None
    after_user, after_assistant = alone[-1], whole[-1]
    generation = _cut_start(prompted[-1], after_user)
    before_assistant = _cut_start(talk[1], after_user)
    before_user = _cut_start(talk[2], after_assistant)
    if generation is None or before_assistant is None or before_user is None:
        return None
    opening = _cut_end(_without_bos(tokenizer, prompted[0]), before_user)
    if opening is None:
        return None
    system, default, otherwise = None, "", opening
    if with_system := _pieces(tokenizer, ("system", _SYSTEM), asked):
        before, between = _without_bos(tokenizer, with_system[0]), with_system[1]
        after = _cut_end(between, before_user)
        if after is None:
            return None
        system = (before, after)
        if opening.startswith(before) and opening.endswith(after):
            default = opening[len(before) : len(opening) - len(after)]
            otherwise = "" if default else opening
    return ChatTemplate(
        system=system,
        default_system=default,
        no_system=otherwise,
        user=(before_user, after_user),
        assistant=(before_assistant, after_assistant),
        generation=generation,
    )


def _pieces(
    tokenizer: PreTrainedTokenizerBase, *turns: tuple[str, str], generation: bool = True
) -> list[str] | None:
    """What stands before, between and after the messages; None where they are not there once each,
    in order."""
    text = _rendered(tokenizer, _conversation(*turns), generation=generation)
    pieces = []
    for _, word in turns:
        if text is None or text.count(word) != 1:
            return None
        before, _, text = text.partition(word)
        pieces.append(before)
    return [*pieces, text or ""]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation: bool = True
) -> str | None:
    """None where the template refuses the conversation."""
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation
            )
        )
    except TemplateError:
        return None


def _without_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Without the token that the tokenizer puts in front by itself, as Ollama's will."""
    bos = tokenizer.bos_token
    adds_it = bos and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(bos)) if adds_it else text


def _cut_start(text: str, start: str) -> str | None:
    return text[len(start) :] if text.startswith(start) else None


def _cut_end(text: str, end: str) -> str | None:
    return text[: len(text) - len(end)] if text.endswith(end) else None
