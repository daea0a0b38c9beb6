"""A Modelfile for Ollama: what to answer with, and how a conversation is rendered for it.

Its grammar is that of Ollama's `parser/parser.go`: an instruction and its value a line, `#` for
comments, triple quotes for values of several lines. Inside quotes nothing can be escaped, and
characters that cannot be printed are dropped: a value that would not come back as it was is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from gapo_lite.chat_templates import ChatTemplate
from gapo_lite.errors import ConfigError, ModelError

MODELFILE = "Modelfile"

_BASES = {
    "SmolLM2-135M-Instruct": "smollm2:135m-instruct-fp16",
    "Meta-Llama-3-8B-Instruct": "llama3:8b-instruct-fp16",
    "Meta-Llama-3.1-8B-Instruct": "llama3.1:8b-instruct-fp16",
    "Llama-3.1-8B-Instruct": "llama3.1:8b-instruct-fp16",
}
"""A base model's own name, without its owner → its unquantised form in Ollama's library."""

_MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+){0,3}(:[\w.-]+)?")


def modelfile(
    template: ChatTemplate,
    *,
    source: str,
    adapter: str | None = None,
    stops: Sequence[str],
    licence: str = "",
    notes: Sequence[str] = (),
) -> str:
    """The text of a Modelfile.

    Args:
        template: of the conversation.
        source: a model in Ollama's library, or a file or folder, relative to the Modelfile.
        adapter: a GGUF file, likewise; None for none.
        stops: texts at which an answer ends.
        licence: of the model, in words; "" leaves it out.
        notes: for people, a comment line each.

    Raises:
        ModelError: a value cannot be written in a Modelfile.
    """
    lines = [
        *(f"# {' '.join(note.split())}" for note in notes),
        f"FROM {source}",
        *([f"ADAPTER {adapter}"] if adapter else []),
        f"TEMPLATE {_quoted(template.go())}",
        *([f"SYSTEM {_quoted(template.default_system)}"] if template.default_system else []),
        *(f"PARAMETER stop {_quoted(stop)}" for stop in stops),
        *([f"LICENSE {_quoted(licence)}"] if licence else []),
    ]
    return "\n".join(lines) + "\n"


def ollama_base(base: str, given: str | None) -> str:
    """What FROM names for an adapter.

    Args:
        base: the base model's public name.
        given: by a person: a model of Ollama's, or a file or folder beside the Modelfile.

    Raises:
        ConfigError: nothing is given and the library's name for this base is not known here, or
            what is given is neither a model's name nor a path below the Modelfile.
    """
    if given is None:
        if known := _BASES.get(base.rpartition("/")[2]):
            return known
        raise ConfigError(
            f"Ollama has to be told which base model the adapter belongs to, and its name for "
            f"{base} is not known here: give --ollama-base, a model of its library or a file or "
            "folder beside the Modelfile (./base.gguf). Or export with --merged, which needs none."
        )
    is_path = given.startswith("./") and ".." not in PurePosixPath(given).parts
    printable = given.isprintable() and '"' not in given and given == given.strip()
    if not (printable and is_path) and not _MODEL_NAME.fullmatch(given):
        raise ConfigError(
            f"--ollama-base {given!r}: name a model of Ollama's such as llama3:8b-instruct-fp16, "
            "or a file or folder beside the Modelfile such as ./base.gguf (an absolute path would "
            "be of no use to others)."
        )
    return given


def _quoted(text: str) -> str:
    odd = next((c for c in text if not (c.isprintable() or c in "\n\t")), None)
    if odd is not None or '"""' in text:
        what = "three quotation marks" if odd is None else f"the character U+{ord(odd):04X}"
        raise ModelError(
            f"{text[:60]!r} has {what} in it, which a Modelfile cannot hold. Export without "
            "--ollama."
        )
    return f'"""{text}"""'
