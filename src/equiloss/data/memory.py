"""`data.cache=memory`: what was decoded is kept, for the epochs and for the jobs of a process."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from equiloss.data import many_files
from equiloss.errors import DataError

# Of the memory that is free, what images may take: networks and batches need some too.
SHARE = 0.8
MIB = 2**20

_kept: dict[str, Tensor] = {}
"""Images [N, C, H, W] uint8 of the splits that were read last, by what they were read from."""


class Images(NamedTuple):
    """The images of a split, decoded or not."""

    files: Sequence[Path]
    """N of them."""
    image_shape: tuple[int, int, int]
    """(C, H, W) of each image."""
    read_as: str
    """How files become images, in words."""
    decode: Callable[[Path], Tensor]
    """[C, H, W] uint8 of a file."""

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return len(self.files) * math.prod(self.image_shape)

    def key(self) -> str:
        """A digest of what the images depend on: files, sizes and times, and how they are read."""
        digest = hashlib.blake2b(self.read_as.encode(), digest_size=16)
        for file in self.files:
            status = os.stat(file)  # noqa: PTH116  # in a third of the time
            digest.update(os.fsencode(file.absolute()))
            digest.update(f"\0{status.st_size} {status.st_mtime_ns}\0".encode())
        return digest.hexdigest()


def decoded(images: Images) -> Tensor:
    """All images of a split [N, C, H, W] uint8, decoded once in a process."""
    key, total = images.key(), len(images.files)
    if key not in _kept:
        made = torch.empty(total, *images.image_shape, dtype=torch.uint8)
        each = many_files.of_each(images.decode, images.files)
        for row, image in enumerate(many_files.shown(each, total, "decoding images")):
            made[row] = image
        _kept[key] = made
    return _kept[key]


def make_room(splits: Sequence[Images]) -> str:
    """Forget what other splits have left, and see whether these fit.

    Returns:
        A note of how much they take.

    Raises:
        DataError: with both numbers, if they do not fit.
    """
    sizes = {images.key(): images.size for images in splits}
    for key in _kept.keys() - sizes.keys():
        del _kept[key]
    missing, free = sum(sizes[key] for key in sizes.keys() - _kept.keys()), free_memory()
    count = sum(len(images.files) for images in splits)
    what = f"{count:,} images of {'x'.join(map(str, splits[0].image_shape))}"
    if free is not None and missing > SHARE * free:
        raise DataError(
            f"data.cache=memory takes {missing / MIB:,.0f} MiB for {what}, and "
            f"{free / MIB:,.0f} MiB are free: set a smaller data.image_size=, or data.cache=none"
        )
    return f"{what} are kept in memory once decoded, {sum(sizes.values()) / MIB:,.0f} MiB a process"


def forget() -> None:
    """Let go of all images that no run holds any more."""
    _kept.clear()


def free_memory() -> int | None:
    """Bytes that this process may still take, or None where the system does not say."""
    limits = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        limits.append(int(available.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int((group / most).read_text()) - int((group / used).read_text()))
    return max(0, min(limits)) if limits else None
