"""What a child process may know of the server's environment, how it speaks to the server, and what
of its words may be shown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gapo_lite.terminal import visible

_ROOT = Path(__file__).parents[1]

_PASSED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TZ|TERM|LANG|LANGUAGE|LC_\w+|TMPDIR|TMP|TEMP|XDG_\w+"
    r"|PYTHON(PATH|HOME|UTF8|HASHSEED|IOENCODING|NOUSERSITE|DONTWRITEBYTECODE|PYCACHEPREFIX)"
    r"|VIRTUAL_ENV|CONDA_\w+|LD_LIBRARY_PATH|LD_PRELOAD"
    r"|(CUDA|NVIDIA|NCCL|TRITON|PYTORCH|TORCH|TORCHINDUCTOR|OMP|MKL|KMP|OPENBLAS|BNB)_\w+"
    r"|(HF|HUGGINGFACE|TRANSFORMERS|TOKENIZERS|DATASETS|UNSLOTH|WANDB|TRACKIO|GAPO_LITE)_\w+"
    r"|(?i:https?_proxy|all_proxy|no_proxy)|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE"
)
"""Environment variables that training may need; never GRADIO_*, nor RANK and its kin."""

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)"  # OSC and other strings: titles, links
    r"|\x1b[ -/]*[0-~]",
    re.MULTILINE,
)
_SECRET_NAME = re.compile(r"(?i:key|token|secret|password|passwd|credentials?)")
_SECRETS = (
    (re.compile(r"\bhf_(?:[A-Za-z0-9]{9,}|[A-Za-z]*\d\w+)"), "***"),
    (re.compile(r"\bsk-[\w-]{8,}"), "***"),
    (re.compile(r"\b(?:gh[a-z]_|github_pat_|glpat-|xox[a-z]-|AKIA|AIza|eyJ)[\w.-]{10,}"), "***"),
    (re.compile(rf"({_SECRET_NAME.pattern}[\"']?\s*=\s*[\"']?)[^\s\"'&,;)]+"), r"\1***"),
    (re.compile(rf"({_SECRET_NAME.pattern}[\"']\s*:\s*[\"'])[^\"']+"), r"\1***"),
    (re.compile(r"(?i)\b(bearer|authorization: basic)\s+[\w.~+/=-]{6,}"), r"\1 ***"),
    (re.compile(r"://[^/\s@]+@"), "://***@"),  # of a proxy
)


def environment() -> dict[str, str]:
    """The variables that training, exports and models may need, and no others."""
    passed = {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}
    paths = [str(_ROOT), *filter(None, [passed.get("PYTHONPATH")])]
    return passed | {"PYTHONPATH": os.pathsep.join(paths)}  # the page may run from any folder


def own_stdout() -> Callable[[dict[str, Any]], None]:
    """Called in a child: keeps stdout for messages, a line of JSON each, and returns what writes
    one. What libraries print goes to stderr from here on, also from C. Where the server has gone,
    so does the child."""
    messages = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def tell(message: dict[str, Any]) -> None:
        try:
            messages.write(json.dumps(message).encode() + b"\n")
            messages.flush()
        except BrokenPipeError:
            os._exit(1)

    return tell


def cleaned(text: str) -> str:
    """Text without escapes, overwritten progress and secrets, its control characters shown."""
    lines = (_ESCAPES.sub("", line).rstrip("\r") for line in text.split("\n"))
    text = visible("\n".join(line.rpartition("\r")[2] for line in lines))
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text
