"""600 pictures of many kinds in four layouts: one set of splits, the same batches however read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equiloss.config import AugmentConfig, DataConfig
from equiloss.data.datasets import Splits, load
from equiloss.data.splits import SPLITS
from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance.interruption import bits
from equiloss.records.results import Result
from rank_functions import run_in_rank, run_until_out_of_time
from support import composed, of_rank, slow

CLASSES = ("ant", "bee", "cat", "dog", "eel")
PICTURES = 600
SIZE = 12
ORIENTATION = 0x0112


def write_picture(place: Path, number: int) -> None:
    """The picture of a number: noise, in one of seven kinds of file."""
    generator = np.random.default_rng(number)
    kind = number // len(CLASSES) % 7
    height, width = (int(side) for side in generator.integers(10, 20, 2))
    grey = generator.integers(0, 256, (height, width), dtype=np.uint8)
    opacity = np.full_like(grey, 255)
    opacity[:, 0] = 0
    stem = str(place / f"{number:03}")
    if kind == 0:
        Image.fromarray(grey).save(f"{stem}.png")
    elif kind == 1:
        Image.fromarray(np.stack([grey, grey // 2, grey], -1)).save(f"{stem}.jpg", quality=95)
    elif kind == 2:  # lies on its side, and says so
        turned = Image.fromarray(np.rot90(grey).copy())
        exif = turned.getexif()
        exif[ORIENTATION] = 6
        turned.save(f"{stem}.jpeg", exif=exif, quality=95)
    elif kind == 3:
        Image.fromarray(np.stack([grey, opacity], -1)).save(f"{stem}.png")
    elif kind == 4:
        Image.fromarray(np.stack([grey, grey, grey // 2, opacity], -1)).save(f"{stem}.webp")
    elif kind == 5:
        Image.fromarray(grey.astype(np.uint16) * 257).save(f"{stem}.tif")
    else:
        Image.fromarray(grey).quantize(32).save(f"{stem}.gif")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Settings of `data=` for each layout of the same pictures."""
    place = tmp_path_factory.mktemp("pictures")
    for label, name in enumerate(CLASSES):
        (place / "folders" / name / "deeper").mkdir(parents=True)
        for number in range(label, PICTURES, len(CLASSES)):
            folder = place / "folders" / name
            write_picture(folder / "deeper" if number % 3 == 0 else folder, number)
    found = {"folders": {"name": "image_folder", "root": str(place / "folders")}}
    splits = load_layout(found["folders"])
    lines: dict[Path, str] = {}
    tables = {"table": ["path,label"], "split table": ["path,label,split"]}
    files = sorted((place / "folders").rglob("*.*"), key=lambda file: file.parts)
    tables["table"] += [f"{file},{file.relative_to(place / 'folders').parts[0]}" for file in files]
    for split in SPLITS:
        source = getattr(splits, split)
        for file, target in zip(source.files, source.targets.tolist(), strict=True):
            inside = file.relative_to(place / "folders")
            linked = place / "split folders" / split / inside
            linked.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, linked)
            lines[linked] = f"{inside},{CLASSES[target]},{split}"
    tables["split table"] += [lines[file] for file in sorted(lines, key=lambda file: file.parts)]
    found["split folders"] = {"name": "image_folder", "root": str(place / "split folders")}
    for name, text in tables.items():
        (place / f"{name}.csv").write_text("\n".join(text))
        found[name] = {
            "name": "table",
            "table": str(place / f"{name}.csv"),
            "root": str(place / "folders"),
        }
    return found


def settings_of(layout: dict[str, str], num_workers: int = 0) -> DataConfig:
    return DataConfig(
        **layout,
        image_size=SIZE,
        batch_size=47,
        eval_batch_size=40,
        num_workers=num_workers,
        augment=AugmentConfig(shift=1, flip=True),
    )


def load_layout(layout: dict[str, str]) -> Splits:
    return load(settings_of(layout))


def batches(splits: Splits, settings: DataConfig, rank: int, world_size: int) -> list[torch.Tensor]:
    """Images, targets and positions of each batch of two splits, as one rank gets them."""
    return [
        tensor
        for loader in ("train_dataloader", "test_dataloader")
        for batch in of_rank(splits, settings, loader, rank, world_size)
        for tensor in (batch.images, batch.target, batch.index)
    ]


def members(splits: Splits) -> dict[str, dict[str, int]]:
    """The class of each picture of each split."""
    sources = {split: getattr(splits, split) for split in SPLITS}
    return {
        split: {
            file.name: target for file, target in zip(own.files, own.targets.tolist(), strict=True)
        }
        for split, own in sources.items()
    }


# Drawn rows are shuffled, and listed ones stay in their order.
PAIRS = {"folders": "table", "split folders": "split table"}


def test_every_layout_has_the_same_splits(layouts: dict[str, dict[str, str]]) -> None:
    drawn, *others = [members(load_layout(layout)) for layout in layouts.values()]
    assert {split: len(files) for split, files in drawn.items()} == {
        "train": 432,
        "val": 48,
        "test": 120,
    }
    assert all(other == drawn for other in others)


CELLS = [
    pytest.param(world_size, num_workers, marks=[] if (world_size, num_workers) == (3, 0) else slow)
    for world_size in (1, 2, 3)
    for num_workers in (0, 2)
]


@pytest.mark.parametrize(("world_size", "num_workers"), CELLS)
def test_folders_and_tables_give_the_same_batches_to_the_bit(
    layouts: dict[str, dict[str, str]], world_size: int, num_workers: int
) -> None:
    for first, second in PAIRS.items():
        alone = settings_of(layouts[first])
        expected = batches(load(alone), alone, 0, 1)
        assert len(expected) == 3 * (10 + 3)  # tensors of batches of 432 and 120 pictures
        for name in (first, second):
            settings = settings_of(layouts[name], num_workers)
            splits = load(settings)
            assert splits.class_names == CLASSES
            ranks = [batches(splits, settings, rank, world_size) for rank in range(world_size)]
            for whole, parts in zip(expected, zip(*ranks, strict=True), strict=True):
                assert torch.equal(torch.cat(parts), whole)


@slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("layout", ["split folders", "table"])
def test_a_run_goes_on_in_mid_epoch(
    layouts: dict[str, dict[str, str]], layout: str, ranks: int, tmp_path: Path
) -> None:
    where = [f"data.{key}='{value}'" for key, value in layouts[layout].items() if key != "name"]
    options = (
        *("callbacks=quiet", "logger=csv", "parity=off", "trainer.threads=1", "model=mlp"),
        *(f"data={layouts[layout]['name']}", *where, f"data.image_size={SIZE}"),
        *("data.batch_size=47", "data.num_workers=2", "data.augment.shift=1"),
        *("checkpoint.every_n_steps=1", "trainer.max_steps=13", "test_weights=last"),
        *("trainer=ddp_cpu", f"trainer.devices={ranks}"),
    )
    whole = composed(*options)
    cut = composed(*options, "trainer.max_time=00:00:00:00")
    run_ranks(run_in_rank, ranks, whole, tmp_path / "whole")
    for _ in range(2):
        run_ranks(run_until_out_of_time, ranks, cut, tmp_path / "cut")
    run_ranks(run_in_rank, ranks, whole, tmp_path / "cut")
    assert [part["from_step"] for part in Result.read(tmp_path / "cut").segments] == [0, 1, 2]
    assert set(bits(tmp_path / "cut", tmp_path / "whole").values()) == {0}
