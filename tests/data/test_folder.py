"""Image folders: which files are which split, and what is said when they cannot be."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin

from equiloss.config import DataConfig
from equiloss.data import decoding, headers, many_files
from equiloss.data.datasets import Splits, load
from equiloss.data.decoding import Decoder
from equiloss.data.sampler import Slice
from equiloss.data.splits import SPLITS
from equiloss.errors import ConfigError, DataError
from equiloss.records import remembered


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
    (tmp_path / "alone" / "train").mkdir(parents=True)
    write_images(tmp_path / "alone" / "photos", {"2023": 3, "2024": 3})
    (tmp_path / "alone" / "train").rmdir()
    with pytest.raises(DataError, match=r"has a single class folder, photos \(2023, 2024\)"):
        folder(tmp_path / "alone")
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


@pytest.mark.parametrize("name", ["valid", "Validation", "dev"])
def test_splits_have_their_usual_names(tmp_path, name):
    write_images(tmp_path / "training", {"cat": 6, "dog": 6})
    write_images(tmp_path / name, {"cat": 2, "dog": 1})
    write_images(tmp_path / "testing", {"cat": 1, "dog": 1})
    write_images(tmp_path / "extra", {"cat": 1})
    splits = folder(tmp_path)
    assert [len(getattr(splits, split)) for split in SPLITS] == [12, 3, 2]
    assert splits.notes == (f"not used: {tmp_path}/extra",)
    write_images(tmp_path / "val", {"cat": 2, "dog": 1})
    with pytest.raises(DataError, match="may both be the val split"):
        folder(tmp_path)


def test_a_split_and_its_name_in_capitals_are_not_told_apart(tmp_path):
    for name in ("train", "Train"):
        write_images(tmp_path / name, {"cat": 4, "dog": 4})
    with pytest.raises(DataError, match=r"/Train and .*/train may both be the train split"):
        folder(tmp_path)


def test_what_cannot_be_listed_is_named(tmp_path):
    write_images(tmp_path, {"cat": 4, "dog": 4})
    loop = tmp_path / "cat" / "loop"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match=rf"cannot read {loop}: Too many levels of symbolic links"):
        folder(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path, {"bus": 4, "train": 4})
    assert folder(tmp_path).class_names == ("bus", "train")


def test_a_split_without_classes_is_named_and_drawn_instead(tmp_path):
    write_images(tmp_path / "train", {"cat": 10, "dog": 10})
    write_images(tmp_path, {"test": 7})
    splits = folder(tmp_path)
    assert [len(getattr(splits, split)) for split in SPLITS] == [14, 2, 4]
    (note,) = splits.notes
    assert note == f"not used: {tmp_path}/test (7 files without folders of classes)"


def test_pictures_are_found_at_any_depth_and_by_what_they_are(tmp_path):
    write_images(tmp_path, {"cat": 4, "dog": 4})
    write_images(tmp_path / "cat" / "2023", {"may": 3})
    pixels = Image.fromarray(np.full((6, 4, 3), 9, dtype=np.uint8))
    for name, kind in (("a.jfif", "JPEG"), ("b.webp", "WEBP"), ("c", "PNG"), ("d.JPG", "JPEG")):
        pixels.save(tmp_path / "dog" / name, format=kind)
    (tmp_path / "dog" / "loop").symlink_to(tmp_path / "dog")
    for name in ("note.txt", "x.heic", "._a.jpg", ".DS_Store", "Thumbs.db"):
        (tmp_path / "dog" / name).write_bytes(b"no image")
    splits = folder(tmp_path)
    assert sum(len(getattr(splits, split)) for split in SPLITS) == 8 + 3 + 4
    (note,) = splits.notes
    assert note.startswith(f"2 files below {tmp_path} are no images that PIL can open")
    assert "1 .txt, 1 .heic" in note


def test_what_is_broken_or_of_another_size_in_any_split_is_found_at_once(tmp_path):
    for split in SPLITS:
        write_images(tmp_path / split, {"cat": 3, "dog": 3})
    assert len(folder(tmp_path).test) == 6
    odd = tmp_path / "test" / "dog" / "002.png"
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(odd)
    with pytest.raises(DataError, match=rf"{odd} has 9x9 pixels .* 6x4: set data.image_size="):
        folder(tmp_path)
    odd.write_bytes(b"")
    with pytest.raises(DataError, match=rf"cannot read image {odd}: .*\(0 bytes\); mend or remove"):
        folder(tmp_path)


def test_headers_are_remembered_until_a_file_changes(tmp_path, monkeypatch, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv(remembered.CACHE, str(cache))
    write_images(tmp_path, {"cat": 4, "dog": 4})
    read, looks = headers.read, []
    monkeypatch.setattr(headers, "read", lambda file: looks.append(file) or read(file))
    folder(tmp_path)
    assert len(looks) == 8
    folder(tmp_path)
    assert len(looks) == 8
    changed = tmp_path / "cat" / "001.png"
    Image.fromarray(np.zeros((6, 4, 3), dtype=np.uint8)).save(changed, compress_level=0)
    folder(tmp_path)
    assert looks[8:] == [changed]
    # What is remembered only spares time: damaged, it is read anew.
    (memory,) = (cache / "headers").glob("*.json")
    known = remembered.recall(headers.KIND, tmp_path)
    entry = known["cat/001.png"]
    worse = [entry.replace("4 6 RGB", text) for text in ("x y RGB", "4", "-4 6 RGB", "4 6 R G")]
    written = memory.read_text()
    for damage in ([1], "x", "", *worse, None):
        remembered.remember(headers.KIND, tmp_path, {**known, "cat/001.png": damage})
        if damage is None:
            memory.write_text(written.replace("4 6 RGB", "5 6 RGB"))
        looks.clear()
        assert len(folder(tmp_path).class_names) == 2
        assert changed in looks


def test_files_that_are_slow_to_read_are_read_together(tmp_path, monkeypatch):
    """Threads wait together; each header stays with its file."""
    write_images(tmp_path, {"cat": 30, "dog": 30})
    files = sorted(tmp_path.rglob("*.png"))
    threads = set()

    def slowly(file: Path) -> headers.Header:
        threads.add(threading.get_ident())
        time.sleep(2 * many_files.SLOW)
        return headers.Header(int(file.stem) + 1, 1, file.parent.name)

    monkeypatch.setattr(headers, "read", slowly)
    read = headers.read_all(files, tmp_path)
    assert [(header.width, header.mode) for header in read] == [
        (int(file.stem) + 1, file.parent.name) for file in files
    ]
    assert len(threads) > 2


def test_only_what_is_known_of_a_file_is_remembered(tmp_path, monkeypatch):
    """What failed may succeed: permissions change, and PIL learns formats."""
    write_images(tmp_path, {"cat": 1})
    (file,) = (tmp_path / "cat").iterdir()
    opened = Image.open

    def refused(*_):
        raise PermissionError(13, "Permission denied", os.fspath(file))

    monkeypatch.setattr(Image, "open", refused)
    with pytest.raises(DataError, match=rf"cannot read image {file}: Permission denied"):
        headers.read_all([file], tmp_path)
    monkeypatch.setattr(Image, "open", lambda file: opened(__file__))
    assert headers.read_all([file], tmp_path) == [None]
    monkeypatch.setattr(Image, "open", opened)
    assert headers.read_all([file], tmp_path) == [headers.Header(4, 6, "RGB")]


def test_a_picture_of_too_many_pixels_is_named_before_the_run(tmp_path, monkeypatch):
    write_images(tmp_path, {"cat": 2, "dog": 2})
    decoding.pil.cache_clear()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)
    with pytest.raises(DataError, match=r"24 pixels\) exceeds limit of 22 pixels; make it smaller"):
        folder(tmp_path)


@pytest.mark.parametrize("ending", ["png", "jpg", "tiff", "webp"])
def test_looking_at_a_picture_decodes_nothing(tmp_path, monkeypatch, ending):
    turned, upright = tmp_path / f"turned.{ending}", tmp_path / f"upright.{ending}"
    image = Image.new("RGB", (9, 5))
    orientation = Image.Exif()
    orientation[headers.ORIENTATION] = 6
    image.save(turned, exif=orientation)
    image.save(upright)
    assert Decoder(3)(turned).shape == (3, 9, 5)

    def load(*_):
        pytest.fail("it was decoded")

    for kind in (ImageFile.ImageFile, PngImagePlugin.PngImageFile, TiffImagePlugin.TiffImageFile):
        monkeypatch.setattr(kind, "load", load)
    assert headers.read(turned) == headers.Header(5, 9, "RGB")
    assert headers.read(upright) == headers.Header(9, 5, "RGB")
