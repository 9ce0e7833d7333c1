"""The data module under a real Trainer: what a batch is, and that a resumed run continues."""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional

from equiloss.config import AugmentConfig, DataConfig
from equiloss.data import position
from equiloss.data.augment import augment
from equiloss.data.datamodule import ImageDataModule
from equiloss.data.datasets import ArraySource, Batch, load
from equiloss.data.sampler import Slice
from equiloss.errors import UserError

# Lightning's own use of torch.utils._pytree.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")

BATCHES_PER_EPOCH = 4  # of 8, 8, 8 and 5 samples
Step = tuple[int, int, int, tuple[int, ...], int, bool]


def config(**changes) -> DataConfig:
    settings = {"batch_size": 8, "options": {"num_samples": 40, "num_classes": 2}} | changes
    return DataConfig(name="synthetic", **settings)


class Recorder(lightning.LightningModule):
    """A network under manual optimization that notes every batch it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.head = nn.Linear(64, 2)
        self.steps: list[Step] = []
        self.validated_at: list[int] = []
        self.batches: list[tuple[str, Batch]] = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        ids = tuple(batch.index.tolist())
        is_last = self.trainer.is_last_batch
        epochs = batch.epoch, self.current_epoch
        self.steps.append((*epochs, batch_idx, ids, self.global_step, is_last))
        self.batches.append(("train", batch))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        functional.cross_entropy(self.head(batch.images.flatten(1)), batch.target).backward()
        optimizer.step()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated_at.append(self.global_step)
        self.batches.append(("val", batch))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.batches.append(("test", batch))


class SaveEverywhere(lightning.Callback):
    """A checkpoint from every hook in which one is commonly written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def save(self, trainer: lightning.Trainer, hook: str) -> None:
        steps = trainer.global_step
        trainer.save_checkpoint(self.directory / f"{steps:02}-{hook}.ckpt")

    def on_train_epoch_start(self, trainer, pl_module):
        self.save(trainer, "epoch_start")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.save(trainer, "batch_start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, "batch_end")

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "epoch_end")


def trainer(**changes) -> lightning.Trainer:
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    return lightning.Trainer(**settings | changes)


def fit(
    directory: Path, resume_from: Path | None = None, *, num_workers: int = 0, **changes
) -> Recorder:
    directory.mkdir(exist_ok=True)
    data_config = config(num_workers=num_workers)
    data = ImageDataModule(load(data_config), data_config, seed=1)
    torch.manual_seed(0)
    model = Recorder()
    trainer(callbacks=[SaveEverywhere(directory)], **changes).fit(
        model, data, ckpt_path=resume_from, weights_only=True if resume_from else None
    )
    return model


def checkpoints(directory: Path, pattern: str = "*") -> list[tuple[int, Path]]:
    return [(int(file.name[:2]), file) for file in sorted(directory.glob(f"{pattern}.ckpt"))]


def same_end(resumed: Recorder, whole: Recorder, done: int) -> bool:
    return resumed.steps == whole.steps[done:] and torch.equal(
        resumed.head.weight, whole.head.weight
    )


LENGTHS = {
    "epochs": {"max_epochs": 2},
    "epochs, no validation": {"max_epochs": 2, "limit_val_batches": 0},
    "steps": {"max_epochs": -1, "max_steps": 7},
    "steps, no validation": {"max_epochs": -1, "max_steps": 7, "limit_val_batches": 0},
    "both": {"max_epochs": 2, "max_steps": 100},
    "validation within the epoch": {"max_epochs": 2, "val_check_interval": 2},
}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_resuming_from_any_checkpoint_continues_exactly(tmp_path, length):
    whole = fit(tmp_path / "whole", **length)
    assert len(whole.steps) == (7 if length.get("max_steps") == 7 else 2 * BATCHES_PER_EPOCH)
    files = checkpoints(tmp_path / "whole")
    assert {done for done, _ in files} == set(range(len(whole.steps) + 1))
    assert all(step[0] == step[1] for step in whole.steps)  # Lightning's epoch is the sampler's
    for done, file in files:
        resumed = fit(tmp_path / "again", file, **length)
        assert same_end(resumed, whole, done), file.name
        assert resumed.validated_at == [step for step in whole.validated_at if step > done]


def resumed_twice(directory: Path, length: dict) -> list[bool]:
    """Whether a run that stopped on an epoch's last batch, and later again, ends like a whole."""
    whole = fit(directory / "whole", **length)
    outcomes = []
    for _, first in checkpoints(directory / "whole", f"{BATCHES_PER_EPOCH:02}-*"):
        fit(directory / first.stem, first, **length)
        outcomes += [
            same_end(fit(directory / "last", second, **length), whole, done)
            for done, second in checkpoints(directory / first.stem, "*-batch_end")
        ]
    return outcomes


@pytest.mark.parametrize("name", ["epochs", "steps, no validation"])
def test_a_resumed_run_can_be_resumed(tmp_path, name):
    outcomes = resumed_twice(tmp_path, LENGTHS[name])
    assert len(outcomes) > 2 * BATCHES_PER_EPOCH
    assert all(outcomes)


