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


def test_another_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown data\.cache 'disk'\. Known: none, memory"):
        DataConfig(name="digits", cache="disk")


def test_how_much_is_taken_is_said(root: Path) -> None:
    assert folder(root).notes == (
        "24 images of 3x7x7 are kept in memory once decoded, 0 MiB a process",
    )
