"""Image folders: one directory for each class, read while the training goes on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from equiloss.config import DataConfig
from equiloss.data import headers
from equiloss.data.decoding import DARK, DEEP_MODES, Decoder, brightest
from equiloss.data.sources import FileSource
from equiloss.data.splits import SPLITS, Splits, holdout, limited, long_tailed
from equiloss.errors import ConfigError, DataError

# What directories of the splits are called.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
# What systems leave beside pictures, as files that begin with a dot do.
LEFT_BEHIND = ("thumbs.db", "desktop.ini")
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


def image_folder(config: DataConfig, *, channels: int = 3) -> Splits:
    """Image files below `root/<class>/`, or below `root/{train,val,test}/<class>/`.

    Every file that PIL can open is an image, in sub-folders too; what is not used is counted in a
    note. A split without a directory is drawn from the training files by `val_fraction` or
    `test_fraction`. Images are decoded when they are needed, and normalised with ImageNet's
    statistics unless the configuration has some.

    Args:
        config: `root` is needed, and `image_size` where the files have different sizes.
        channels: 3 for RGB, 1 for grey.

    Raises:
        ConfigError: without a root, or for another number of channels.
        DataError: for directories that are missing or empty, for a single class, for a class in
            val or test that training lacks, and for a file that ends as images do and is none.
    """
    if config.root is None:
        raise ConfigError("data=image_folder needs data.root=, the directory of the classes")
    if channels not in (1, 3):
        raise ConfigError(f"data.options.channels is 1 (grey) or 3 (RGB), got {channels}")
    value_range = None if config.range is None else (config.range[0], config.range[1])
    decoder = Decoder(channels, _colour(config.background), value_range)
    found = _Found(Path(config.root), config)
    class_names, files = found.class_names, found.files
    sources = {}
    tail = long_tailed(files["train"].targets, class_names, config)
    if tail is not None:
        files["train"] = files["train"].at(tail)
    for split in SPLITS:
        rows = limited(len(files[split].paths), config)
        paths, targets = files[split] if rows is None else files[split].at(rows)
        sources[split] = FileSource(
            paths, targets, decoder=decoder, image_size=config.image_size, root=found.root
        )
    grey = channels == 1
    mean = (sum(IMAGENET_MEAN) / 3,) if grey else IMAGENET_MEAN
    std = (sum(IMAGENET_STD) / 3,) if grey else IMAGENET_STD
    return Splits(
        **sources,
        class_names=tuple(class_names),
        mean=mean,
        std=std,
        notes=(*found.notes(), *_notes_on_depth(found.deep, value_range)),
    )


def _colour(name: str) -> str:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(name)
    except ValueError:
        raise ConfigError(
            f"data.background={name} is no colour: give a name, such as white or black, or #rrggbb"
        ) from None
    return name


class _Found:
    """The image files of a directory, by split and class.

    Args:
        root: The directory.
        config: How what has no directory of its own is drawn.
    """

    def __init__(self, root: Path, config: DataConfig) -> None:
        self.root = root
        self.unused: list[str] = []
        """What is not used, with the reason."""
        self.unread: list[Path] = []
        """Files that are no images."""
        self.deep: list[Path] = []
        """Images of more than 8 bits."""
        self.first: tuple[Path, headers.Header] | None = None
        self.same_size = config.image_size is None
        places = self._places()
        train_root = places.setdefault("train", root)
        directories = _directories(train_root)
        self.class_names = [directory.name for directory in directories]
        listed = {
            directory: sorted(_files(directory))
            for place in places.values()
            for directory in _directories(place)
        }
        everything = [file for files in listed.values() for file in files]
        self.listed = listed
        self.headers = dict(zip(everything, headers.read_all(everything, root), strict=True))
        for place in places.values():
            loose = sum(1 for entry in _below(place) if not entry.is_dir())
            self.unused += [f"{loose} files in {place} beside the class folders"] * (loose > 0)
        self.files = {"train": self._read(train_root)}
        if len(directories) == 1:
            self._refuse_one_class(directories[0])
        # Where both are drawn, test leaves two files of each class: one for val, one for train.
        for split, fraction, reserve in (
            ("test", config.test_fraction, 2),
            ("val", config.val_fraction, 1),
        ):
            if split in places:
                self.files[split] = self._read(places[split])
                continue
            train = self.files["train"]
            kept, held = holdout(train.targets, fraction, seed=config.split_seed, reserve=reserve)
            if not len(held):
                raise DataError(
                    f"{train_root} holds too few images to draw a {split} split from: each class "
                    "needs at least 3"
                )
            self.files["train"], self.files[split] = train.at(kept), train.at(held)

    def _places(self) -> dict[str, Path]:
        """The directories of splits; what stands beside them and is not used is noted."""
        if not self.root.is_dir():
            raise DataError(
                f"no such directory: {self.root}. Set data.root= to the one of the classes"
            )
        by_name = {entry.name.lower(): entry for entry in _below(self.root) if entry.is_dir()}
        places: dict[str, Path] = {}
        for split, names in SPLIT_NAMES.items():
            given = [by_name[name] for name in names if name in by_name]
            if len(given) > 1:
                both = " and ".join(map(str, given))
                raise DataError(f"{both} may both be the {split} split: move one away")
            if given:
                places[split] = given[0]
        if "train" not in places or not any(entry.is_dir() for entry in _below(places["train"])):
            return {}  # then these are names of classes
        for split, place in list(places.items()):
            if split != "train" and not any(entry.is_dir() for entry in _below(place)):
                count = sum(1 for entry in _below(place))
                self.unused.append(f"{place} ({count} files without folders of classes)")
                del places[split]
        beside = [entry for name, entry in by_name.items() if entry not in places.values()]
        known = {place.split(" (")[0] for place in self.unused}
        self.unused += [str(entry) for entry in beside if str(entry) not in known]
        return places

    def _refuse_one_class(self, directory: Path) -> None:
        inside = [entry.name for entry in _below(directory)]
        shown = ", ".join(inside[:3]) + (", …" if len(inside) > 3 else "")
        raise DataError(
            f"{directory.parent} has a single class folder, {directory.name} ({shown}): there is "
            "nothing to tell apart; set data.root= to the directory whose folders are the classes"
        )

    def _read(self, root: Path) -> Files:
        paths: list[Path] = []
        labels: list[int] = []
        for directory in _directories(root):
            if directory.name not in self.class_names:
                raise DataError(
                    f"class folder {directory} has no counterpart among the training classes: "
                    f"{', '.join(self.class_names)}"
                )
            images = list(self._images(self.listed[directory]))
            if not images:
                raise DataError(f"class folder {directory} holds no image that PIL can open")
            paths += images
            labels += [self.class_names.index(directory.name)] * len(images)
        return Files(paths, torch.tensor(labels))

    def _images(self, files: Sequence[Path]) -> Iterator[Path]:
        for file in files:
            header = self.headers[file]
            if header is None:
                if headers.is_named_as_image(file):
                    raise DataError(
                        f"cannot read image {file}: PIL finds no image in it "
                        f"({file.stat().st_size:,} bytes); mend or remove it"
                    )
                self.unread.append(file)
                continue
            if header.mode in DEEP_MODES:
                self.deep.append(file)
            self._check_size(file, header)
            yield file

    def _check_size(self, file: Path, header: headers.Header) -> None:
        if not self.same_size:
            return
        self.first = self.first or (file, header)
        other, size = self.first
        if (header.width, header.height) != (size.width, size.height):
            raise DataError(
                f"image {file} has {header.height}x{header.width} pixels and {other} has "
                f"{size.height}x{size.width}: set data.image_size= to resize them all"
            )

    def notes(self) -> Iterator[str]:
        """What is not used, in a line each."""
        if self.unused:
            yield f"not used: {', '.join(self.unused)}"
        if self.unread:
            kinds = Counter(file.suffix.lower() or "no ending" for file in self.unread)
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
            yield (
                f"{len(self.unread)} files below {self.root} are no images that PIL can open, and "
                f"are not used: {counts} (the first is {self.unread[0]})"
            )


def _notes_on_depth(files: Sequence[Path], value_range: tuple[float, float] | None) -> list[str]:
    if not files:
        return []
    if value_range is not None:
        low, high = value_range
        return [f"{len(files)} images of more than 8 bits: {low:g} is black and {high:g} white"]
    shares = [brightest(file) for file in files[:: max(1, len(files) // SAMPLE)]]
    known = [share for share in shares if share is not None]
    note = f"{len(files)} images of 16 bits: 65535 is white (data.range=[BLACK,WHITE] changes that)"
    if known and max(known) < DARK:
        note += (
            f"; the brightest value of {len(known)} of them is {max(known) * 65535:.0f}, so they "
            "are nearly black: sensors of 12 bits need data.range=[0,4095]"
        )
    return [note]


def _below(directory: Path) -> list[Path]:
    """What is in a directory, sorted, without what is hidden or left behind by a system."""
    return sorted(
        entry
        for entry in directory.iterdir()
        if not entry.name.startswith(".") and entry.name.lower() not in LEFT_BEHIND
    )


def _files(directory: Path, seen: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Regular files at any depth, also behind links; opening a pipe would never end."""
    status = directory.stat()
    place = (status.st_dev, status.st_ino)
    if place in seen:
        return  # a link back to where it came from
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in LEFT_BEHIND:
                continue
            path = directory / entry.name
            # What scandir has found out of most entries spares a look at each file.
            if entry.is_dir():
                yield from _files(path, seen | {place})
            elif entry.is_file(follow_symlinks=False) or path.is_file():
                yield path
            elif not path.exists():
                raise DataError(f"image {path} is a link that leads nowhere: remove or mend it")


def _directories(root: Path) -> list[Path]:
    directories = [entry for entry in _below(root) if entry.is_dir()]
    if not directories:
        raise DataError(
            f"{root} has no class folders: images belong into {root / '<class>'}, or into "
            f"{root / 'train' / '<class>'} with val and test beside train"
        )
    return directories
