"""Progress bar, and a line for each epoch where there is no terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar

if TYPE_CHECKING:
    from equiloss.training.classifier import Classifier

SHOWN = ("train/loss", "val/loss", "val/acc")


class LiveProgress(RichProgressBar):
    """Lightning's bar with the newest loss and accuracy."""

    def get_metrics(self, trainer: Trainer, pl_module: Classifier) -> dict[str, Any]:  # type: ignore[override]
        """The newest values, without Lightning's version number."""
        return {name: f"{value:.4f}" for name, value in _shown(pl_module)}


class EpochLines(Callback):
    """One line for each epoch, for logs and pipes."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Print the newest values."""
        if trainer.is_global_zero:
            values = "  ".join(f"{name} {value:.4f}" for name, value in _shown(pl_module))
            print(f"epoch {trainer.current_epoch + 1}: {values}", flush=True)


def _shown(classifier: Classifier) -> list[tuple[str, float]]:
    scalars = classifier.progress.scalars
    return [(name, scalars[name]) for name in SHOWN if name in scalars]