@pytest.mark.parametrize("name", ["epochs", "steps, no validation"])
def test_lightnings_own_counters_would_not_do(tmp_path, monkeypatch, name):
    """The control: the same runs without putting the counters right."""
    monkeypatch.setattr(position, "restore", lambda *_: None)
    assert not all(resumed_twice(tmp_path, LENGTHS[name]))


def test_a_loader_that_starts_over_would_not_do(tmp_path, monkeypatch):
    """The control: the same resume without the data module's state."""
    whole = fit(tmp_path / "whole")
    monkeypatch.setattr(ImageDataModule, "load_state_dict", lambda *_: None)
    resumed = fit(tmp_path / "again", tmp_path / "whole" / "02-batch_end.ckpt")
    assert not same_end(resumed, whole, 2)


@pytest.mark.parametrize("name", ["epochs", "steps, no validation"])
def test_resuming_continues_exactly_with_worker_processes(tmp_path, name):
    whole = fit(tmp_path / "whole", **LENGTHS[name])
    for done in (1, BATCHES_PER_EPOCH - 1, BATCHES_PER_EPOCH, BATCHES_PER_EPOCH + 1):
        file = tmp_path / "whole" / f"{done:02}-batch_end.ckpt"
        resumed = fit(tmp_path / "again", file, num_workers=2, **LENGTHS[name])
        assert same_end(resumed, whole, done), done


@pytest.mark.parametrize(
    ("changes", "seed", "culprit"),
    [
        ({"batch_size": 7}, 1, "batch_size is 7 now and was 8"),
        ({"max_samples": 20}, 1, "train_samples is 20 now and was 29"),
        ({}, 2, "seed is 2 now and was 1"),
    ],
)
def test_another_order_of_samples_is_not_resumed(tmp_path, changes, seed, culprit):
    fit(tmp_path)
    other = config(**changes)
    data = ImageDataModule(load(other), other, seed=seed)
    with pytest.raises(UserError, match=culprit):
        trainer(max_epochs=2).fit(Recorder(), data, ckpt_path=tmp_path / "03-batch_end.ckpt")


def test_a_checkpoint_may_be_written_outside_of_training(tmp_path):
    data = ImageDataModule(load(config()), config(), seed=1)
    trainer(callbacks=[SaveEverywhere(tmp_path)]).validate(Recorder(), data, verbose=False)
    state = torch.load(tmp_path / "00-validation_end.ckpt", weights_only=True)["ImageDataModule"]
    assert (state["epoch"], state["batch"]) == (0, 0)


def test_a_checkpoint_is_tested_with_any_batch_size(tmp_path):
    fit(tmp_path)
    other = config(batch_size=7, eval_batch_size=3)
    model, data = Recorder(), ImageDataModule(load(other), other, seed=5)
    trainer().test(model, data, ckpt_path=tmp_path / "03-batch_end.ckpt", verbose=False)
    index = torch.cat([batch.index for _, batch in model.batches])
    assert index.tolist() == list(range(8))


# --- what a batch is ---


def fitted(data: ImageDataModule, **changes) -> Recorder:
    model = Recorder()
    trainer(**changes).fit(model, data)
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_batch_is_moved_to_where_it_is_not_yet(device):
    splits = load(config())
    data = ImageDataModule(splits, config(), seed=0)
    batch = splits.val.__getitems__(Slice(epoch=0, indices=torch.arange(3)))
    moved = data.transfer_batch_to_device(batch, torch.device(device), 0)
    assert {each.device.type for each in moved[:3]} == {device}
    assert (moved is batch) == (device == "cpu")
    assert moved[3:] == batch[3:]


def test_batches_are_normalised_and_only_training_is_augmented():
    settings = config(augment=AugmentConfig(shift=2, flip=True))
    splits = load(settings)
    model = fitted(ImageDataModule(splits, settings, seed=3), precision="64-true", max_epochs=2)
    assert {batch.epoch for name, batch in model.batches if name == "train"} == {0, 1}
    mean, std = splits.mean[0], splits.std[0]
    for name, batch in model.batches:
        source: ArraySource = getattr(splits, name)
        stored = source.images[batch.index]
        if name == "train":
            stored = augment(stored, batch.index, batch.epoch, 3, settings.augment)
        expected = (stored.double() / 255 - mean) / std
        # Values reach about 3, and take three roundings in either form.
        assert (batch.images - expected).abs().max() < 20 * torch.finfo(torch.float64).eps
        assert torch.equal(batch.target, source.targets[batch.index])


def test_training_images_have_mean_0_and_deviation_1():
    settings = config(batch_size=100)
    splits = load(settings)
    model = fitted(ImageDataModule(splits, settings, seed=0), precision="64-true")
    images = next(batch.images for name, batch in model.batches if name == "train")
    assert images.mean().item() == pytest.approx(0, abs=1e-12)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("64-true", torch.float64),
        ("bf16-true", torch.bfloat16),
        ("bf16-mixed", torch.float32),
    ],
)
def test_images_take_the_networks_type_and_positions_stay_whole(precision, dtype):
    settings = config()
    model = fitted(ImageDataModule(load(settings), settings, seed=0), precision=precision)
    assert {batch.images.dtype for _, batch in model.batches} == {dtype}
    assert {batch.index.dtype for _, batch in model.batches} == {torch.int64}
