"""The loaders without a Trainer: ranks, workers, memory order and the check of targets."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from equiloss.config import AugmentConfig, DataConfig
from equiloss.data.datamodule import ImageDataModule
from equiloss.data.datasets import ArraySource, Source, Splits, load
from equiloss.data.loader import WAY_OUT, SplitLoader, naming_dead_workers
from equiloss.data.sampler import Slice
from equiloss.errors import DataError
from support import of_rank, stand_in, write_noise


def config(**changes) -> DataConfig:
    settings = {"batch_size": 8, "options": {"num_samples": 40, "num_classes": 2}} | changes
    return DataConfig(name="synthetic", **settings)


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader", "test_dataloader"])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_together_see_what_one_rank_sees(loader, world_size):
    settings = config(eval_batch_size=6, augment=AugmentConfig(shift=1, flip=True))
    splits = load(settings)
    alone = of_rank(splits, settings, loader, 0, 1)
    ranks = [of_rank(splits, settings, loader, rank, world_size) for rank in range(world_size)]
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        for field in ("images", "target", "index"):
            together = torch.cat([getattr(part, field) for part in parts])
            assert torch.equal(together, getattr(whole, field))
    if loader != "train_dataloader":
        index = torch.cat([batch.index for batch in alone])
        assert index.tolist() == list(range(len(index)))
    smallest = min(len(batch.index) for batches in ranks for batch in batches)
    assert smallest == 0 or world_size < 7


def folder(root: Path, num_workers: int) -> ImageDataModule:
    pipeline = [{"name": "RandomCrop", "size": [8, 8], "padding": 2}]
    settings = DataConfig(
        name="image_folder",
        root=str(root),
        batch_size=5,
        num_workers=num_workers,
        augment=AugmentConfig(transforms=pipeline),
    )
    data = ImageDataModule(load(settings), settings, seed=0)
    data.trainer = stand_in(training=True)
    return data


def test_workers_change_no_image(tmp_path):
    write_noise(tmp_path)
    expected, batches = (list(folder(tmp_path, workers).train_dataloader()) for workers in (0, 2))
    assert len(batches) == len(expected) > 1
    for batch, reference in zip(batches, expected, strict=True):
        assert torch.equal(batch.images, reference.images)
        assert torch.equal(batch.index, reference.index)


def error_of(loader: SplitLoader) -> DataError:
    """The error with which reading ends; its workers are ended as Lightning would."""
    with pytest.raises(DataError) as caught:
        list(loader)
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
    return caught.value


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_named_also_by_a_worker(tmp_path, num_workers):
    write_noise(tmp_path)
    data = folder(tmp_path, num_workers)
    broken = data.splits.train.files[3]
    broken.write_bytes(b"")
    said = f"cannot read image {broken}: no known image format; mend or remove it"
    assert str(error_of(data.train_dataloader())) == said


class Failing(Source):
    """A source of a user's own that does not get far."""

    def __init__(self, fail: Callable[[], object]) -> None:
        super().__init__(torch.zeros(4, dtype=torch.int64), (1, 2, 2))
        self.fail = fail

    def read(self, part: Slice) -> torch.Tensor:
        self.fail()
        return torch.zeros(len(part.indices), 1, 2, 2, dtype=torch.uint8)


def loader_of(fail: Callable[[], object], num_workers: int, **changes) -> SplitLoader:
    """The loader of a validation split whose source fails."""
    source = Failing(fail)
    splits = Splits(source, source, source, ("a", "b"), (0.0,), (1.0,))
    # Where a test is broken, it is not to wait for ever.
    settings = config(num_workers=num_workers, **{"worker_timeout_s": 30.0} | changes)
    data = ImageDataModule(splits, settings, seed=0)
    data.trainer = stand_in()
    return data.val_dataloader()


def raised_by(fail: Callable[[], object], num_workers: int, **changes) -> DataError:
    """The error with which reading it ends."""
    error = error_of(loader_of(fail, num_workers, **changes))
    assert len(str(error).splitlines()) == 1
    return error


