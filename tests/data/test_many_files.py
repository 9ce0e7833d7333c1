"""Many files, each asked of the disk before its turn."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path

import pytest

from equiloss.data import many_files
from equiloss.data.many_files import AHEAD


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    names = [tmp_path / f"{number:03d}" for number in range(3 * AHEAD)]
    for file in names:
        file.write_text(file.name)
    return names


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked ahead")
def test_a_disk_is_asked_for_each_file_ahead(files: list[Path], monkeypatch) -> None:
    asked = 0

    def advise(handle: int, start: int, length: int, advice: int) -> None:
        nonlocal asked
        assert (start, advice) == (0, os.POSIX_FADV_WILLNEED)
        assert os.pread(handle, length, 0).decode() == files[AHEAD + asked].name
        asked += 1

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(many_files, "SLOW", math.inf)  # however busy the machine is
    for number, text in enumerate(many_files.of_each(Path.read_text, files)):
        assert text == files[number].name
        assert asked == min(number + 1, len(files) - AHEAD)


def test_without_that_they_are_read_all_the_same(files: list[Path], monkeypatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    texts = list(many_files.of_each(Path.read_text, files))
    assert texts == [file.name for file in files]


def test_where_each_takes_long_they_are_read_side_by_side(files: list[Path], monkeypatch) -> None:
    monkeypatch.setattr(many_files, "SLOW", 0.0)
    both = threading.Barrier(2, timeout=10)

    def read(file: Path) -> str:
        if files.index(file) >= many_files.TRIED:
            both.wait()
        return file.read_text()

    assert [*many_files.of_each(read, files)] == [file.name for file in files]


def test_a_path_that_can_be_none_is_the_readers_matter(files: list[Path]) -> None:
    files[-1] = Path("no\0file")
    assert [*many_files.of_each(str, files)] == [str(file) for file in files]


def test_a_file_that_is_gone_is_the_readers_matter(files: list[Path]) -> None:
    files[2 * AHEAD].unlink()
    seen = list(many_files.of_each(Path.exists, files))
    assert seen == [number != 2 * AHEAD for number in range(len(files))]
