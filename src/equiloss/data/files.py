"""Image files with labels, wherever the list of them comes from: headers, splits, sources."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from equiloss.config import DataConfig
from equiloss.data import headers, memory
from equiloss.data.decoding import DARK, DEEP_MODES, Decoder, brightest, without_range
from equiloss.data.sources import FileSource
from equiloss.data.splits import SPLITS, Splits, holdout, limited, long_tailed
from equiloss.errors import ConfigError, DataError

# What splits are called.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
# Files of more than 8 bits whose brightest value is looked for.
SAMPLE = 64

# Statistics of ImageNet's training images, which pretrained networks expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Files(NamedTuple):
    """Image files and their classes."""

    paths: list[Path]
    targets: Tensor
    """[N] int64."""

    def at(self, rows: Tensor) -> Files:
        """The files at these positions."""
        return Files([self.paths[row] for row in rows.tolist()], self.targets[rows])


class Looked:
    """What the headers of all files say, read at once.

    Args:
        files: All files of all splits.
        root: What they lie below.
        config: `image_size` and `range` are used.
    """

    def __init__(self, files: Sequence[Path], root: Path, config: DataConfig) -> None:
        # By text: the hash of a path takes it apart first.
        names = map(os.fspath, files)
        self.headers = dict(zip(names, headers.read_all(files, root), strict=True))
        self.root = root
        self.same_size = config.image_size is None
        self.value_range = range_of(config)
        self.unread: list[Path] = []
        """Files that are no images."""
        self.deep: list[Path] = []
        """Images of more than 8 bits."""
        self.first: tuple[Path, headers.Header] | None = None

    def image(self, file: Path) -> Path | None:
        """The file if it is an image, or None.

        Raises:
            DataError: for a file that ends as images do and is none, or of another size, or whose
                values have no range.
        """
        header = self.headers[os.fspath(file)]
        if header is None:
            if headers.is_named_as_image(file):
                raise DataError(
                    f"cannot read image {file}: PIL finds no image in it "
                    f"({file.stat().st_size:,} bytes); mend or remove it"
                )
            self.unread.append(file)
            return None
        if header.mode in DEEP_MODES:
            if DEEP_MODES[header.mode] is None and self.value_range is None:
                raise without_range(file, header.mode)
            self.deep.append(file)
        if self.same_size:
            self.first = self.first or (file, header)
            other, size = self.first
            if (header.width, header.height) != (size.width, size.height):
                raise DataError(
                    f"image {file} has {header.height}x{header.width} pixels and {other} has "
                    f"{size.height}x{size.width}: set data.image_size= to resize them all"
                )
        return file

    def notes(self) -> Iterator[str]:
        """What is not used, and what is white, in a line each."""
        if self.unread:
            kinds = Counter(file.suffix.lower() or "no ending" for file in self.unread)
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
            yield (
                f"{len(self.unread)} files below {self.root} are no images that PIL can open, and "
                f"are not used: {counts} (the first is {self.unread[0]})"
            )
        if not self.deep:
            return
        if self.value_range is not None:
            low, high = self.value_range
            count = len(self.deep)
            yield f"{count} images of more than 8 bits: {low:g} is black and {high:g} white"
            return
        shares = [brightest(file) for file in self.deep[:: max(1, len(self.deep) // SAMPLE)]]
        known = [share for share in shares if share is not None]
        note = (
            f"{len(self.deep)} images of 16 bits: 65535 is white (data.range=[BLACK,WHITE] changes "
            "that)"
        )
        if known and max(known) < DARK:
            note += (
                f"; the brightest value of {len(known)} of them is {max(known) * 65535:.0f}, so "
                "they are nearly black: sensors of 12 bits need data.range=[0,4095]"
            )
        yield note


def decoder_of(config: DataConfig, channels: int) -> Decoder:
    """The decoder that a configuration asks for.

    Raises:
        ConfigError: for another number of channels than 1 and 3, or what is no colour.
    """
    from PIL import ImageColor

    if channels not in (1, 3):
        raise ConfigError(f"data.options.channels is 1 (grey) or 3 (RGB), got {channels}")
    try:
        ImageColor.getrgb(config.background)
    except ValueError:
        raise ConfigError(
            f"data.background={config.background} is no colour: give a name, such as white or "
            "black, or #rrggbb"
        ) from None
    return Decoder(channels, config.background, range_of(config))


def range_of(config: DataConfig) -> tuple[float, float] | None:
    """The values of black and white that a configuration gives."""
    return None if config.range is None else (config.range[0], config.range[1])


def draw_missing(files: dict[str, Files], config: DataConfig, place: str) -> None:
    """Draw the splits that are not there from the training files.

    Raises:
        DataError: naming the place, where a class has too few files.
    """
    # Where both are drawn, test leaves two files of each class: one for val, one for train.
    for split, fraction, reserve in (
        ("test", config.test_fraction, 2),
        ("val", config.val_fraction, 1),
    ):
        if split in files:
            continue
        train = files["train"]
        kept, held = holdout(train.targets, fraction, seed=config.split_seed, reserve=reserve)
        if not len(held):
            raise DataError(
                f"{place} holds too few images to draw a {split} split from: each class needs at "
                "least 3"
            )
        files["train"], files[split] = train.at(kept), train.at(held)


def from_files(
    config: DataConfig,
    files: Mapping[str, Files],
    class_names: Sequence[str],
    decoder: Decoder,
    looked: Looked,
    *,
    root: Path,
    notes: Iterable[str] = (),
) -> Splits:
    """Make splits of image files, limited as `config` says, with ImageNet's statistics.

    Args:
        config: `long_tail`, `max_samples`, `image_size`, `split_seed` and `cache` are used.
        files: For train, val and test each.
        class_names: Names of the classes, in the order of the targets.
        decoder: Makes pixels of a file.
        looked: What the headers say.
        root: Directory that may move elsewhere with all files.
        notes: What a user should know beside what the headers say.
    """
    sources = {}
    for split in SPLITS:
        own = files[split]
        tail = long_tailed(own.targets, class_names, config) if split == "train" else None
        own = own if tail is None else own.at(tail)
        rows = limited(len(own.paths), config)
        paths, targets = own if rows is None else own.at(rows)
        sources[split] = FileSource(
            paths, targets, decoder=decoder, image_size=config.image_size, root=root
        )
    said = [*notes, *looked.notes()]
    if config.cache == "memory":
        said.append(memory.make_room([source.images for source in sources.values()]))
        for source in sources.values():
            source.keeps = True
    grey = decoder.channels == 1
    return Splits(
        sources["train"],
        sources["val"],
        sources["test"],
        class_names=tuple(class_names),
        mean=(sum(IMAGENET_MEAN) / 3,) if grey else IMAGENET_MEAN,
        std=(sum(IMAGENET_STD) / 3,) if grey else IMAGENET_STD,
        notes=tuple(said),
    )
