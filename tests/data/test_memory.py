"""`data.cache=memory`: decoded once, the same images, and refused where they do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equiloss.config import AugmentConfig, DataConfig
from equiloss.data import memory
from equiloss.data.datasets import Splits, load
from equiloss.data.decoding import Decoder
from equiloss.data.sampler import Slice
from equiloss.distributed import membership
from equiloss.errors import ConfigError, DataError
from support import of_rank, write_noise


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    write_noise(tmp_path, height=6)
    memory.forget()
    yield tmp_path
    memory.forget()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are decoded from here on."""
    files: list[Path] = []
    call = Decoder.__call__

    def noting(decoder: Decoder, file: Path) -> torch.Tensor:
        files.append(file)
        return call(decoder, file)

    monkeypatch.setattr(Decoder, "__call__", noting)
    return files


def folder(root: Path, **changes: object) -> Splits:
    settings = {"name": "image_folder", "root": str(root), "image_size": 7, "cache": "memory"}
    return load(DataConfig(**settings | changes))


def everything(splits: Splits) -> torch.Tensor:
    splits.train.hold()
    return splits.train.read(Slice(0, torch.arange(len(splits.train))))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_the_same_with_and_without(root: Path, num_workers: int) -> None:
    pipeline = [{"name": "RandomCrop", "size": [7, 7], "padding": 2}]
    found = []
    for cache in ("none", "memory"):
        settings = DataConfig(
            name="image_folder",
            root=str(root),
            image_size=7,
            cache=cache,
            batch_size=5,
            num_workers=num_workers,
            augment=AugmentConfig(transforms=pipeline),
        )
        splits = load(settings)
        names = ("train_dataloader", "val_dataloader", "test_dataloader")
        found.append([batch for name in names for batch in of_rank(splits, settings, name, 0, 1)])
    for without, kept in zip(*found, strict=True):
        assert torch.equal(without.images, kept.images)
        assert torch.equal(without.index, kept.index)


def test_a_file_is_decoded_once_for_all_epochs_and_runs(root: Path, decoded: list[Path]) -> None:
    splits = folder(root)
    first = everything(splits)
    decoded.clear()
    assert torch.equal(everything(splits), first)
    assert decoded == []
    again = folder(root)
    assert again.train.fingerprint() == splits.train.fingerprint()
    assert len(decoded) == 3  # the first file of each split tells its shape
    assert torch.equal(everything(again), first)
    assert len(decoded) == 3


def test_a_file_that_changed_is_decoded_anew(root: Path, decoded: list[Path]) -> None:
    splits = folder(root)
    first = everything(splits)
    changed = splits.train.files[3]
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(changed)
    again = everything(folder(root))
    assert not again[3].any()
    assert torch.equal(again[4:], first[4:])
    assert torch.equal(everything(folder(root, background="black")), again)  # another decoder
    assert len(memory._kept) == 1  # what others had left is forgotten


def test_what_does_not_fit_is_refused_with_both_numbers(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything(folder(root))
    taken = 24 * 3 * 7 * 7
    monkeypatch.setattr(memory, "free_memory", lambda: taken)
    folder(root)  # the largest part is there already
    memory.forget()
    with pytest.raises(DataError, match=r"takes 0 MiB for 24 images of 3x7x7, and 0 MiB are free"):
        folder(root)
    assert len(folder(root, cache="none").train) == 17
    monkeypatch.setattr(memory, "free_memory", lambda: None)  # the system does not say
    folder(root)


def test_what_is_free_is_known_here() -> None:
    free = memory.free_memory()
    assert free is None or 2**20 < free < 2**45


def test_each_rank_here_needs_room(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 2 * 24 * 3 * 7 * 7)
    folder(root)
    monkeypatch.setenv(membership.CHILD, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match="24 images of 3x7x7 in each of 2 processes, and 0 MiB"):
        folder(root)


def written(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MACHINE = {"meminfo": "MemTotal: 99 kB\nMemAvailable: 80 kB\n"}
VERSION_2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")
VERSION_1 = (
    *("memory.limit_in_bytes", "memory.usage_in_bytes"),
    *("memory.stat", "total_inactive_file"),
)


def group(place: str, names: tuple[str, ...], most: str, used: int, cached: int) -> dict[str, str]:
    limit, usage, statistics, inactive = names
    return {
        f"{place}{limit}": most,
        f"{place}{usage}": str(used),
        f"{place}{statistics}": f"anon 1\n{inactive} {cached}\n",
    }


@pytest.mark.parametrize(
    ("lines", "groups", "free"),
    [
        ("0::/\n", {}, 81920),
        ("0::/\n", group("", VERSION_2, "max", 900, 0), 81920),
        # What was read of files makes room.
        ("0::/\n", group("", VERSION_2, "1000", 900, 300), 400),
        # A job's own group, and one above it, where none is hidden.
        ("0::/job/step\n", group("job/step/", VERSION_2, "1000", 900, 0), 100),
        ("0::/job/step\n", group("job/", VERSION_2, "1000", 900, 0), 100),
        # A container whose name for its group is not what it sees.
        ("0::/docker/1\n", group("", VERSION_2, "1000", 900, 0), 100),
        ("3:cpu:/a\n7:memory:/job\n", group("memory/job/", VERSION_1, "1000", 900, 50), 150),
        ("7:memory:/docker/1\n", group("memory/", VERSION_1, "1000", 1900, 0), 0),
    ],
)
def test_what_is_free_follows_machine_and_groups(
    tmp_path: Path, lines: str, groups: dict[str, str], free: int
) -> None:
    written(tmp_path / "proc", MACHINE | {"self/cgroup": lines})
    written(tmp_path / "groups", groups)
    assert memory.free_memory(tmp_path / "proc", tmp_path / "groups") == free
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 99 kB\n")  # as of old kernels
    known = memory.free_memory(tmp_path / "proc", tmp_path / "groups")
    assert known == (None if free == 81920 else free)


def test_a_picture_that_went_away_is_named(root: Path) -> None:
    splits = folder(root)
    gone = splits.train.files[2]
    gone.unlink()
    with pytest.raises(DataError, match=rf"cannot read image {gone}: No such file"):
        everything(splits)


def test_another_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown data\.cache 'disk'\. Known: none, memory"):
        DataConfig(name="digits", cache="disk")


def test_how_much_is_taken_is_said(root: Path) -> None:
    assert folder(root).notes == (
        "24 images of 3x7x7 are kept in memory once decoded, 0 MiB a process",
    )
