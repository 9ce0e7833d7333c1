"""The loaders without a Trainer: ranks, workers, memory order and the check of targets."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from equiloss.config import AugmentConfig, DataConfig
from equiloss.data.datamodule import ImageDataModule
from equiloss.data.datasets import ArraySource, Batch, Splits, load
from equiloss.errors import DataError


def config(**changes) -> DataConfig:
    settings = {"batch_size": 8, "options": {"num_samples": 40, "num_classes": 2}} | changes
    return DataConfig(name="synthetic", **settings)


def stand_in(rank: int = 0, world_size: int = 1, *, training: bool = False) -> SimpleNamespace:
    """What the data module asks a Trainer, for a rank that does not exist."""
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        training=training,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        lightning_module=SimpleNamespace(dtype=torch.float32),
    )


def of_rank(
    splits: Splits, settings: DataConfig, loader: str, rank: int, world_size: int
) -> list[Batch]:
    data = ImageDataModule(splits, settings, seed=4, channels_last=True)
    data.trainer = stand_in(rank, world_size, training=loader == "train_dataloader")
    return [data.on_after_batch_transfer(batch, 0) for batch in getattr(data, loader)()]


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader", "test_dataloader"])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_together_see_what_one_rank_sees(loader, world_size):
    settings = config(eval_batch_size=6, augment=AugmentConfig(shift=1, flip=True))
    splits = load(settings)
    alone = of_rank(splits, settings, loader, 0, 1)
    ranks = [of_rank(splits, settings, loader, rank, world_size) for rank in range(world_size)]
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        for field in ("images", "target", "index"):
            together = torch.cat([getattr(part, field) for part in parts])
            assert torch.equal(together, getattr(whole, field))
    if loader != "train_dataloader":
        index = torch.cat([batch.index for batch in alone])
        assert index.tolist() == list(range(len(index)))
    smallest = min(len(batch.index) for batches in ranks for batch in batches)
    assert smallest == 0 or world_size < 7


def write_folder(root: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for number in range(12):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")


def folder(root: Path, num_workers: int) -> ImageDataModule:
    pipeline = [{"name": "RandomCrop", "size": [8, 8], "padding": 2}]
    settings = DataConfig(
        name="image_folder",
        root=str(root),
        batch_size=5,
        num_workers=num_workers,
        augment=AugmentConfig(transforms=pipeline),
    )
    data = ImageDataModule(load(settings), settings, seed=0)
    data.trainer = stand_in(training=True)
    return data


def test_workers_change_no_image(tmp_path):
    write_folder(tmp_path)
    expected, batches = (list(folder(tmp_path, workers).train_dataloader()) for workers in (0, 2))
    assert len(batches) == len(expected) > 1
    for batch, reference in zip(batches, expected, strict=True):
        assert torch.equal(batch.images, reference.images)
        assert torch.equal(batch.index, reference.index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_named_also_by_a_worker(tmp_path, num_workers):
    write_folder(tmp_path)
    data = folder(tmp_path, num_workers)
    broken = data.splits.train.files[3]
    broken.write_bytes(b"")
    with pytest.raises(DataError, match=f"cannot read image {re.escape(str(broken))}"):
        list(data.train_dataloader())


def test_iterating_leaves_the_global_generator_alone():
    data = ImageDataModule(load(config()), config(), seed=0)
    data.trainer = stand_in()
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def splits_with(targets: torch.Tensor) -> Splits:
    source = ArraySource(torch.zeros(len(targets), 1, 2, 2, dtype=torch.uint8), targets)
    good = ArraySource(source.images, torch.zeros(len(targets), dtype=torch.int64))
    return Splits(good, source, good, ("a", "b"), (0.0,), (1.0,))


def test_targets_are_checked_before_training():
    splits = splits_with(torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match=r"val target 2 is 2: classes lie in \[0, 1\], or are -100"):
        ImageDataModule(splits, config(), seed=0)
    ImageDataModule(splits, config(), seed=0, ignore_index=2)


def test_channels_last_is_a_memory_order():
    settings = config(options={"num_samples": 40, "num_classes": 2, "channels": 3, "size": 4})
    splits = load(settings)

    def images(channels_last: bool) -> torch.Tensor:
        data = ImageDataModule(splits, settings, seed=0, channels_last=channels_last)
        data.trainer = stand_in(training=True)
        (batch, *_) = data.train_dataloader()
        return data.on_after_batch_transfer(batch, 0).images

    last, first = images(True), images(False)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert torch.equal(last, first)
