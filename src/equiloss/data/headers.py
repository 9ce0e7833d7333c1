"""What image files say of themselves, read before a run begins and remembered for the next.

A file that is empty, cut off in its header, or no image at all is found here in seconds, and not
after an epoch. Only the headers are read: a file that is damaged further on is found when it is
decoded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from equiloss.data import many_files
from equiloss.data.decoding import pil, too_large
from equiloss.errors import DataError
from equiloss.records.remembered import recall, remember

KIND = "headers"
# Of EXIF: from 5 on, height and width change places.
ORIENTATION = 0x0112


class Header(NamedTuple):
    """An image as it is shown."""

    width: int
    height: int
    mode: str
    """PIL's name of what a pixel is."""


def read(file: Path) -> Header | None:
    """Read the header of one file, or None where PIL knows no image in it.

    Raises:
        DataError: for a file that cannot be opened, or holds more pixels than PIL reads.
    """
    Image, _ = pil()  # noqa: N806
    try:
        with Image.open(file) as image:
            width, height = image.size
            # Not its own method: that decodes a whole PNG to see what stands behind the pixels.
            orientation = Image.Image.getexif(image).get(ORIENTATION, 1)
            if orientation >= 5 and image.format != "TIFF":  # whose size is as it is shown
                width, height = height, width
            return Header(width, height, image.mode)
    except Image.DecompressionBombError as error:
        raise too_large(file, error) from error
    except Exception as error:  # PIL reports broken files through whatever its parsers raise
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"cannot read image {file}: {error.strerror}") from error
        return None


def read_all(files: Sequence[Path], root: Path) -> list[Header | None]:
    """Read the headers of many files; those that have not changed since are remembered.

    What was read is kept by root, path, size and time of change in $EQUILOSS_CACHE, which is
    ~/.cache/equiloss unless it is set.
    """
    memory = _Memory(root)
    headers = [memory.recall(file) for file in files]
    unread = [number for number, header in enumerate(headers) if header is None]
    read_now = many_files.of_each(read, [files[number] for number in unread])
    shown = many_files.shown(read_now, len(unread), "looking at images")
    for number, header in zip(unread, shown, strict=True):
        headers[number] = header
        memory.add(files[number], header)
    memory.save()
    return headers


def is_named_as_image(file: Path) -> bool:
    """Whether a file's ending is one of those that PIL reads, so that it should be an image."""
    Image, _ = pil()  # noqa: N806
    return Image.registered_extensions().get(file.suffix.lower()) in Image.OPEN


class _Memory:
    """Headers by path below a root, size and time of change."""

    def __init__(self, root: Path) -> None:
        self.below = os.path.join(root, "")  # noqa: PTH118  # with a separator at its end
        self.root = root
        # A text for each file, not a list: many small objects take longer than to take it apart.
        self.known = recall(KIND, root)
        self.seen: dict[str, str] = {}
        self.stamps: dict[str, str] = {}

    def recall(self, file: Path) -> Header | None:
        """A file's header, or None where that is not known."""
        try:
            status = os.stat(file)  # noqa: PTH116  # in a third of the time
        except OSError as error:
            raise DataError(f"cannot read image {file}: {error.strerror}") from error
        key, stamp = self._key(file), f"{status.st_size} {status.st_mtime_ns} "
        known = self.known.get(key)
        # Whoever wrote it may have written anything.
        if isinstance(known, str) and known.startswith(stamp):
            match known[len(stamp) :].split(" "):
                case [width, height, mode] if width.isdecimal() and height.isdecimal():
                    self.seen[key] = known
                    return Header(int(width), int(height), mode)
        self.stamps[key] = stamp
        return None

    def add(self, file: Path, header: Header | None) -> None:
        """Remember what was read of a file; another PIL may know one that this one does not."""
        if header is not None:
            key = self._key(file)
            self.seen[key] = self.stamps[key] + " ".join(map(str, header))

    def _key(self, file: Path) -> str:
        return os.fspath(file).removeprefix(self.below)

    def save(self) -> None:
        """Keep what was seen, where that is possible: it only spares time."""
        if self.seen != self.known:
            remember(KIND, self.root, self.seen)
