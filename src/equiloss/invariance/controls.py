"""Faults that the proofs must notice: the usual reduction, and a process that is killed."""

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

from equiloss.data.sources import Batch
from equiloss.distributed import collectives
from equiloss.distributed.gradient_sums import GradientSums
from equiloss.losses import reduction
from equiloss.training.classifier import Classifier
from equiloss.training.step import MicroBatches


@contextmanager
def local_means() -> Iterator[None]:
    """Let every rank divide by the mass of its own slice: a mean of means."""

    def local_sum(value: Tensor) -> collectives.PendingSum:
        return collectives.PendingSum(value.detach().clone(), None)

    def local_mass(self: MicroBatches, batch: Batch) -> collectives.PendingSum:
        return local_sum(self.module.criterion.mass(batch.target, self.module.loss_dtype))

    with (
        mock.patch.object(collectives, "start_sum", local_sum),
        mock.patch.object(MicroBatches, "_mass", local_mass),
        mock.patch.object(GradientSums, "finish", lambda sums: sums.numbers),
        mock.patch.object(reduction, "rank_loss", reduction.mean),
    ):
        yield


class Kill(Callback):
    """SIGKILL to this process at an optimizer step.

    Args:
        moment: `in step`, between the backward pass and the optimizer; `after step`, before
            anything is made of it; or `in a checkpoint after` it, half-way through the first that
            is written, on the first rank.
        step: Index of the step.
    """

    def __init__(self, moment: str, step: int) -> None:
        self.moment = moment
        self.step = step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Classifier, *_: Any) -> None:  # type: ignore[override]
        """Die between the backward pass and the optimizer, in the chosen step."""
        if self.moment == "in step" and pl_module.global_step == self.step:
            _die()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Classifier, *_: Any) -> None:  # type: ignore[override]
        """Die after the step, or arm the next write."""
        if self.moment == "after step" and pl_module.global_step == self.step + 1:
            _die()
        if self.moment == "in a checkpoint after" and pl_module.global_step > self.step:
            torch.save = _write_half  # type: ignore[assignment]  # the process ends in it


def _write_half(value: Any, file: Any, **options: Any) -> None:
    if not (isinstance(value, dict) and "state_dict" in value):
        _save(value, file, **options)  # a tensor on its way to another rank
        return
    content = io.BytesIO()
    _save(value, content)
    file.write(content.getvalue()[: content.tell() // 2])
    file.flush()
    _die()


_save = torch.save


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
