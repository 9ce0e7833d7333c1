"""What a run saves while it trains, and from which of it an interrupted run goes on.

A run that continues from `last.ckpt` is, on as many ranks, the uninterrupted run to the bit.

`checkpoints/last.ckpt` is the full state of the newest step saved, `checkpoints/previous.ckpt` the
one before, and `checkpoints/best.ckpt` the weights with the best monitored metric. One that is
damaged is set aside, and the run goes on from the newest that is whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from equiloss.config import CheckpointConfig
from equiloss.distributed import collectives, interruption
from equiloss.errors import CheckpointError, DamagedError
from equiloss.records.reading import fits
from equiloss.records.run_dir import BEST, LAST, PREVIOUS, TESTED, set_aside
from equiloss.records.train_log import note
from equiloss.records.writing import writing
from equiloss.training.averaging import measured_by
from equiloss.training.checkpoint_file import AtomicCheckpointIO, verify
from equiloss.training.starting_weights import load_weights
from equiloss.training.state import RunState

if TYPE_CHECKING:
    from equiloss.records.metrics_csv import MetricsCsv
    from equiloss.training.classifier import Classifier
    from equiloss.training.step import StepOutcome

log = logging.getLogger(__name__)


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
        self.found: Path | None = None
        """The state that a run goes on from, once `find_state` has found it."""
        # A file of that name may be of another run.
        self._has_best = False
        self._damaged: list[Path] = []
        self._saved_step = -1
        # What waits for the validation after this step: to save, and to stop.
        self._save_due = self._stop_due = False
        self._stopping = False

    @property
    def best_path(self) -> Path:
        """Weights with the best monitored metric."""
        return self.directory / BEST

    @property
    def last_path(self) -> Path:
        """Full state of the newest step saved."""
        return self.directory / LAST

    def find_state(self) -> int | None:
        """Find the newest full state that is whole; nothing is changed.

        Returns:
            Optimizer steps of the run when it was saved; None if there is none to go on from.

        Raises:
            CheckpointError: for a state that cannot be read, or that is none of ours.
        """
        for path in (self.last_path, self.directory / PREVIOUS):
            if self.found is None and self._is_whole(path):
                self.found = path
        if self.found is None:
            return None
        self._has_best = self._is_whole(self.best_path)
        state = AtomicCheckpointIO().load_checkpoint(self.found)
        RunState.load(state, self.found)
        if not fits(state, {"global_step": int}):
            raise CheckpointError(f"{self.found} does not say how many steps its run had taken")
        return int(state["global_step"])

    def _is_whole(self, path: Path) -> bool:
        if not path.is_file():
            return False
        try:
            verify(path)
        except DamagedError:
            self._damaged.append(path)
            return False
        return True

    def set_damaged_aside(self) -> None:
        """Rename what `find_state` found damaged, and say so; a rank that looks later misses it."""
        for path in self._damaged:
            log.warning("%s is damaged: it is %s now", path, set_aside(path).name)
        if self._damaged and self.found is None:
            log.warning("no state of %s is whole: the run starts anew", self.directory.parent)
        self._damaged = []

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Mapping[str, StepOutcome],
        *_: Any,
    ) -> None:
        """Save the state every so many steps, and before a stop that a signal asked for.

        Raises:
            Interrupted: on every rank, after the same step.
        """
        # An epoch's last batch is saved with its epoch, after validation: a run resumed between
        # the two would leave the validation out.
        if trainer.is_last_batch:
            return
        # Alone there is no one to agree with.
        stop = outputs["outcome"].stop or (trainer.world_size == 1 and interruption.asked())
        every = self.config.every_n_steps
        self._stop_due = bool(stop)
        self._save_due = self._stop_due or (every is not None and trainer.global_step % every == 0)
        fit_loop = trainer.fit_loop
        assert fit_loop._data_fetcher is not None
        # A resumed run would leave out the validation of a step that was saved before it.
        if not fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher):
            self._save_and_stop(trainer)

    def _save_and_stop(self, trainer: Trainer) -> None:
        if self._save_due:
            self._save_due = False
            self._save_last(trainer)
        if self._stop_due:
            interruption.stop()

    def on_validation_end(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Save the weights if the monitored metric is the best so far.

        Raises:
            Interrupted: on every rank, where a signal has asked for it inside an epoch.
        """
        value = pl_module.progress.scalars[self.config.monitor]
        sign = -1 if self.config.mode == "max" else 1
        better = self.best is None or sign * value < sign * self.best
        if math.isnan(value):
            better = not self._has_best
        if better:
            self._has_best = True
            self.best = None if math.isnan(value) else value
            with writing(self.best_path), measured_by(self.config.monitor, trainer):
                trainer.save_checkpoint(self.best_path, weights_only=True)
            if trainer.is_global_zero:
                steps = f"after {trainer.global_step} steps"
                note(self.directory.parent, f"{BEST}: {self.config.monitor} {value:.6g} {steps}")
        self._save_and_stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state at the end of each epoch, and stop if a signal has asked for it."""
        self._save_last(trainer)
        wish = interruption.wish(torch.empty((), device=pl_module.device))
        if collectives.max_over_ranks(wish) > 0:
            interruption.stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state at the end of the run."""
        self._save_last(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The best value, the rows logged, and whether the run was about to stop."""
        return {"best": self.best, "rows": self.metrics.rows, "stopping": self._stopping}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        # Without its weights, a value is nothing to be better than.
        self.best = state_dict["best"] if self._has_best else None
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
            with writing(self.last_path):
                trainer.save_checkpoint(self.last_path)

    def load_tested(self, module: Classifier) -> dict[str, float]:
        """Load what `test_weights` names into a classifier that has the last weights.

        It keeps those where the file is not there or not whole.

        Returns:
            The validation metrics of the weights that are loaded now.
        """
        path = self.directory / TESTED[module.config.test_weights]
        if path == self.last_path:
            return {}
        if module.config.test_weights == "ema":
            # In the table of a run the figures of val/loss are those of the weights themselves.
            log.info("the averaged weights are tested (test_weights=ema)")
        try:
            return load_weights(module, path)
        except DamagedError as error:
            lost = str(error)
        except CheckpointError:
            if path.is_file():
                raise
            lost = f"{path} is gone"
        note = f"{lost}: the last weights were tested"
        log.warning("%s", note)
        module.progress.notes.append(note)
        return {}
