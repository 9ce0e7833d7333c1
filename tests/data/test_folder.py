"""Image folders: which files are which split, and what is said when they cannot be."""

from __future__ import annotations

import os
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equiloss.config import DataConfig
from equiloss.data import sources
from equiloss.data.datasets import Splits, load
from equiloss.data.sampler import Slice
from equiloss.data.splits import SPLITS
from equiloss.errors import ConfigError, DataError


def rows(splits: Splits, split: str, positions: list[int] | None = None):
    source = getattr(splits, split)
    positions = list(range(len(source))) if positions is None else positions
    return source.__getitems__(Slice(0, torch.tensor(positions, dtype=torch.int64)))


def all_images(splits: Splits) -> Counter[bytes]:
    return Counter(
        image.numpy().tobytes() for split in SPLITS for image in rows(splits, split).images
    )


def write_images(root: Path, counts: dict[str, int], size: tuple[int, int] = (6, 4)) -> None:
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((*size, 3), (40 * label, number, 7), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03}.png")


def folder(root: Path, **changes) -> Splits:
    return load(DataConfig(name="image_folder", root=str(root), **changes))


def test_folder_without_splits_is_divided_by_class(tmp_path):
    write_images(tmp_path, {"cat": 10, "dog": 20})
    (tmp_path / ".cache").mkdir()
    splits = folder(tmp_path)
    assert splits.class_names == ("cat", "dog")
    assert splits.image_shape == (3, 6, 4)
    assert [len(getattr(splits, split)) for split in SPLITS] == [22, 2, 6]
    for split in SPLITS:
        batch = rows(splits, split)
        assert torch.equal(batch.images[:, 0, 0, 0] // 40, batch.target)
        assert torch.equal(batch.images[:, 2].unique(), torch.tensor([7], dtype=torch.uint8))
    assert sum(all_images(splits).values()) == len(all_images(splits)) == 30


def test_folder_takes_the_splits_that_are_there(tmp_path):
    write_images(tmp_path / "train", {"cat": 10, "dog": 20})
    write_images(tmp_path / "test", {"cat": 1, "dog": 2})
    splits = folder(tmp_path)
    assert [len(getattr(splits, split)) for split in SPLITS] == [27, 3, 3]
    write_images(tmp_path / "val", {"dog": 4})
    splits = folder(tmp_path)
    assert [len(getattr(splits, split)) for split in SPLITS] == [30, 4, 3]
    assert rows(splits, "val").target.tolist() == [1] * 4


def test_folder_reads_no_image_for_an_empty_slice(tmp_path):
    write_images(tmp_path, {"cat": 3, "dog": 3})
    batch = rows(folder(tmp_path), "train", [])
    assert batch.images.shape == (0, 3, 6, 4)
    assert batch.images.dtype == torch.uint8
    assert batch.target.shape == batch.index.shape == (0,)


def test_folder_resizes_and_converts(tmp_path):
    write_images(tmp_path, {"cat": 4, "dog": 4})
    Image.fromarray(np.full((9, 9), 50, dtype=np.uint8)).save(tmp_path / "cat" / "000.png")
    grey = folder(tmp_path, image_size=5, options={"channels": 1})
    assert grey.image_shape == (1, 5, 5)
    assert rows(grey, "train").images.shape[1:] == (1, 5, 5)
    assert len(grey.mean) == 1
    assert folder(tmp_path, image_size=5).mean == (0.485, 0.456, 0.406)
    configured = folder(tmp_path, image_size=5, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    assert (configured.mean, configured.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_images_of_different_sizes_need_image_size(tmp_path):
    write_images(tmp_path, {"cat": 4, "dog": 4})
    splits = folder(tmp_path)
    odd = splits.train.files[2]
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(odd)
    with pytest.raises(DataError, match=rf"{odd} has 9x9 pixels .* 6x4: set data.image_size="):
        rows(splits, "train")


def test_an_unreadable_image_is_named(tmp_path):
    write_images(tmp_path, {"cat": 4, "dog": 4})
    splits = folder(tmp_path)
    whole = splits.train.files[1].read_bytes()
    for content in (b"no image", whole[: len(whole) // 2]):
        splits.train.files[1].write_bytes(content)
        with pytest.raises(DataError, match=rf"cannot read image {splits.train.files[1]}"):
            rows(splits, "train")


def test_only_regular_files_are_images(tmp_path):
    write_images(tmp_path, {"cat": 4, "dog": 4})
    cats = tmp_path / "cat"
    before = folder(tmp_path)
    os.mkfifo(cats / "pipe.png")
    (cats / "directory.png").mkdir()
    (cats / "to_pipe.png").symlink_to(cats / "pipe.png")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(cats / "door.png"))
        assert all_images(folder(tmp_path)) == all_images(before)
    (cats / "000.png").rename(tmp_path / "elsewhere")
    (cats / "000.png").symlink_to(tmp_path / "elsewhere")
    assert all_images(folder(tmp_path)) == all_images(before)
    (tmp_path / "elsewhere").unlink()
    with pytest.raises(DataError, match=rf"^image {cats}/000\.png is a link that leads nowhere"):
        folder(tmp_path)


def test_an_image_too_large_to_be_decoded_is_named_in_one_line(tmp_path, monkeypatch):
    sources._pil.cache_clear()
    write_images(tmp_path, {"cat": 1}, size=(6, 4))
    image = tmp_path / "cat" / "000.png"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)
    with pytest.raises(DataError) as caught:
        sources.decode(image, 3)
    assert str(caught.value) == (
        f"cannot read image {image}: Image size (24 pixels) exceeds limit of 22 pixels; "
        "make it smaller, or remove it"
    )
    # PIL's warning of half as many is no error, and is not shown.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12)
    assert sources.decode(image, 3).shape == (3, 6, 4)


def test_folders_that_make_no_sense_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"needs data\.root="):
        load(DataConfig(name="image_folder"))
    with pytest.raises(DataError, match=rf"no such directory: {tmp_path}/none"):
        folder(tmp_path / "none")
    with pytest.raises(DataError, match=rf"{tmp_path} has no class folders"):
        folder(tmp_path)
    write_images(tmp_path / "train", {"cat": 3, "dog": 3})
    (tmp_path / "train" / "emu").mkdir()
    with pytest.raises(DataError, match=rf"class folder {tmp_path}/train/emu holds no image"):
        folder(tmp_path)
    (tmp_path / "train" / "emu").rmdir()
    write_images(tmp_path / "val", {"cow": 2})
    with pytest.raises(DataError, match=rf"{tmp_path}/val/cow has no counterpart .*: cat, dog"):
        folder(tmp_path)


def test_too_few_images_for_three_splits_are_refused(tmp_path):
    write_images(tmp_path, {"cat": 2, "dog": 2})
    with pytest.raises(DataError, match=r"too few images to draw a test split from"):
        folder(tmp_path)


def test_max_samples_limits_a_folder(tmp_path):
    write_images(tmp_path, {"cat": 10, "dog": 10})
    splits = folder(tmp_path, max_samples=2)
    assert [len(getattr(splits, split)) for split in SPLITS] == [2, 2, 2]
    assert torch.equal(rows(splits, "train").images[:, 0, 0, 0] // 40, splits.train.targets)
