"""Seconds of training and accuracy on Fashion-MNIST's test images, all threads of the machine.

    python -m benchmarks.accuracy [RECIPE …] [--seeds 11 12 …]

Prints the table of docs/performance.md: an experiment of conf/ is run by train.py and tested once,
at its end; `common`, the shipped convnet in the style of popular templates, is tested after each
epoch, off the clock.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from benchmarks import baselines
from benchmarks.loop import composed, fashion_mnist
from equiloss.data import datasets
from equiloss.data.sources import ArraySource
from equiloss.models.networks import ConvNet

ROOT = Path(__file__).parents[1]
COMMON = "common"
EXPERIMENTS = ("fashion_mnist_fast", "fashion_mnist_fast_93")
RECIPES = (*EXPERIMENTS, COMMON)
COMMON_EPOCHS = 10


class Figure(NamedTuple):
    """What a recipe had reached, and when."""

    name: str
    train_s: float
    """Seconds in training steps."""
    all_s: float | None
    """Seconds of the whole process, from its start: imports, validation, test and figures too."""
    accuracy: float
    """Share of the 10,000 test images."""


def experiment(name: str, seed: int) -> Iterator[Figure]:
    """Run an experiment of conf/ as a user does."""
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        subprocess.run(
            [
                *(sys.executable, "train.py", f"experiment={name}", f"seed={seed}"),
                *("callbacks=quiet", f"hydra.run.dir={directory}/run"),
            ],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        seconds = time.perf_counter() - began
        result = json.loads(Path(directory, "run", "results.json").read_text())
    yield Figure(name, result["timing"]["train_s"], seconds, result["metrics"]["test/acc"])


class Course(Callback):
    """Accuracy after each epoch of training, and the seconds until then without the look at it."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images, targets
        self.began = self.train_s = 0.0
        self.figures: list[Figure] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop it, and test."""
        self.train_s += time.perf_counter() - self.began
        network = module.network.eval()  # type: ignore[union-attr]
        hits = 0
        for first in range(0, len(self.targets), 1000):
            rows = slice(first, first + 1000)
            pixels = self.images[rows].float().sub_(0.2860 * 255).div_(0.3530 * 255)
            hits += int((network(pixels).argmax(1) == self.targets[rows]).sum())
        network.train()
        name = f"{COMMON}, epoch {trainer.current_epoch + 1}"
        self.figures.append(Figure(name, self.train_s, None, hits / len(self.targets)))


def common(seed: int) -> Iterator[Figure]:
    """Train the shipped convnet as a popular template would, with Adam at 0.001 and batches of 128.

    Samples are transformed one by one, two metrics are logged in each step to two loggers.
    """
    warnings.simplefilter("ignore")
    seed_everything(seed)
    test = datasets.load(composed("data=fashion_mnist").config.data).test
    assert isinstance(test, ArraySource)
    network = ConvNet(10, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    course = Course(test.images, test.targets)
    with tempfile.TemporaryDirectory() as directory:
        Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=COMMON_EPOCHS,
            callbacks=[course],
            logger=[CSVLogger(directory), TensorBoardLogger(directory)],
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        ).fit(
            baselines.CommonStyle(network, optimizer),
            baselines.common_loader(*fashion_mnist()),
        )
    yield from course.figures


def main() -> None:
    """Run, and print a row for each figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("recipes", nargs="*", metavar=f"{{{','.join(RECIPES)}}}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15])
    asked = parser.parse_args()
    for name in asked.recipes:
        if name not in RECIPES:
            parser.error(f"{name!r} is no recipe; there are {', '.join(RECIPES)}")
    print("| recipe | seed | training (s) | process (s) | test accuracy |")
    print("|---|---:|---:|---:|---:|", flush=True)
    for recipe in asked.recipes or RECIPES:
        for seed in asked.seeds:
            figures = common(seed) if recipe == COMMON else experiment(recipe, seed)
            for name, train_s, all_s, accuracy in figures:
                whole = "" if all_s is None else f"{all_s:.0f}"
                print(
                    f"| {name} | {seed} | {train_s:.0f} | {whole} | {100 * accuracy:.2f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
