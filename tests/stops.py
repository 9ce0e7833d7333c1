"""Ends of a run in the middle, in place of a process that is killed."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer


class StopError(Exception):
    """Stands for whatever ends a process."""


class StopBefore(Callback):
    """Raises when an optimizer step is about to begin."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise StopError
