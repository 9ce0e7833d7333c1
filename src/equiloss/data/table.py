"""Pictures that a table lists: a column of paths, one of labels, and perhaps one of splits."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from equiloss.config import DataConfig
from equiloss.data.files import SPLIT_NAMES, Files, Looked, decoder_of, draw_missing, from_files
from equiloss.data.splits import Splits
from equiloss.errors import ConfigError, DataError, unknown

SEPARATORS = ",;\t|"


class _Row(NamedTuple):
    line: int
    file: Path
    label: str
    split: str


def table(
    config: DataConfig,
    *,
    channels: int = 3,
    path: str = "path",
    label: str = "label",
    split: str = "split",
) -> Splits:
    """Image files and labels of a CSV file, as spreadsheets and databases write it.

    Its first line names the columns; they are separated by comma, semicolon, tab or bar, and
    quoted or not. The classes are the labels that occur, numbers in their order and names in the
    alphabet's. A row without a split is one of training. Without a column of splits, or where it
    has no row of one, val and test are drawn from training by `val_fraction` and `test_fraction`.

    Args:
        config: `table` is the file; `root` is where its paths begin, which is the file's own
            directory unless it is set. `image_size` as for image folders.
        channels: 3 for RGB, 1 for grey.
        path: Name of the column of paths.
        label: Name of the column of labels.
        split: Name of the column of splits, which may be missing.

    Raises:
        ConfigError: without a table, or for a column that it does not have.
        DataError: for a table that cannot be read, and, counted and with its line, for a row
            without a label, a file that is missing or no image, and one with two labels.
    """
    if config.table is None:
        raise ConfigError("data=table needs data.table=, a CSV file with columns path and label")
    decoder = decoder_of(config, channels)
    place = Path(config.table)
    root = Path(config.root) if config.root is not None else place.parent
    rows, notes = _without_duplicates(place, list(_read(place, root, path, label, split)))
    missing = [row for row in rows if not row.file.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(rows)} files of {place} are missing; the first is "
            f"{missing[0].file} in line {missing[0].line}: paths begin at {root} (data.root=)"
        )
    looked = Looked([row.file for row in rows], root, config)
    for row in rows:
        if looked.image(row.file) is None:
            raise DataError(
                f"{place}, line {row.line}: PIL finds no image in {row.file}; mend it, or remove "
                "the line"
            )
    names = _classes(place, [row.label for row in rows])
    files = {
        part: _files([row for row in rows if row.split == part], names)
        for part in SPLIT_NAMES
        if part == "train" or any(row.split == part for row in rows)
    }
    if not files["train"].paths:
        raise DataError(f"{place} has no row of the training split")
    draw_missing(files, config, str(place))
    return from_files(config, files, names, decoder, looked, root=root, notes=notes)


def _read(place: Path, root: Path, path: str, label: str, split: str) -> Iterator[_Row]:
    try:
        text = place.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read data.table={place}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"data.table={place} is no text in UTF-8: {error.reason}") from error
    head = text.partition("\n")[0]
    separator = max(SEPARATORS, key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    columns = _columns(place, reader)
    for option, name in (("path", path), ("label", label)):
        if name not in columns:
            raise ConfigError(
                f"{unknown(f'column of {place}', name, columns)}; "
                f"data.options.{option}= names that of the {option}s"
            )
    if split not in columns and split != "split":
        raise ConfigError(unknown(f"column of {place}", split, columns))
    try:
        for entry in reader:
            yield _row(place, reader.line_num, entry, (root, path, label, split))
    except csv.Error as error:
        raise DataError(f"{place}, line {reader.line_num}: {error}") from error


def _columns(place: Path, reader: csv.DictReader[str]) -> list[str]:
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise DataError(f"{place}, line 1: {error}") from error
    reader.fieldnames = columns
    return columns


def _row(
    place: Path, line: int, entry: Mapping[str | None, str | None], of: tuple[Path, str, str, str]
) -> _Row:
    root, path, label, split = of
    values = [(entry.get(name) or "").strip() for name in (path, label, split)]
    if None in entry or not values[0]:
        raise DataError(f"{place}, line {line}: another number of columns, or no path")
    if not values[1]:
        raise DataError(f"{place}, line {line}: {values[0]} has no label; remove the line")
    named = values[2].lower() or "train"
    part = next((part for part, names in SPLIT_NAMES.items() if named in names), None)
    if part is None:
        known = ", ".join(name for names in SPLIT_NAMES.values() for name in names)
        raise DataError(f"{place}, line {line}: {values[2]} is no split; known: {known}")
    return _Row(line, root / values[0], values[1], part)


def _without_duplicates(place: Path, rows: Sequence[_Row]) -> tuple[list[_Row], list[str]]:
    """Each file once, and a note of how many lines repeat others."""
    first: dict[Path, _Row] = {}
    for row in rows:
        other = first.setdefault(row.file, row)
        if (row.label, row.split) != (other.label, other.split):
            raise DataError(
                f"{place}, line {row.line}: {row.file} is {row.label} of {row.split} here and "
                f"{other.label} of {other.split} in line {other.line}"
            )
    if not rows:
        raise DataError(f"{place} has no row below its columns")
    again = len(rows) - len(first)
    return [*first.values()], [f"{again} lines of {place} repeat others"] * (again > 0)


def _classes(place: Path, labels: Sequence[str]) -> list[str]:
    counts = Counter(labels)
    if len(counts) == 1:
        raise DataError(f"{place} has a single label, {labels[0]}: there is nothing to tell apart")
    if all(label.removeprefix("-").isdecimal() for label in counts):
        return sorted(counts, key=int)
    return sorted(counts)


def _files(rows: Sequence[_Row], names: Sequence[str]) -> Files:
    number = {name: at for at, name in enumerate(names)}
    targets = torch.tensor([number[row.label] for row in rows], dtype=torch.int64)
    return Files([row.file for row in rows], targets)
