"""Helpers of the tests: composing a configuration, and reading what a run left behind."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from equiloss.config import resolved
from equiloss.config.resolved import ResolvedConfig, resolve
from equiloss.losses import config_source
from equiloss.records.results import Result

if TYPE_CHECKING:
    from equiloss.config import DataConfig
    from equiloss.data.sources import Batch
    from equiloss.data.splits import Splits

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
# For processes that tests start: what this one can import, and the tests' own modules.
PYTHONPATH = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])

# Small and quiet: what every test of a whole run starts from.
QUIET = ("callbacks=quiet", "model.options.widths=[8,16]")

slow = pytest.mark.slow
fuzz = pytest.mark.fuzz

Install = Callable[..., None]
Run = Callable[..., Result]
Train = Callable[..., subprocess.CompletedProcess[str]]


def composed(*overrides: str) -> ResolvedConfig:
    """The resolved configuration that `train.py` would get.

    Hydra takes a third of a second for it, and a thousand are asked for: it composes anew where
    the overrides, or what a configuration may depend on beside them, are others.
    """
    variables = {**os.environ, "PYTEST_CURRENT_TEST": ""}
    surroundings = (resolved.Config, Path.cwd(), *sys.path, *sorted(variables.items()))
    return deepcopy(_composed(overrides, surroundings))


@cache
def _composed(overrides: tuple[str, ...], _surroundings: tuple[object, ...]) -> ResolvedConfig:
    resolved.register_schema()
    config_source.install()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return resolve(compose("config", overrides=list(overrides)))


def composed_with_hydra(*overrides: str) -> DictConfig:
    """Hydra's and our configuration, as a multirun's callback gets it."""
    resolved.register_schema()
    config_source.install()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


def wrong_with(line: str) -> str | None:
    """What is wrong with the line that a user is shown of an error, if anything is."""
    if not line.isprintable():
        return f"it is no printable line: {line!r}"
    if re.search(r"\b\w*(Error|Exception|Warning)\b:", line):
        return f"it names an exception of Python's: {line}"
    if len(line) >= 600:
        return f"it has {len(line)} characters: {line}"
    return None if line.strip() else "it is empty"


def final_weights(run_dir: Path, name: str = "last.ckpt") -> dict[str, Tensor]:
    """The network's weights after the last step, or those of another checkpoint."""
    checkpoint = torch.load(run_dir / "checkpoints" / name, weights_only=True)
    weights: dict[str, Tensor] = checkpoint["state_dict"]
    return weights


@contextmanager
def no_room(size: int = 0) -> Iterator[None]:
    """Have the operating system refuse files beyond so many bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_noise(
    root: Path, names: Sequence[str] = ("cat", "dog"), *, count: int = 12, height: int = 8
) -> None:
    """Pictures of noise, 8 pixels wide, in a folder for each class: root/cat/00.png and so on."""
    generator = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (height, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")


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
    """What a rank that does not exist gets of a loader."""
    from equiloss.data.datamodule import ImageDataModule  # and Lightning, which takes seconds

    data = ImageDataModule(splits, settings, seed=4)
    data.memory_format = torch.channels_last
    data.trainer = stand_in(rank, world_size, training=loader == "train_dataloader")
    return [data.on_after_batch_transfer(batch, 0) for batch in getattr(data, loader)()]
