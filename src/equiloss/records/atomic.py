"""Atomic writes of text files."""

from __future__ import annotations

import os
from pathlib import Path

from equiloss.records.reading import open_no_link
from equiloss.records.writing import ELSEWHERE, writing


def write_atomically(path: Path, text: str, elsewhere: str = ELSEWHERE) -> None:
    """Replace a text file in one step, so that no reader sees half of it.

    Args:
        path: The file.
        text: What it is to hold.
        elsewhere: As of `writing`.

    Raises:
        FileError: if it cannot be written; what was there before is there still.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path, elsewhere):
        try:
            with open(temporary, "w", encoding="utf-8", opener=open_no_link) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # an interrupt too
            temporary.unlink(missing_ok=True)
            raise
