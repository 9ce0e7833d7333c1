"""Predictions for files: which of them, and in which form they are written down."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from equiloss.data import headers, many_files
from equiloss.data.folder import by_parts, files_below
from equiloss.errors import DataError
from equiloss.prediction.model import TrainedModel
from equiloss.records.results import json_ready


class Row(NamedTuple):
    """What was found of one file."""

    file: Path
    top: list[tuple[str, float]]
    """The most probable classes with their probabilities, the first first; none for a broken
    file."""
    error: str | None = None


def listed(paths: Iterable[str], *, lines: Iterable[str] = ()) -> tuple[list[Path], int]:
    """The image files that paths name, and how many files below folders are passed over.

    Args:
        paths: Files, folders (looked into at any depth, in the order of names), or `-` for lines.
        lines: What stands on standard input: a path each.

    Raises:
        DataError: for a path at which there is nothing.
    """
    files: list[Path] = []
    passed_over = 0
    for name in paths:
        if name == "-":
            files += [Path(line.rstrip("\n")) for line in lines if line.strip()]
            continue
        path = Path(name)
        if path.is_dir():
            below = sorted(files_below(path), key=by_parts)
            images = [file for file in below if _is_image(file)]
            passed_over += len(below) - len(images)
            files += images
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"no file or folder at {path}")
    return files, passed_over


def _is_image(file: Path) -> bool:
    return headers.is_named_as_image(file) or headers.read(file) is not None


def predict(
    model: TrainedModel,
    files: Sequence[Path],
    *,
    top: int = 1,
    batch_size: int = 64,
    resizes: bool = False,
) -> Iterator[Row]:
    """Predict files in their order; one that cannot be read is a row that says why."""

    def read(file: Path) -> Tensor | str:
        try:
            return model.read(file, resizes=resizes)
        except DataError as error:
            return str(error)

    read_all = many_files.shown(many_files.of_each(read, files), len(files), "predicting")
    waiting: list[tuple[Path, Tensor | str]] = []
    for file, image in zip(files, read_all, strict=True):
        waiting.append((file, image))
        if len(waiting) == batch_size:
            yield from _rows(model, waiting, top)
            waiting = []
    yield from _rows(model, waiting, top)


def _rows(model: TrainedModel, read: list[tuple[Path, Tensor | str]], top: int) -> Iterator[Row]:
    images = [image for _, image in read if isinstance(image, Tensor)]
    found: Iterator[list[tuple[str, float]]] = iter(())
    if images:
        found = iter(model.predict(torch.stack(images), batch_size=len(images)).top(top))
    for file, image in read:
        yield Row(file, [], image) if isinstance(image, str) else Row(file, next(found))


def written(rows: Sequence[Row], output: Path) -> str:
    """The text of a file of predictions, .json or .csv; JSON has the broken files too.

    A probability that is not finite is null in JSON.
    """
    if output.suffix == ".json":
        entries = [
            {"path": _path(row), "error": row.error}
            if row.error is not None
            else {
                "path": _path(row),
                "classes": [{"name": name, "probability": value} for name, value in row.top],
            }
            for row in rows
        ]
        return json.dumps(json_ready(entries), indent=1, allow_nan=False) + "\n"
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    most = max((len(row.top) for row in rows), default=1)
    names = [
        (f"class_{n}", f"probability_{n}") if n > 1 else ("class", "probability")
        for n in range(1, most + 1)
    ]
    table.writerow(["path", *(name for pair in names for name in pair)])
    for row in rows:
        if row.error is None:
            table.writerow([_path(row), *(value for pair in row.top for value in pair)])
    return text.getvalue()


def _path(row: Row) -> str:
    """A file's path; bytes that are no UTF-8, which no such file can hold, are written out."""
    return os.fsencode(row.file).decode("utf-8", "backslashreplace")
