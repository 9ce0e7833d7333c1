"""Atomic writes of text files."""

from __future__ import annotations

import os
from pathlib import Path

from equiloss.records.reading import open_no_link


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step, so that no reader sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", opener=open_no_link) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
