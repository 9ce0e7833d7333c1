"""Loops to compare with: bare PyTorch, Lightning with nothing in it, and the popular template."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

BATCH = 128


class Stopwatch(Callback):
    """Times the training steps of a fit, without those that come first.

    Args:
        first: Steps that do not count.
        steps: Steps that count; the last of them ends the clock.
    """

    last: Stopwatch
    """The one that was made last: a run makes its own."""

    def __init__(self, first: int, steps: int) -> None:
        self.first, self.steps = first, steps
        self.began = self.seconds = 0.0
        self.seen = 0
        Stopwatch.last = self

    def on_train_batch_start(self, *_: Any) -> None:
        """Start before the first step that counts."""
        if self.seen == self.first:
            self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop after the last step that counts."""
        self.seen += 1
        if self.seen == self.first + self.steps:
            self.seconds = time.perf_counter() - self.began


def shifted_and_flipped(images: Tensor) -> Tensor:
    """Move each image by up to a pixel and mirror every other one: [N, C, H, W] in memory."""
    count, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, C, 3, 3, H, W]
    down, right = torch.randint(3, (2, count))
    images = windows[torch.arange(count), :, down, right]
    mirrored = torch.rand(count) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def batches(images: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of a set in memory, epoch after epoch."""
    while True:
        order = torch.randperm(len(targets))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[first : first + BATCH]
            yield images[rows], targets[rows]


def bare_loop(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Tensor,
    *,
    augment: bool,
    channels_last: bool = False,
) -> Iterator[None]:
    """Take one step of training after the other, and do nothing else."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network.train().to(memory_format=layout)
    for pixels, target in batches(images, targets):
        x = pixels.float().sub_(0.2860 * 255).div_(0.3530 * 255)
        if augment:
            x = shifted_and_flipped(x)
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x.contiguous(memory_format=layout)), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield


class EmptyModule(LightningModule):
    """What Lightning itself costs: manual optimization that does nothing but train."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.optimizer = network, optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The one it was given."""
        return self.optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Forward, backward, step."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.network(batch[0]), batch[1]))
        optimizer.step()


class InMemory:
    """Batches as `bare_loop` makes them, as something that a Trainer takes for a loader."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images, targets

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, target in batches(self.images, self.targets):
            yield pixels.float().sub_(0.2860 * 255).div_(0.3530 * 255), target


class OneByOne(Dataset[tuple[Tensor, int]]):
    """Samples that are read and transformed one at a time, as torchvision's sets are."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images, targets
        to_float = v2.ToDtype(torch.float32, scale=True)
        self.transform = v2.Compose(
            [v2.ToPILImage(), v2.ToImage(), to_float, v2.Normalize((0.2860,), (0.3530,))]
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.targets[index])


class CommonStyle(LightningModule):
    """As modules of popular templates are: automatic optimization, metrics and logs each step."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.network, self.optimizer = network, optimizer
        self.train_loss, self.best = MeanMetric(), MaxMetric()
        self.train_accuracy = MulticlassAccuracy(10)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The one it was given."""
        return self.optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Loss and accuracy, both logged by step and by epoch."""
        logits = self.network(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.train_loss(loss)
        self.train_accuracy(logits.argmax(1), batch[1])
        for name, metric in (("loss", self.train_loss), ("acc", self.train_accuracy)):
            self.log(f"train/{name}", metric, on_step=True, on_epoch=True, prog_bar=True)
        return loss


def common_loader(images: Tensor, targets: Tensor) -> DataLoader[Any]:
    """The loader of such a template: no workers, which is its default."""
    return DataLoader(OneByOne(images, targets), batch_size=BATCH, shuffle=True)


def trainer(stopwatch: Stopwatch, steps: int, **options: Any) -> Trainer:
    """A Trainer for so many steps that writes nothing but what the options ask for."""
    defaults = {"logger": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=[stopwatch],
        enable_checkpointing=False,
        enable_model_summary=False,
        **(defaults | options),
    )