def no_such_key() -> object:
    return {}["shard"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_source_of_ones_own_is_named_and_its_traceback_kept(num_workers):
    error = raised_by(no_such_key, num_workers)
    assert str(error) == (
        "cannot read the val split: Failing failed on a batch of 4 samples (0, 1, 2, …): 'shard'"
    )
    trace = "".join(traceback.format_exception(error))
    assert "in no_such_key" in trace
    assert "KeyError: 'shard'" in trace


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_transform_that_fails_is_named(tmp_path, num_workers):
    write_noise(tmp_path)
    data = folder(tmp_path, num_workers)
    data._train_source.transform = lambda image: no_such_key()
    words = r"data\.augment\.transforms failed on train image \d+: 'shard' \(it is given .*\)"
    assert re.fullmatch(words, str(error_of(data.train_dataloader())))


def test_a_worker_that_was_killed_gets_the_ways_out():
    error = raised_by(lambda: os.kill(os.getpid(), signal.SIGKILL), 1)
    assert re.fullmatch(
        # torch tells the same death in two ways: the handler of SIGCHLD or the queue's own look.
        r"DataLoader worker \((pid \d+\) is killed by signal: Killed|"
        r"pid\(s\) \d+\) exited unexpectedly): memory or /dev/shm may be "
        rf"full; {re.escape(WAY_OUT)}",
        str(error),
    )


def no_room() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))


def test_shared_memory_that_is_full_gets_the_ways_out():
    """And ends the run: torch would wait for the batch for ever."""
    message = str(raised_by(no_room, 1))
    assert message.startswith("no room for a batch of the val split: unable to ")
    assert message.endswith(WAY_OUT)


def test_workers_that_cannot_be_started_get_the_ways_out(monkeypatch):
    """Lightning then fails over the loader once more, which is not what is said."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", full)
    loader = loader_of(lambda: None, 1)
    words = r"^cannot start the workers of the val split: no space left on device; give workers"

    def as_lightning() -> None:
        try:
            iter(loader)
        finally:
            raise RuntimeError("call iter first")

    with pytest.raises(DataError, match=words), naming_dead_workers():
        as_lightning()


def test_a_worker_that_is_stopped_with_its_batch_gets_the_ways_out():
    """The batch is announced, and its memory is never handed over: torch waits for ever."""
    loader = loader_of(lambda: None, 1, worker_timeout_s=1.0, eval_batch_size=1)
    batches = iter(loader)
    next(batches)
    time.sleep(0.5)  # the next two are announced
    (worker,) = loader._iterator._workers
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match=r"^the workers of the val split gave no batch in 1 s"):
        list(batches)
    worker.join(5)
    assert worker.exitcode == -signal.SIGKILL
    loader._iterator._shutdown_workers()


def test_a_worker_that_takes_too_long_gets_the_ways_out():
    message = str(raised_by(lambda: time.sleep(0.6), 1, worker_timeout_s=0.2))
    assert message.startswith("the workers of the val split gave no batch in 0.2 s: ")
    assert "raise data.worker_timeout_s (0: wait for ever)" in message


def test_a_death_is_told_wherever_torch_notices_it_and_no_other_error_is():
    killed = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"
    with (
        pytest.raises(DataError, match=r"^DataLoader worker .*: Bus error: memory"),
        naming_dead_workers(),
    ):
        raise RuntimeError(killed)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), naming_dead_workers():
        raise RuntimeError("shapes differ")


def test_iterating_leaves_the_global_generator_alone():
    data = ImageDataModule(load(config()), config(), seed=0)
    data.trainer = stand_in()
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def splits_with(targets: torch.Tensor) -> Splits:
    source = ArraySource(torch.zeros(len(targets), 1, 2, 2, dtype=torch.uint8), targets)
    good = ArraySource(source.images, torch.zeros(len(targets), dtype=torch.int64))
    return Splits(good, source, good, ("a", "b"), (0.0,), (1.0,))


def test_targets_are_checked_before_training():
    splits = splits_with(torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match=r"val target 2 is 2: classes lie in \[0, 1\], or are -100"):
        ImageDataModule(splits, config(), seed=0)
    ImageDataModule(splits, config(), seed=0, ignore_index=2)


def test_channels_last_is_a_memory_order():
    settings = config(options={"num_samples": 40, "num_classes": 2, "channels": 3, "size": 4})
    splits = load(settings)

    def images(channels_last: bool) -> torch.Tensor:
        data = ImageDataModule(splits, settings, seed=0)
        if channels_last:
            data.memory_format = torch.channels_last
        data.trainer = stand_in(training=True)
        (batch, *_) = data.train_dataloader()
        return data.on_after_batch_transfer(batch, 0).images

    last, first = images(True), images(False)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert torch.equal(last, first)
