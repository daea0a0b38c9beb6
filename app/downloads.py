"""Files that are made for one download, each in a folder of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path


def text_file(name: str, text: str) -> str:
    """A new file for download, in a folder of its own."""
    path = Path(tempfile.mkdtemp(prefix="gapo-lite-")) / name
    path.write_text(text, encoding="utf-8")
    return str(path)
