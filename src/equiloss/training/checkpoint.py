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
from equiloss.models import weights
from equiloss.records.reading import fits
from equiloss.records.run_dir import BEST, LAST, PREVIOUS, TESTED, set_aside
from equiloss.records.train_log import note
from equiloss.records.writing import writing
from equiloss.training.averaging import measured_by
from equiloss.training.checkpoint_file import AtomicCheckpointIO, verify
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


def give_weights(module: Classifier, *, continued: bool) -> None:
    """Load the weights that the configuration names: to evaluate, or for a fit to start from.

    Args:
        module: Gets them.
        continued: Whether the fit goes on from a state of its own.

    Raises:
        CheckpointError: as `load_weights`, `start_from` and `weights.give`.
    """
    config = module.config
    if config.task != "fit":
        load_weights(module, Path(str(config.ckpt_path)))
    elif config.init_from is not None and not continued:
        log.info("starting with %s", start_from(module, Path(config.init_from)))
    elif config.model.weights is not None and not continued:
        classes = module.evaluation.num_classes
        log.info("starting with %s", weights.give(module.model, config.model, classes))


def start_from(module: Classifier, path: Path) -> str:
    """Give a network the weights of a checkpoint, but for a head of another size.

    Returns:
        What was taken, in words.

    Raises:
        CheckpointError: if the file is missing, damaged or none of ours, or has other tensors.
    """
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    RunState.load(loaded, path)
    own = {n: t for n, t in module.state_dict().items() if n.startswith("model.")}
    given = {n: t for n, t in loaded["state_dict"].items() if n.startswith("model.")}
    fits_not = [n for n in own if n not in given or own[n].shape != given[n].shape]
    fits_not += sorted(given.keys() - own.keys())
    head = [n for n in own if n.rpartition(".")[0] == [*own][-1].rpartition(".")[0]]
    odd = [name for name in fits_not if name not in head]
    if odd:
        raise CheckpointError(
            f"init_from={path} does not fit model {module.config.model.name!r}: "
            f"{len(odd)} tensors are others, {odd[0]} the first"
        )
    kept = {name: tensor for name, tensor in given.items() if name not in fits_not}
    module.load_state_dict(kept, strict=False)
    new = f"; the head is new ({', '.join(fits_not)})" if fits_not else ""
    return f"{len(kept)} tensors from {path}{new}"


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
