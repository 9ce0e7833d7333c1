"""Image folders: one directory for each class, read while the training goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from equiloss.config import DataConfig
from equiloss.data.sources import FileSource
from equiloss.data.splits import SPLITS, Splits, holdout, limited, long_tailed
from equiloss.errors import ConfigError, DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")

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
    """Image files in `root/<class>/`, or in `root/{train,val,test}/<class>/`.

    A split without a directory is drawn from the training files by `val_fraction` or
    `test_fraction`. Images are decoded when they are needed, and normalised with ImageNet's
    statistics unless the configuration has some.

    Args:
        config: `root` is needed, and `image_size` where the files have different sizes.
        channels: 3 for RGB, 1 for grey.

    Raises:
        ConfigError: without a root, or for another number of channels.
        DataError: for directories that are missing or empty, and for a class in val or test that
            training lacks.
    """
    if config.root is None:
        raise ConfigError("data=image_folder needs data.root=, the directory of the classes")
    if channels not in (1, 3):
        raise ConfigError(f"data.options.channels is 1 (grey) or 3 (RGB), got {channels}")
    root = Path(config.root)
    class_names, files = _find(root, config)
    sources = {}
    tail = long_tailed(files["train"].targets, class_names, config)
    if tail is not None:
        files["train"] = files["train"].at(tail)
    for split in SPLITS:
        rows = limited(len(files[split].paths), config)
        paths, targets = files[split] if rows is None else files[split].at(rows)
        sources[split] = FileSource(
            paths, targets, channels=channels, image_size=config.image_size, root=root
        )
    grey = channels == 1
    mean = (sum(IMAGENET_MEAN) / 3,) if grey else IMAGENET_MEAN
    std = (sum(IMAGENET_STD) / 3,) if grey else IMAGENET_STD
    return Splits(**sources, class_names=tuple(class_names), mean=mean, std=std)


def _find(root: Path, config: DataConfig) -> tuple[list[str], dict[str, Files]]:
    has_splits = (root / "train").is_dir()
    train_root = root / "train" if has_splits else root
    class_names = [directory.name for directory in _directories(train_root)]
    files = {"train": _read(train_root, class_names)}
    # Where both are drawn, test leaves two files of each class: one for val, one for train.
    for split, fraction, reserve in (
        ("test", config.test_fraction, 2),
        ("val", config.val_fraction, 1),
    ):
        if has_splits and (root / split).is_dir():
            files[split] = _read(root / split, class_names)
            continue
        train = files["train"]
        kept, held = holdout(train.targets, fraction, seed=config.split_seed, reserve=reserve)
        if not len(held):
            raise DataError(
                f"{train_root} holds too few images to draw a {split} split from: each class "
                "needs at least 3"
            )
        files["train"], files[split] = train.at(kept), train.at(held)
    return class_names, files


def _read(root: Path, class_names: list[str]) -> Files:
    paths: list[Path] = []
    labels: list[int] = []
    for directory in _directories(root):
        if directory.name not in class_names:
            raise DataError(
                f"class folder {directory} has no counterpart among the training classes: "
                f"{', '.join(class_names)}"
            )
        images = sorted(_images(directory))
        if not images:
            raise DataError(
                f"class folder {directory} holds no image: files end in {', '.join(SUFFIXES)}"
            )
        paths += images
        labels += [class_names.index(directory.name)] * len(images)
    return Files(paths, torch.tensor(labels))


def _images(directory: Path) -> Iterator[Path]:
    """Regular files that end as images do, also behind links; opening a pipe would never end."""
    with os.scandir(directory) as entries:
        for entry in entries:
            path = directory / entry.name
            if path.suffix.lower() not in SUFFIXES:
                continue
            # What scandir has found out of most entries spares a look at each file.
            if entry.is_file(follow_symlinks=False) or path.is_file():
                yield path
            elif not path.exists():
                raise DataError(f"image {path} is a link that leads nowhere: remove or mend it")


def _directories(root: Path) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"no such directory: {root}. Set data.root= to the one of the classes")
    directories = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not directories:
        raise DataError(
            f"{root} has no class folders: images belong into {root / '<class>'}, or into "
            f"{root / 'train' / '<class>'} with val and test beside train"
        )
    return directories
