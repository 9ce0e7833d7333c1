"""What the proofs must notice: the usual reduction, and a process that is killed."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import Optimizer

from equiloss.distributed import collectives
from equiloss.losses import reduction
from equiloss.training.classifier import Classifier


@contextmanager
def local_means() -> Iterator[None]:
    """Let every rank divide by the mass of its own slice: a mean of means."""

    def own(value: Tensor) -> collectives.PendingSum:
        return collectives.PendingSum(value.detach().clone(), None)

    with (
        mock.patch.object(collectives, "start_sum", own),
        mock.patch.object(reduction, "rank_loss", reduction.mean),
    ):
        yield


class KillInStep(Callback):
    """SIGKILL to this process between the backward pass and the optimizer, on every rank.

    Args:
        step: Index of the optimizer step that is not taken.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(
        self,
        trainer: Trainer,
        pl_module: Classifier,  # type: ignore[override]
        optimizer: Optimizer,
    ) -> None:
        """Die, if it is the step."""
        if pl_module.step_index == self.step:
            _die()


class KillAfterStep(Callback):
    """SIGKILL to this process after an optimizer step, before anything is made of it.

    Args:
        step: Index of the optimizer step that is the last.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Classifier,  # type: ignore[override]
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Die, if it was the step."""
        if pl_module.step_index == self.step + 1:
            _die()


class KillInWrite(Callback):
    """SIGKILL to the first rank half-way through the first checkpoint written after a step.

    Args:
        step: Index of the optimizer step after which a write is cut.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Classifier,  # type: ignore[override]
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Arm the next write."""
        if pl_module.step_index > self.step:
            torch.save = _write_half  # type: ignore[assignment]  # the process ends in it


def _write_half(value: Any, file: Any, **options: Any) -> None:
    if not (isinstance(value, dict) and "state_dict" in value):
        _save(value, file, **options)  # a tensor on its way to another rank
        return
    whole = io.BytesIO()
    _save(value, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    _die()


_save = torch.save


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
