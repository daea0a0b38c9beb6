"""Readers of what Ollama reads, for tests: its Modelfile, by the rules of its parser/parser.go, and
the part of Go's text/template that our templates use."""

from __future__ import annotations

import re
from pathlib import Path

INSTRUCTIONS = {
    *("from", "license", "template", "system", "adapter", "draft", "renderer", "parser"),
    *("parameter", "message", "requires"),
}


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """The instructions in order, (name, value); a PARAMETER has its own name.

    A value ends at the first line's end where its quotes are closed; what cannot be printed is
    dropped, and nothing is escaped.
    """
    found, rest = [], text
    while rest := rest.lstrip(" \t\r\n"):
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        word, _, rest = _word(rest)
        assert word.lower() in INSTRUCTIONS, word
        name = word.lower()
        if name == "parameter":
            name, _, rest = _word(rest)
            assert re.fullmatch(r"\w+", name)
        value, rest = _value(rest)
        found.append((name, value))
    assert "from" in dict(found), "no FROM line"
    return found


def _word(text: str) -> tuple[str, str, str]:
    end = re.search(r"[ \t]", text)
    assert end, "an instruction without a value"
    return text[: end.start()], end[0], text[end.end() :]


def _value(text: str) -> tuple[str, str]:
    kept = ""
    for place, letter in enumerate(text):
        if letter in "\r\n":
            value = _unquoted(kept.strip())
            if value is not None:
                return value, text[place:]
        if letter in " \t\r\n" or letter.isprintable():
            kept += letter
    value = _unquoted(kept.strip())
    assert value is not None, "unexpected end of file"
    return value, ""


def _unquoted(text: str) -> str | None:
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text


def render_go(template: str, system: str, messages: list[dict]) -> str:
    """Ollama's prompt for a conversation."""
    tokens = re.split(r"({{.*?}})", template)
    nodes, _ = _nodes(tokens, 0)
    return _run(nodes, {"System": system, "Messages": messages})


def _nodes(tokens: list[str], at: int) -> tuple[list, int]:
    """Texts and actions up to the `end` or `else` that is not theirs, and its place."""
    nodes = []
    while at < len(tokens):
        action = tokens[at][2:-2].strip() if tokens[at].startswith("{{") else None
        if action is None:
            nodes.append(tokens[at])
        elif action.split()[0] in ("end", "else"):
            return nodes, at
        elif action.split()[0] in ("if", "range"):
            branches, at = _branches(tokens, at, action)
            nodes.append(branches)
        else:
            nodes.append((action, None))
        at += 1
    return nodes, at


def _branches(tokens: list[str], at: int, action: str) -> tuple[tuple, int]:
    branches = []
    while action != "end":
        inner, at = _nodes(tokens, at + 1)
        branches.append((action.removeprefix("else").strip(), inner))
        action = tokens[at][2:-2].strip()
    return ("branches", branches), at


def _run(nodes: list, scope: dict) -> str:
    text = ""
    for node in nodes:
        if isinstance(node, str):
            text += node
        elif node[0] == "branches":
            text += _choose(node[1], scope)
        else:
            text += scope[node[0].removeprefix(".")]
    return text


def _choose(branches: list, scope: dict) -> str:
    for condition, inner in branches:
        if condition.startswith("range"):
            field = condition.split()[1].removeprefix(".")
            return "".join(
                _run(inner, {"Role": m["role"], "Content": m["content"]}) for m in scope[field]
            )
        if not condition:
            return _run(inner, scope)
        if condition.startswith("if eq"):
            _, _, field, literal = condition.split()
            holds = scope[field.removeprefix(".")] == literal.strip('"')
        else:
            holds = bool(scope[condition.split()[1].removeprefix(".")])
        if holds:
            return _run(inner, scope)
    return ""


STUB = """\
import json, os, sys
import gguf
import numpy as np

folder, _, out, _, outtype, _, name = sys.argv[1:]
assert os.path.basename(folder) == name, "others would read the name of the folder"
settings = json.load(open(folder + "/config.json"))
assert outtype in ("bf16", "f32") and os.environ["HF_HUB_OFFLINE"] == "1"
assert "HF_TOKEN" not in os.environ, "a secret"
print("Loading model")
{before}
writer = gguf.GGUFWriter(out, settings["model_type"])
writer.add_name(name)
if {tokens}:
    writer.add_token_list(["a", "b"])
writer.add_tensor("token_embd.weight", np.zeros((2, 4), np.float32))
for layer in range(settings["num_hidden_layers"] - {missing}):
    writer.add_tensor(f"blk.{{layer}}.attn_q.weight", np.zeros((4, 4), np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def stub_converter(
    folder: Path, *, before: str = "", tokens: bool = True, missing: int = 0
) -> Path:
    """A folder of llama.cpp's with a script in it that writes a small, real GGUF file."""
    folder.mkdir()
    text = STUB.format(before=before, tokens=tokens, missing=missing)
    (folder / "convert_hf_to_gguf.py").write_text(text)
    return folder
