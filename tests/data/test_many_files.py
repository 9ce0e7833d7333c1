"""Many files, each asked of the disk before its turn."""

from __future__ import annotations

import os
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
    for number, text in enumerate(many_files.of_each(Path.read_text, files)):
        assert text == files[number].name
        assert asked == min(number + 1, len(files) - AHEAD)


def test_without_that_they_are_read_all_the_same(files: list[Path], monkeypatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    texts = list(many_files.of_each(Path.read_text, files))
    assert texts == [file.name for file in files]


def test_a_file_that_is_gone_is_the_readers_matter(files: list[Path]) -> None:
    files[2 * AHEAD].unlink()
    seen = list(many_files.of_each(Path.exists, files))
    assert seen == [number != 2 * AHEAD for number in range(len(files))]
