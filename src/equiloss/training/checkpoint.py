"""Checkpoints that are whole or not there: atomic writes, and a digest that is checked on load.

A run that continues from `last.ckpt` is, on as many ranks, the uninterrupted run to the bit.

`checkpoints/last.ckpt` is the full state of the newest step saved, `checkpoints/best.ckpt` the
weights with the best monitored metric, and `checkpoints/index.json` has a SHA-256 for each (a
flipped byte in a checkpoint would otherwise load in silence).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from equiloss.config import CheckpointConfig
from equiloss.errors import CheckpointError
from equiloss.records.atomic import write_atomically
from equiloss.records.run_dir import BEST, INDEX, LAST
from equiloss.training.state import RunState

if TYPE_CHECKING:
    from equiloss.records.metrics_csv import MetricsCsv
    from equiloss.training.classifier import Classifier


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then moves it there; verifies it when it is read."""

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any | None = None,
    ) -> None:
        """Write `path` and its digest so that a crash at any moment leaves a loadable pair."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:  # an interrupt too
            temporary.unlink(missing_ok=True)
            raise
        index = _read_index(place.parent)
        digest = _digest(temporary)
        # The index is written first, with the digests of all that a crash, or several, may leave
        # behind; once the file is in its place, only its own is left.
        index[place.name] = [digest, *index.get(place.name, [])]
        _write_index(place.parent, index)
        temporary.replace(place)
        index[place.name] = [digest]
        _write_index(place.parent, index)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint of tensors and plain data.

        Raises:
            CheckpointError: if the file is missing, or its digest is not the one on record.
        """
        place = Path(path)
        if not place.is_file():
            raise CheckpointError(f"no checkpoint at {place}")
        known = _read_index(place.parent).get(place.name)
        if known is not None and _digest(place) not in known:
            raise CheckpointError(
                f"{place} is damaged: its SHA-256 is not the one in {place.parent / INDEX}"
            )
        try:
            loaded: dict[str, Any] = torch.load(place, map_location=map_location, weights_only=True)
        except Exception as error:  # torch raises many types for a file that is no checkpoint
            raise CheckpointError(f"{place} is not a checkpoint: {error}") from error
        return loaded


class Checkpoints(Checkpoint):
    """Saves `last.ckpt` (full state) and `best.ckpt` (weights) while a run trains.

    Args:
        directory: Where the checkpoints go.
        config: Monitored metric, its direction, and how often the last state is saved.
        metrics: The run's metrics.csv: a checkpoint says how many of its rows came before.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, metrics: MetricsCsv) -> None:
        self.directory = directory
        self.config = config
        self.metrics = metrics
        self.best: float | None = None
        """The best value of the monitored metric so far."""
        # A file of that name may be of another run.
        self._has_best = False
        self._saved_step = -1
        self._stopping = False

    @property
    def best_path(self) -> Path:
        """Weights with the best monitored metric."""
        return self.directory / BEST

    @property
    def last_path(self) -> Path:
        """Full state of the newest step saved."""
        return self.directory / LAST

    def saved_step(self) -> int | None:
        """Optimizer steps of the run when it was last saved; None if it was not."""
        if not self.last_path.is_file():
            return None
        step: int = AtomicCheckpointIO().load_checkpoint(self.last_path)["global_step"]
        return step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save the state every so many steps."""
        every = self.config.every_n_steps
        # An epoch's last batch is saved with its epoch, after validation: a run resumed between
        # the two would leave the validation out.
        if every is not None and trainer.global_step % every == 0 and not trainer.is_last_batch:
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Save the weights if the monitored metric is the best so far."""
        value = pl_module.progress.scalars[self.config.monitor]
        sign = 1 if self.config.mode == "min" else -1
        better = self.best is None or sign * value < sign * self.best
        if math.isnan(value):
            better = not self._has_best
        if better:
            self._has_best = True
            self.best = None if math.isnan(value) else value
            trainer.save_checkpoint(self.best_path, weights_only=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state at the end of each epoch."""
        self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state at the end of the run."""
        self._save_last(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The best value, the rows logged, and whether the run was about to stop."""
        return {"best": self.best, "rows": self.metrics.rows, "stopping": self._stopping}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.best = state_dict["best"]
        self._has_best = self.best_path.exists()
        self._stopping = state_dict["stopping"]
        self.metrics.continue_after(state_dict["rows"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once where early stopping had ended the run before it was interrupted."""
        trainer.should_stop = self._stopping

    def _save_last(self, trainer: Trainer) -> None:
        if trainer.global_step != self._saved_step:
            self._saved_step = trainer.global_step
            self._stopping = trainer.should_stop
            self.metrics.sync()
            trainer.save_checkpoint(self.last_path)


def load_weights(module: Classifier, path: Path) -> dict[str, float]:
    """Load a checkpoint's weights into a classifier.

    Returns:
        The validation metrics that were current when it was saved.

    Raises:
        CheckpointError: if the file is missing or damaged, or was made for other classes or
            another network.
    """
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    state = RunState.load(loaded, path)
    classes = module.evaluation.num_classes
    if state.num_classes != classes:
        raise CheckpointError(
            f"{path} was trained on {state.num_classes} classes, the data has {classes}"
        )
    try:
        module.load_state_dict(loaded["state_dict"])
    except RuntimeError as error:
        first = str(error).partition("\n")[2].strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} does not fit model {module.config.model.name!r}: {first}"
        ) from error
    return state.progress.of_split("val")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_index(directory: Path, index: dict[str, list[str]]) -> None:
    write_atomically(directory / INDEX, json.dumps(index, indent=2) + "\n")


def _read_index(directory: Path) -> dict[str, Any]:
    file = directory / INDEX
    index: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return index
