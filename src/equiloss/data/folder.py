"""Image folders: one directory for each class, read while the training goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from equiloss.config import DataConfig
from equiloss.data.files import SPLIT_NAMES, Files, Looked, decoder_of, draw_missing, from_files
from equiloss.data.splits import Splits
from equiloss.errors import ConfigError, DataError

# What systems leave beside pictures, as files that begin with a dot do.
LEFT_BEHIND = ("thumbs.db", "desktop.ini")


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
    decoder = decoder_of(config, channels)
    root = Path(config.root)
    try:
        places, unused = _places(root)
        listed = {
            split: {each: sorted(files_below(each), key=by_parts) for each in _directories(place)}
            for split, place in places.items()
        }
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    class_names = [directory.name for directory in listed["train"]]
    if len(class_names) == 1:
        _refuse_one_class(next(iter(listed["train"])))
    everything = [file for by_class in listed.values() for own in by_class.values() for file in own]
    looked = Looked(everything, root, config)
    files = {split: _read(by_class, class_names, looked) for split, by_class in listed.items()}
    for place in places.values():
        loose = sum(1 for entry in _below(place) if not entry.is_dir())
        unused += [f"{loose} files in {place} beside the class folders"] * (loose > 0)
    draw_missing(files, config, str(places["train"]))
    notes = [f"not used: {', '.join(unused)}"] if unused else []
    return from_files(config, files, class_names, decoder, looked, root=root, notes=notes)


def _places(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The directories of splits, and what stands beside them and is not used."""
    if not root.is_dir():
        raise DataError(f"no such directory: {root}. Set data.root= to the one of the classes")
    folders = [entry for entry in _below(root) if entry.is_dir()]
    places: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        given = [folder for folder in folders if folder.name.lower() in names]
        if len(given) > 1:
            both = " and ".join(map(str, given))
            raise DataError(f"{both} may both be the {split} split: move one away")
        if given:
            places[split] = given[0]
            folders.remove(given[0])
    if "train" not in places or not _has_folders(places["train"]):
        return {"train": root}, []  # then these are names of classes
    unused = []
    for split, place in list(places.items()):
        if not _has_folders(place):
            unused.append(f"{place} ({len(_below(place))} files without folders of classes)")
            del places[split]
    return places, [*unused, *map(str, folders)]


def _has_folders(place: Path) -> bool:
    return any(entry.is_dir() for entry in _below(place))


def _refuse_one_class(directory: Path) -> None:
    inside = [entry.name for entry in _below(directory)]
    shown = ", ".join(inside[:3]) + (", …" if len(inside) > 3 else "")
    raise DataError(
        f"{directory.parent} has a single class folder, {directory.name} ({shown}): there is "
        "nothing to tell apart; set data.root= to the directory whose folders are the classes"
    )


def _read(by_class: dict[Path, list[Path]], class_names: list[str], looked: Looked) -> Files:
    paths: list[Path] = []
    labels: list[int] = []
    for directory, files in by_class.items():
        if directory.name not in class_names:
            raise DataError(
                f"class folder {directory} has no counterpart among the training classes: "
                f"{', '.join(class_names)}"
            )
        images = [file for file in files if looked.image(file) is not None]
        if not images:
            raise DataError(f"class folder {directory} holds no image that PIL can open")
        paths += images
        labels += [class_names.index(directory.name)] * len(images)
    return Files(paths, torch.tensor(labels))


def by_parts(path: Path) -> str:
    """Sorts as paths do, which would take themselves apart in each comparison."""
    return os.fspath(path).replace(os.sep, "\0")


def _below(directory: Path) -> list[Path]:
    """What is in a directory, sorted, without what is hidden or left behind by a system."""
    return sorted(
        entry
        for entry in directory.iterdir()
        if not entry.name.startswith(".") and entry.name.lower() not in LEFT_BEHIND
    )


def files_below(directory: Path, seen: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
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
                yield from files_below(path, seen | {place})
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
