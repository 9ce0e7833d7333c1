"""An epoch of image files: torchvision's folder and torch's loader against this project's."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.paired import Arrangement, Measure
from equiloss.config import DataConfig
from equiloss.data import memory
from equiloss.data.datamodule import ImageDataModule
from equiloss.data.datasets import load

PICTURES, CLASSES, SIZE, BATCH = 600, 6, 64, 50


def write_pictures(root: Path) -> None:
    """Photograph-like JPEG files of 256 x 192 pixels, in folders of classes."""
    generator = np.random.default_rng(0)
    for number in range(PICTURES):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        folder = root / "train" / str(number % CLASSES)
        folder.mkdir(parents=True, exist_ok=True)
        coarse.resize((256, 192), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    for split in ("val", "test"):
        for number in range(CLASSES):
            folder = root / split / str(number)
            folder.mkdir(parents=True)
            Image.new("RGB", (256, 192), (number, 0, 0)).save(folder / "0.jpg")


def torchvision(num_workers: int) -> Measure:
    """Seconds of an image in an epoch of `ImageFolder` and `DataLoader`."""
    place = tempfile.TemporaryDirectory()
    write_pictures(Path(place.name))
    transform = v2.Compose(
        [
            v2.Resize((SIZE, SIZE)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = ImageFolder(str(Path(place.name) / "train"), transform)
    loader = DataLoader(
        images, BATCH, shuffle=True, num_workers=num_workers, persistent_workers=num_workers > 0
    )

    def measure(_: object = place) -> float:
        began = time.perf_counter()
        rows = sum(len(batch) for batch, _ in loader)
        return (time.perf_counter() - began) / rows

    return measure


def equiloss(cache: str, num_workers: int, *, first: bool = False) -> Measure:
    """Seconds of an image in an epoch of this project's loader, normalisation included.

    Args:
        cache: `data.cache`.
        num_workers: `data.num_workers`.
        first: Whether each epoch is to be a first one, in which nothing is decoded yet.
    """
    place = tempfile.TemporaryDirectory()
    write_pictures(Path(place.name))
    config = DataConfig(
        name="image_folder",
        root=place.name,
        image_size=SIZE,
        batch_size=BATCH,
        num_workers=num_workers,
        cache=cache,
    )

    def loaded() -> ImageDataModule:
        data = ImageDataModule(load(config), config, seed=0)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]  # what it asks of one
            global_rank=0,
            world_size=1,
            training=True,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            lightning_module=SimpleNamespace(dtype=torch.float32),
        )
        return data

    data = loaded()
    loader = data.train_dataloader()

    def measure(_: object = place) -> float:
        nonlocal data, loader
        if first:
            memory.forget()
            data = loaded()
        began = time.perf_counter()
        if first:
            loader = data.train_dataloader()
        rows = sum(len(data.on_after_batch_transfer(batch, 0).images) for batch in loader)
        return (time.perf_counter() - began) / rows

    return measure


def arrangements() -> list[Arrangement]:
    """Each way to read pictures, torchvision's first."""
    ours, theirs = "benchmarks.pictures:equiloss", "benchmarks.pictures:torchvision"
    kept = {"cache": "memory", "num_workers": 0}
    return [
        Arrangement("ImageFolder and DataLoader", theirs, {"num_workers": 0}),
        Arrangement("the same, 2 workers", theirs, {"num_workers": 2}),
        Arrangement("equiloss", ours, {"cache": "none", "num_workers": 0}),
        Arrangement("equiloss, 2 workers", ours, {"cache": "none", "num_workers": 2}),
        Arrangement("equiloss, data.cache=memory, first epoch", ours, {**kept, "first": True}),
        Arrangement("equiloss, data.cache=memory, later epochs", ours, kept),
    ]
