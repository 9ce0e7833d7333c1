"""What one command keeps for the next: it spares time and decides nothing.

Whatever is damaged, of another form or cannot be written is as if it had never been kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from equiloss.errors import UserError
from equiloss.records.atomic import write_atomically

CACHE = "EQUILOSS_CACHE"


def recall(kind: str, about: Path) -> dict[str, Any]:
    """What is kept of a directory, if it is what was written; an earlier version may have done so.

    Args:
        kind: What is kept, a word.
        about: The directory that it is about.
    """
    with suppress(OSError, ValueError, RuntimeError):  # of too deep a text, or without a home
        digest, _, text = _file(kind, about).read_text().partition("\n")
        known = json.loads(text) if digest == _digest(text) else None
        if isinstance(known, dict):
            return known
    return {}


def remember(kind: str, about: Path, known: dict[str, Any]) -> None:
    """Keep plain data in $EQUILOSS_CACHE, or ~/.cache/equiloss, in place of what was there."""
    with suppress(OSError, UserError, UnicodeEncodeError, RuntimeError):
        file = _file(kind, about)
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(known)
        write_atomically(file, f"{_digest(text)}\n{text}")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _file(kind: str, about: Path) -> Path:
    cache = Path(os.environ.get(CACHE) or Path("~/.cache/equiloss").expanduser())
    name = hashlib.blake2b(os.fsencode(about.resolve()), digest_size=12).hexdigest()
    return cache / kind / f"{name}.json"
