"""Whole runs inside the ranks of `run_ranks`."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig, OmegaConf

from equiloss.config import Config
from equiloss.config.resolved import ResolvedConfig, resolve
from equiloss.data.sources import Batch
from equiloss.distributed import collectives, membership
from equiloss.records.results import Result
from equiloss.records.run_dir import LAST_CHECKPOINT
from equiloss.run import run
from equiloss.training.classifier import Classifier

Tree = dict[str, Any]

# conf/ is no part of the package: these are its digits, convnet, sgd and cosine, made smaller.
# 1,150 training rows in batches of 47: no slice is like another, and an epoch's last batch is
# short. Class weights and smoothing make every row count differently.
DEFAULTS: Tree = {
    "loss": {
        "name": "cross_entropy",
        "weight": [0.5, 1.6, 2.0, 1.5, 0.7, 1.0, 3.0, 1.0, 0.2, 1.1],
        "label_smoothing": 0.1,
    },
    "data": {"name": "digits", "val_fraction": 0.2, "batch_size": 47, "augment": {"shift": 1}},
    "model": {"name": "convnet", "options": {"widths": [8, 16], "dropout": 0.1}},
    "optimizer": {
        "lr": 0.05,
        "weight_decay": 0.01,
        "options": {"momentum": 0.9, "nesterov": True},
    },
    "scheduler": {"name": "cosine", "warmup_fraction": 0.05},
    "trainer": {"precision": "64-true"},
    "logger": {"tensorboard": False},
    "parity": {"every_n_steps": 0},
    "progress_bar": False,
    "model_summary": False,
}


def config(*changes: Tree) -> ResolvedConfig:
    """The resolved configuration of a run: `DEFAULTS` with changes merged into them."""
    composed = OmegaConf.merge(OmegaConf.structured(Config), DEFAULTS, *changes)
    assert isinstance(composed, DictConfig)
    return resolve(composed)


def set_up_rank() -> None:
    """Set environment, start method and log levels as `ranks.supervise` does for a rank."""
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {
        membership.CHILD: "1",
        "RANK": rank,
        "LOCAL_RANK": rank,
        "NODE_RANK": "0",
        "WORLD_SIZE": world_size,
    }
    # A forked rank inherits its server's way to start processes; loader workers want the default.
    multiprocessing.set_start_method(None, force=True)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def train(directory: Path, *changes: Tree, callbacks: Sequence[Callback] = ()) -> Result:
    """On every rank: do a run whose devices are the ranks of the process group."""
    set_up_rank()
    world_size = dist.get_world_size()
    settings = config(*changes, {"trainer": {"devices": world_size}})
    directory.mkdir(parents=True, exist_ok=True)
    result = run(settings, directory, callbacks=callbacks)
    assert result.world_size == world_size
    return result


class Recorder(Callback):
    """Appends each step's global batch, its samples and a digest of its pixels, as a JSON line.

    Args:
        path: The file; the first rank writes, line by line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Classifier, batch: Batch, batch_idx: int
    ) -> None:
        """Gather the global batch over the ranks, and append its line."""
        index, images = collectives.gather_rows(batch.index), collectives.gather_rows(batch.images)
        if trainer.is_global_zero:
            pixels = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
            line = {"step": pl_module.global_step, "ids": index.tolist(), "pixels": pixels}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_records(path: Path) -> list[Tree]:
    """The lines that a `Recorder` wrote, one for each step."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last_checkpoint(run_dir: Path) -> Tree:
    """The state in the newest checkpoint of a run."""
    state: Tree = torch.load(run_dir / LAST_CHECKPOINT, weights_only=True)
    return state
