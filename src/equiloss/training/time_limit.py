"""A limit on the time that one attempt at a run trains."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from equiloss.distributed import interruption


class TimeLimit(Callback):
    """Has a run stop, with its state on disk, when it has trained for so long.

    Lightning's own timer would let the run end as if it were complete, and at once again when it
    is continued.

    Args:
        seconds: Time from the attempt's first step on; one step is taken in any case.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def on_train_batch_start(self, *_: Any) -> None:
        """Ask for a stop once the time is over; every rank then stops after the same step."""
        if time.monotonic() - self._began > self.seconds:
            interruption.ask_for_lack_of_time()
