"""The position in an epoch's order at which a checkpoint was written, and a resumed run goes on."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loops.loop import _Loop


def reached(fit_loop: Any) -> tuple[int, int]:
    """Epoch of Lightning's fit loop, and the batches of it that are done."""
    # Unlike the counters of the current epoch, the total means the same in every hook.
    done = fit_loop.epoch_loop.batch_progress.total.processed
    # Before the first batch, or outside of training, the length of an epoch may be unknown.
    return divmod(done, int(fit_loop.max_batches)) if done else (0, 0)


def restore(fit_loop: Any, epoch: int, batch: int) -> None:
    """Set Lightning's counters to what they are before this batch of an uninterrupted run.

    Restored counters differ with the hook that wrote the checkpoint. After the last batch of an
    epoch some of them make Lightning train nothing, and others leave it an epoch whose next
    checkpoint cannot be resumed. Two states are sound: between two epochs, and within an epoch as
    `on_train_batch_end` sees it, where `completed` is one behind.
    """
    within = batch > 0
    for epochs in (fit_loop.epoch_progress.total, fit_loop.epoch_progress.current):
        epochs.ready = epochs.started = epoch + within
        epochs.processed = epochs.completed = epoch
    progress = fit_loop.epoch_loop.batch_progress
    done = progress.total.processed
    for batches, number in ((progress.total, done), (progress.current, batch)):
        batches.ready = batches.started = batches.processed = number
        batches.completed = number - within
    progress.is_last_batch = False
    fit_loop.epoch_loop._batches_that_stepped = done - within
    # The fit loop's own setter takes any run with max_steps for a restart, between epochs too.
    restarting: Any = _Loop.restarting
    restarting.fset(fit_loop, within)
