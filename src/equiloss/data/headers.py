"""What image files say of themselves, read before a run begins and remembered for the next.

A file that is empty, cut off in its header, or no image at all is found here in seconds, and not
after an epoch. Only the headers are read: a file that is damaged further on is found when it is
decoded.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

from equiloss.data.decoding import pil
from equiloss.errors import DataError, UserError
from equiloss.records.atomic import write_atomically
from equiloss.records.reading import fits

CACHE = "EQUILOSS_CACHE"
# Of EXIF: from 5 on, height and width change places.
ORIENTATION = 0x0112
# Seconds until a look at many files shows how far it is.
PATIENCE = 2.0


class Header(NamedTuple):
    """An image as it is shown."""

    width: int
    height: int
    mode: str
    """PIL's name of what a pixel is."""


def read(file: Path) -> Header | None:
    """Read the header of one file, or None where PIL knows no image in it."""
    Image, _ = pil()  # noqa: N806
    try:
        with Image.open(file) as image:
            width, height = image.size
            if image.getexif().get(ORIENTATION, 1) >= 5:
                width, height = height, width
            return Header(width, height, image.mode)
    except Exception:  # PIL reports broken files through whatever its parsers raise
        return None


def read_all(files: Sequence[Path], root: Path) -> list[Header | None]:
    """Read the headers of many files; those that have not changed since are remembered.

    What was read is kept by root, path, size and time of change in $EQUILOSS_CACHE, which is
    ~/.cache/equiloss unless it is set.
    """
    memory = _Memory(root)
    headers = [memory.header(file) for file in _shown(files)]
    memory.save()
    return headers


def is_named_as_image(file: Path) -> bool:
    """Whether a file's ending is one of those that PIL reads, so that it should be an image."""
    Image, _ = pil()  # noqa: N806
    return Image.registered_extensions().get(file.suffix.lower()) in Image.OPEN


class _Memory:
    """Headers by path below a root, size and time of change."""

    def __init__(self, root: Path) -> None:
        self.root = root
        cache = Path(os.environ.get(CACHE) or Path("~/.cache/equiloss").expanduser())
        name = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=12).hexdigest()
        self.file = cache / "headers" / f"{name}.json"
        self.known: dict[str, list[int | str]] = {}
        self.seen: dict[str, list[int | str]] = {}
        with suppress(OSError, ValueError, RecursionError):
            known = json.loads(self.file.read_text())
            if fits(known, dict[str, list[int | str]]):
                self.known = known

    def header(self, file: Path) -> Header | None:
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(f"cannot read image {file}: {error.strerror}") from error
        key = os.path.relpath(file, self.root)
        stamp = [status.st_size, status.st_mtime_ns]
        entry = self.known.get(key, [])
        if entry[:2] != stamp or len(entry) not in (2, 5):
            header = read(file)
            entry = [*stamp, *(header or ())]
        self.seen[key] = entry
        return Header(*entry[2:]) if len(entry) == 5 else None  # type: ignore[arg-type]

    def save(self) -> None:
        """Keep what was seen, where that is possible: it only spares time."""
        if self.seen == self.known:
            return
        with suppress(OSError, UserError, UnicodeEncodeError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, json.dumps(self.seen))


def _shown(files: Sequence[Path]) -> Iterator[Path]:
    """The files one by one, with a bar on a terminal where that takes long."""
    began = time.monotonic()
    shows = sys.stderr.isatty()
    with ExitStack() as stack:
        bar: Progress | None = None
        for number, file in enumerate(files):
            if shows and bar is None and time.monotonic() - began > PATIENCE:
                console = Console(stderr=True)
                bar = stack.enter_context(Progress(console=console, transient=True))
                bar.add_task("looking at images", total=len(files))
            if bar is not None:
                bar.update(bar.task_ids[0], completed=number)
            yield file
