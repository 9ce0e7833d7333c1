"""`train.log` of a run directory: what a run is, its epochs, its warnings, and how it ended."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path

from equiloss.errors import printable
from equiloss.records.reading import open_no_link
from equiloss.records.run_dir import TRAIN_LOG


def note(run_dir: Path, *lines: str) -> None:
    """Append lines with the time of day; a log that cannot be written ends no run."""
    now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    append(run_dir, "".join(f"{now} {printable(line)}\n" for line in lines))


def append(run_dir: Path, text: str) -> None:
    """Append text as it is."""
    with (
        suppress(OSError),
        open(run_dir / TRAIN_LOG, "a", encoding="utf-8", opener=open_no_link) as log,
    ):
        log.write(text)
