"""Writes how a run begins and each of its epochs to `train.log`: `tail -f` is a way to watch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer

from equiloss.config.resolved import ResolvedConfig
from equiloss.records import results
from equiloss.records.train_log import note
from equiloss.training.progress_bar import epoch_of

if TYPE_CHECKING:
    from equiloss.training.classifier import Classifier

FIGURES = (
    *("train/loss", "val/loss", "val/nll", "val/acc", "val/ema_nll", "val/ema_acc"),
    *("train/lr", "train/samples_per_s"),
)


class RunLog(Callback):
    """Lines of a run's beginning and of each epoch, on the first rank.

    Args:
        directory: The run directory.
        resolved: The run's configuration.
    """

    def __init__(self, directory: Path, resolved: ResolvedConfig) -> None:
        self.directory = directory
        self.resolved = resolved

    def on_train_start(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Say what trains on what, with which versions, and from which step on."""
        if not trainer.is_global_zero:
            return
        config, where = self.resolved.config, results.environment(trainer.strategy.root_device)
        versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
        sizes = ", ".join(f"{size} {split}" for split, size in pl_module.split_sizes.items())
        parameters = [each.numel() for each in pl_module.model.parameters()]
        learning = [e.numel() for e in pl_module.model.parameters() if e.requires_grad]
        done = f"going on after {pl_module.global_step} of " if pl_module.global_step else ""
        note(
            self.directory,
            versions,
            f"{where['device']} ({where['cpu']}), processes: {trainer.world_size}, threads of "
            f"each: {where['threads']}, {config.trainer.precision}; commit {where['git_commit']}",
            f"configuration {self.resolved.hash[:8]}: loss {pl_module.criterion.name} "
            f"{pl_module.criterion.options}, model {config.model.name} with {sum(parameters)} "
            f"parameters ({sum(learning)} of them learn)",
            f"data {config.data.name}: {sizes} samples, {pl_module.evaluation.num_classes} classes",
            f"{done}{pl_module.total_steps} steps of {config.data.batch_size} samples",
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Note the newest figures."""
        if trainer.is_global_zero:
            scalars = pl_module.progress.scalars
            figures = [f"{name} {scalars[name]:.6g}" for name in FIGURES if name in scalars]
            at = f"{epoch_of(trainer)}, {pl_module.global_step} steps"
            note(self.directory, f"{at}: {'  '.join(figures)}")
