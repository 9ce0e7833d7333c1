"""The data module: loaders, preparation of batches on the device, and the state to resume from."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from equiloss.config import DataConfig
from equiloss.data import mixing, position
from equiloss.data.augment import TransformedSource, augment, build_transform
from equiloss.data.loader import SplitLoader
from equiloss.data.normalisation import normalise, pixel_statistics, wide
from equiloss.data.sampler import GlobalBatchSampler, Slice
from equiloss.data.sources import Batch, FileSource, Source
from equiloss.data.splits import SPLITS, Splits
from equiloss.errors import UserError
from equiloss.losses.validation import validate_targets


class ImageDataModule(lightning.LightningDataModule):
    """Loaders of the splits: the same global batches for each number of ranks and workers.

    The Trainer needs `use_distributed_sampler=False`, since the batches are divided here. A
    checkpoint at any batch resumes with the next one; as a resumed run continues an epoch, it
    does not call `on_train_epoch_start` for it again.

    Args:
        splits: What `equiloss.data.datasets.load` returned.
        config: The same configuration.
        seed: The run's seed, for order and augmentation.
        ignore_index: The class that marks rows without a target (None: there are none).
        shards: Virtual shards by which training batches are divided (None: by rows).

    Raises:
        DataError: for a target out of range, naming split and sample.
        ConfigError: for a pipeline in `data.augment.transforms` that cannot be made.
        UserError: (on resume) if the checkpoint is of another order of samples.
    """

    def __init__(
        self,
        splits: Splits,
        config: DataConfig,
        *,
        seed: int,
        ignore_index: int | None = -100,
        shards: int | None = None,
    ) -> None:
        super().__init__()
        self.has_ignored_rows = False
        """Whether a target of any split is `ignore_index`."""
        for split in SPLITS:
            targets = getattr(splits, split).targets
            validate_targets(targets, splits.num_classes, ignore_index, where=f"{split} target")
            if ignore_index is not None and not targets.is_floating_point():
                self.has_ignored_rows |= bool((targets == ignore_index).any())
        if config.augment.mixes:
            mixing.check_mixable(splits.train.targets, ignore_index)
        self.splits = splits
        self.config = config
        self.seed = seed
        self.shards = shards
        self.memory_format = torch.contiguous_format
        """The order of the images in memory."""
        self._train_source = splits.train
        if config.augment.transforms:
            transform = build_transform(config.augment.transforms)
            self._train_source = TransformedSource(splits.train, transform, seed)
        self._statistics: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._resume_at: tuple[int, int] | None = None

    def example_images(self, rows: int) -> Tensor:
        """Some normalised training images [rows, C, H, W] float32, without augmentation."""
        indices = torch.arange(rows) % len(self._train_source)
        images = self._train_source.read(Slice(epoch=0, indices=indices))
        return normalise(images, *self._pixel_statistics(images.device, torch.float32))

    def train_dataloader(self) -> SplitLoader:
        """Batches of the training split in the epoch's order, from where the run stopped."""
        loader = self._loader("train", self._train_source)
        if self._resume_at is not None:
            # Lightning makes the first iterator, and workers ask it for batches, before it calls
            # set_epoch.
            sampler: Any = loader.batch_sampler
            sampler.epoch, sampler.start_batch = self._resume_at
            position.restore(self._trainer.fit_loop, *self._resume_at)
            self._resume_at = None
        return loader

    def val_dataloader(self) -> SplitLoader:
        """Batches of the validation split, unpadded and in its own order."""
        return self._loader("val", self.splits.val)

    def test_dataloader(self) -> SplitLoader:
        """Batches of the test split, unpadded and in its own order."""
        return self._loader("test", self.splits.test)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """The batch on the device; one that is there is not walked through field by field."""
        if batch.images.device == device:
            return batch
        moved: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment and mix (in training), convert and normalise, on the device."""
        images = batch.images
        if self._trainer.training:
            images = augment(images, batch.index, batch.epoch, self.seed, self.config.augment)
        dtype = self._trainer.lightning_module.dtype
        assert isinstance(dtype, torch.dtype)
        images = normalise(images, *self._pixel_statistics(images.device, wide(dtype)))
        if self._trainer.training:
            batch, images = self._mixed(batch, images)
        return batch._replace(images=images.to(dtype, memory_format=self.memory_format))

    def _mixed(self, batch: Batch, images: Tensor) -> tuple[Batch, Tensor]:
        """The batch and its images after MixUp or CutMix, without the leading row."""
        _, _, height, width = images.shape
        mix = mixing.draw(
            self.config.augment, self.seed, batch.epoch, batch.number, height=height, width=width
        )
        if mix is None:
            return batch, images
        lead, classes = batch.lead, self.splits.num_classes
        target = mixing.mix_targets(
            batch.target, mix, lead=lead, num_classes=classes, dtype=images.dtype
        )
        mixed = batch._replace(target=target, index=batch.index[lead:], lead=0)
        return mixed, mixing.mix_images(images, mix, lead=lead)

    def state_dict(self) -> dict[str, int]:
        """Epoch, batches of it that are done, and the settings that the order depends on."""
        epoch, batch = position.reached(self._trainer.fit_loop)
        return {"epoch": epoch, "batch": batch} | self._order_settings()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume after the checkpoint's last batch; refuse one of another order of samples."""
        if self._trainer.state.fn != TrainerFn.FITTING:
            return  # an evaluation does not depend on the order of training
        for key, value in self._order_settings().items():
            if state_dict[key] != value:
                raise UserError(
                    f"cannot continue: {key} is {value} now and was {state_dict[key]} when the "
                    "checkpoint was written, which changes the order of samples; start anew with "
                    "another hydra.run.dir=…"
                )
        self._resume_at = state_dict["epoch"], state_dict["batch"]

    def _order_settings(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "batch_size": self.config.batch_size,
            "train_samples": len(self.splits.train),
        }

    @property
    def _trainer(self) -> lightning.Trainer:
        assert self.trainer is not None
        return self.trainer

    def _loader(self, split: str, source: Source) -> SplitLoader:
        training = split == "train"
        sampler = GlobalBatchSampler(
            len(source),
            self.config.batch_size if training else self.config.eval_batch_size,
            seed=self.seed,
            shuffle=training,
            rank=self._trainer.global_rank,
            world_size=self._trainer.world_size,
            lead=training and self.config.augment.mixes,
            shards=self.shards if training else None,
        )
        source.hold()
        # Indexing memory is faster than asking another process for it.
        kept = isinstance(source, FileSource) and source.keeps
        return SplitLoader(
            split,
            source,
            sampler,
            workers=0 if kept else self.config.num_workers,
            timeout_s=self.config.worker_timeout_s,
            pin_memory=self._trainer.strategy.root_device.type == "cuda",
            # Each iterator draws a seed for its workers. Taken from the global generator, it
            # would make dropout depend on how often an iterator was made.
            generator=torch.Generator(),
        )

    def _pixel_statistics(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of pixel values in [0, 255], [C, 1, 1] each."""
        if (device, dtype) not in self._statistics:
            statistics = pixel_statistics(self.splits.mean, self.splits.std, device, dtype)
            self._statistics[device, dtype] = statistics
        return self._statistics[device, dtype]
