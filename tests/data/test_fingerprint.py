"""A resumed run finds the data that it began with, or is refused naming split and class."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equiloss.config import DataConfig
from equiloss.data import headers
from equiloss.data.datasets import ArraySource, FileSource, Source, Splits, load
from equiloss.data.decoding import Decoder
from equiloss.data.sampler import Slice
from equiloss.errors import CheckpointError, DataError
from equiloss.training.state import Progress, RunState


def state(data: dict[str, str]) -> RunState:
    loss = {"name": "cross_entropy", "options": {}}
    return RunState(2, {"train": 8}, loss, Progress(), [], data)


def saved(splits: Splits) -> RunState:
    """What a checkpoint of today says of a run on these splits."""
    checkpoint: dict[str, Any] = {}
    state(splits.fingerprint()).save(checkpoint)
    return RunState.load(checkpoint)


def refusal(before: RunState, now: Splits) -> str:
    with pytest.raises(CheckpointError) as caught:
        before.check_same_run(saved(now))
    return str(caught.value)


class TestFiles:
    """Their contents are not read: any bytes will do, and no image is decoded."""

    @pytest.fixture(autouse=True)
    def _undecoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        image = torch.zeros(3, 2, 2, dtype=torch.uint8)
        monkeypatch.setattr(Decoder, "__call__", lambda *_: image)
        monkeypatch.setattr(headers, "read", lambda _: headers.Header(2, 2, "RGB"))

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for split in ("train", "val", "test"):
            for name in ("cats", "dogs"):
                directory = tmp_path / "images" / split / name
                directory.mkdir(parents=True)
                for number in range(3):
                    (directory / f"{number}.png").write_bytes(b"." * (10 + number))
        return tmp_path / "images"

    @staticmethod
    def folder(root: Path) -> Splits:
        return load(DataConfig(name="image_folder", root=str(root)))

    def test_the_same_files_are_accepted_wherever_they_have_moved(self, root: Path) -> None:
        before = saved(self.folder(root))
        before.check_same_run(saved(self.folder(root)))
        before.check_same_run(saved(self.folder(root.rename(root.with_name("elsewhere")))))

    def test_a_renamed_one_is_refused(self, root: Path) -> None:
        before = saved(self.folder(root))
        cat = root / "train" / "cats" / "2.png"
        cat.rename(cat.with_name("3.png"))
        told = refusal(before, self.folder(root))
        assert "cannot continue: class 0 (cats) of the train split is 3 files of 33 bytes" in told

    def test_a_replaced_one_is_refused_with_the_sizes(self, root: Path) -> None:
        before = saved(self.folder(root))
        (root / "val" / "dogs" / "0.png").write_bytes(b".")
        told = refusal(before, self.folder(root))
        assert "class 1 (dogs) of the val split is 3 files of 24 bytes" in told
        assert "was 3 files of 33 bytes" in told

    def test_two_that_changed_places_are_refused(self, root: Path) -> None:
        before = saved(self.folder(root))
        first, second = (root / "train" / "cats" / f"{number}.png" for number in (0, 1))
        spare = first.rename(root / "spare")
        second.rename(first)
        spare.rename(second)
        told = refusal(before, self.folder(root))
        assert "class 0 (cats) of the train split is 3 files of 33 bytes" in told

    def test_one_that_moved_to_another_class_is_refused(self, root: Path) -> None:
        before = saved(self.folder(root))
        (root / "test" / "cats" / "0.png").rename(root / "test" / "dogs" / "3.png")
        told = refusal(before, self.folder(root))
        assert "class 0 (cats) of the test split is 2 files of 23 bytes" in told
        assert "was 3 files of 33 bytes" in told

    def test_a_renamed_class_is_refused(self, root: Path) -> None:
        before = saved(self.folder(root))
        for split in ("train", "val", "test"):
            (root / split / "dogs").rename(root / split / "emus")
        told = refusal(before, self.folder(root))
        assert "the name of class 1 is emus now and was dogs" in told

    def test_one_that_has_gone_meanwhile_is_named(self, root: Path) -> None:
        splits = self.folder(root)
        shutil.rmtree(root / "test")
        with pytest.raises(DataError, match=r"cannot read image .*/test/cats/0\.png: No such file"):
            splits.fingerprint()

    def test_without_a_root_paths_are_part_of_the_data(self, root: Path) -> None:
        files = sorted(root.rglob("*.png"))
        source = FileSource(files, torch.zeros(18).long(), decoder=Decoder(3), image_size=None)
        moved = root.rename(root.with_name("elsewhere"))
        there = sorted(moved.rglob("*.png"))
        other = FileSource(there, torch.zeros(18).long(), decoder=Decoder(3), image_size=None)
        digests = other.fingerprint()
        shutil.copytree(moved, root)
        assert source.fingerprint() != digests


def arrays(change: str = "") -> Splits:
    """Three splits of four images each, the training split with a change."""
    images = torch.arange(16, dtype=torch.uint8).view(4, 1, 2, 2)
    targets = torch.tensor([0, 1, 1, 0])
    other_images, other_targets = images.clone(), targets.clone()
    if change == "pixel":
        other_images[2, 0, 1, 1] += 1
    elif change == "target":
        other_targets[3] = 1
    elif change == "order":
        rows = torch.tensor([1, 0, 2, 3])
        other_images, other_targets = other_images[rows], other_targets[rows]
    elif change == "shape":
        other_images = other_images.view(4, 1, 1, 4)
    train, rest = ArraySource(other_images, other_targets), ArraySource(images, targets)
    rest.image_shape = train.image_shape
    return Splits(train, rest, rest, ("cats", "dogs"), (0.0,), (1.0,))


class TestArrays:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ("pixel", "class 1 (dogs) of the train split is 2 images"),
            ("target", "class 0 (cats) of the train split is 1 images"),
            ("order", "the order of targets of the train split is"),
            ("shape", "class 0 (cats) of the train split is 2 images"),
        ],
    )
    def test_a_change_is_refused(self, change: str, words: str) -> None:
        assert words in refusal(saved(arrays()), arrays(change))

    def test_the_same_ones_are_accepted_in_any_order_of_memory(self) -> None:
        splits = arrays()
        transposed = splits.train.images.transpose(2, 3).contiguous().transpose(2, 3)
        same = dataclasses.replace(splits, train=ArraySource(transposed, splits.train.targets))
        saved(splits).check_same_run(saved(same))

    def test_probabilities_are_compared_to_the_last_bit(self) -> None:
        splits = arrays()
        soft = torch.full((4, 2), 0.5, dtype=torch.bfloat16)
        before = dataclasses.replace(splits, train=ArraySource(splits.train.images, soft))
        other = soft.clone()
        other[1, 1] = 0.498
        now = dataclasses.replace(splits, train=ArraySource(splits.train.images, other))
        assert "the order of targets of the train split" in refusal(saved(before), now)


class Archive(Source):
    """A source of a user's own, which says which version it is."""

    def __init__(self, targets: Tensor, version: str) -> None:
        super().__init__(targets, (1, 2, 2))
        self.version = version

    def read(self, part: Slice) -> Tensor:
        return torch.zeros(len(part.indices), 1, 2, 2, dtype=torch.uint8)

    def fingerprint(self) -> dict[str, str]:
        return super().fingerprint() | {"the archive": self.version}


def archive(version: str, *targets: int) -> Splits:
    source = Archive(torch.tensor(targets), version)
    return Splits(source, source, source, ("cats", "dogs"), (0.0,), (1.0,))


def test_a_source_of_ones_own_adds_to_its_targets_and_shape() -> None:
    before = saved(archive("v1", 0, 1))
    before.check_same_run(saved(archive("v1", 0, 1)))
    told = refusal(before, archive("v2", 0, 1))
    assert "the archive of the train split is v2 now and was v1" in told
    assert "the order of targets of the train split" in refusal(before, archive("v1", 1, 1))


def test_a_checkpoint_without_a_digest_goes_on_and_says_so(caplog) -> None:
    checkpoint: dict[str, Any] = {}
    state({}).save(checkpoint)
    del checkpoint["equiloss"]["fingerprint"]
    with caplog.at_level(logging.INFO):
        RunState.load(checkpoint).check_same_run(saved(arrays("pixel")))
    assert "the checkpoint has no digest of the data" in caplog.text
