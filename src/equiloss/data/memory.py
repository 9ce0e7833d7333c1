"""`data.cache=memory`: what was decoded is kept, for the epochs and for the jobs of a process."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from equiloss.data import many_files
from equiloss.distributed import membership
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
            try:
                status = os.stat(file)  # noqa: PTH116  # in a third of the time
            except OSError as error:
                raise DataError(f"cannot read image {file}: {error.strerror}") from error
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
    ranks, free = membership.ranks_here(), free_memory()
    missing = ranks * sum(sizes[key] for key in sizes.keys() - _kept.keys())
    count = sum(len(images.files) for images in splits)
    what = f"{count:,} images of {'x'.join(map(str, splits[0].image_shape))}"
    if free is not None and missing > SHARE * free:
        each = f" in each of {ranks} processes" * (ranks > 1)
        raise DataError(
            f"data.cache=memory takes {missing / MIB:,.0f} MiB for {what}{each}, and "
            f"{free / MIB:,.0f} MiB are free: set a smaller data.image_size=, or data.cache=none"
        )
    return f"{what} are kept in memory once decoded, {sum(sizes.values()) / MIB:,.0f} MiB a process"


def forget() -> None:
    """Let go of all images that no run holds any more."""
    _kept.clear()


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process may still take, or None where the system does not say.

    Args:
        proc: Where Linux tells of the machine and of this process.
        groups: Where it tells what groups of processes may take.
    """
    limits = []
    with suppress(OSError, ValueError):
        limits.append(1024 * _named(proc / "meminfo", "MemAvailable:"))
    # That of the group as this process sees it, and of those it may lie in.
    places = [groups, *_groups(proc / "self/cgroup", groups)]
    for place in (*places, groups / "memory"):
        for most, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):  # no such file, or "max"
                # What was read of files makes room for what is asked for.
                taken = int((place / used).read_text()) - _named(place / "memory.stat", cached)
                limits.append(int((place / most).read_text()) - taken)
    return max(0, min(limits)) if limits else None


def _named(file: Path, name: str) -> int:
    """The number behind a name; raises ValueError where there is none."""
    words = file.read_text().split()
    return int(words[words.index(name) + 1])


def _groups(file: Path, root: Path) -> Iterator[Path]:
    """The groups that a process lies in, of version 2, or of version 1 for memory."""
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds or "memory" in kinds.split(","):
                place = root / ("memory" if kinds else "") / path.lstrip("/")
                yield from (place, *place.parents[: len(Path(path).parts) - 1])
