"""Networks, data and losses that tests name by import path, in this process and in ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiloss.models.networks import ConvNet


class Scaled(nn.Module):
    """A linear network on the first pixel block whose logits spread over `gap`."""

    def __init__(self, num_classes: int, gap: float) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.linspace(0, gap, num_classes))
        self.head = nn.Linear(1, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.offset + 0.01 * self.head(images.mean(dim=(1, 2, 3)).unsqueeze(-1))


def scaled(num_classes: int, in_channels: int, gap: float) -> nn.Module:
    return Scaled(num_classes, gap)


class Growing(Scaled):
    """A linear network whose logits reach a spread of `gap` at the forward pass number `at`."""

    def __init__(self, num_classes: int, gap: float, at: int) -> None:
        super().__init__(num_classes, 1.0)
        self.gap, self.at, self.passes = gap, at, 0

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        # Not those that look at the network, or forward a row again.
        if self.training and torch.is_grad_enabled():
            self.passes += 1
        return logits * self.gap if self.training and self.passes > self.at else logits


def growing(num_classes: int, in_channels: int, gap: float, at: int) -> nn.Module:
    return Growing(num_classes, gap, at)


def too_many_logits(num_classes: int, in_channels: int) -> nn.Module:
    return ConvNet(num_classes + 1, in_channels, widths=(8,))


def batch_norm(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(in_channels), nn.Flatten(), nn.LazyLinear(num_classes))


def note_the_time(unless: str) -> None:
    """Leave a file that says when a rank tripped."""
    if unless:
        Path(f"{unless}.tripped").touch()


def raises_before_joining(
    num_classes: int, in_channels: int, rank: int = 1, unless: str = ""
) -> nn.Module:
    """Fails on one rank, unless a file is there."""
    if os.environ.get("LOCAL_RANK") == str(rank) and not Path(unless or "none").exists():
        note_the_time(unless)
        raise RuntimeError("this rank never joins")
    return ConvNet(num_classes, in_channels, widths=(8,))


class Trips(ConvNet):
    """Ends one rank at its fifth forward pass, unless a file is there."""

    def __init__(
        self, num_classes: int, in_channels: int, rank: int, unless: str, *, kill: bool
    ) -> None:
        super().__init__(num_classes, in_channels, widths=(8,))
        self.rank, self.unless, self.kill, self.passes = str(rank), unless, kill, 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += torch.is_grad_enabled()
        mine = os.environ.get("LOCAL_RANK") == self.rank
        if self.passes == 5 and mine and not Path(self.unless or "none").exists():
            note_the_time(self.unless)
            if not self.kill:
                raise RuntimeError("this rank tripped")
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
        return super().forward(images)


def killed(num_classes: int, in_channels: int, rank: int, unless: str = "") -> nn.Module:
    return Trips(num_classes, in_channels, rank, unless, kill=True)


def raises_in_training(num_classes: int, in_channels: int, rank: int, unless: str) -> nn.Module:
    return Trips(num_classes, in_channels, rank, unless, kill=False)


class Slow(ConvNet):
    """Takes its time, so that a test can interrupt it."""

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.2)
        return super().forward(images)


def slow(num_classes: int, in_channels: int) -> nn.Module:
    return Slow(num_classes, in_channels, widths=(8,))


class Sleeps(ConvNet):
    """Sleeps in its fourth step, as if one step took a minute."""

    passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += self.training and torch.is_grad_enabled()
        end = time.monotonic() + 60 * (self.passes == 4)
        while time.monotonic() < end:
            time.sleep(0.1)
        return super().forward(images)


def sleeps(num_classes: int, in_channels: int) -> nn.Module:
    return Sleeps(num_classes, in_channels, widths=(8,))


def _images(rows: int) -> Tensor:
    return torch.randint(0, 256, (rows, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )


def few_samples(train: int = 3, val: int = 2, test: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (_images(rows), torch.arange(rows) % 3)
        for name, rows in (("train", train), ("val", val), ("test", test))
    }


def soft_targets(total: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    target = torch.full((30, 3), total / 3)
    return {name: (_images(30), target) for name in ("train", "val", "test")}


def ignored_rows(share: float = 0.25) -> dict[str, tuple[Tensor, Tensor]]:
    """Every 1/share-th row of the training split is ignored."""
    target = torch.arange(60) % 3
    ignored = target.clone()
    ignored[:: int(1 / share)] = -100
    return {name: (_images(60), target) for name in ("val", "test")} | {
        "train": (_images(60), ignored)
    }


def bad_label() -> dict[str, tuple[Tensor, Tensor]]:
    target = torch.arange(30) % 3
    splits = {name: (_images(30), target.clone()) for name in ("train", "val", "test")}
    splits["train"][1][7] = -1
    return splits


def wrong_smoothing(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy whose ε is wrong by 1 %."""
    return F.cross_entropy(
        logits,
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing * 1.01,
        reduction="none",
    )


def missing_weight(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy that forgets one class's weight."""
    if weight is not None:
        weight = weight.clone()
        weight[1] = 1.0
    return F.cross_entropy(
        logits,
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )


def extra_ignored_row(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy that ignores its first row too."""
    losses = F.cross_entropy(
        logits,
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    keep = torch.ones_like(losses)
    keep[:1] = 0
    return losses * keep


# For as long as the process lives.
control = ExitStack()


def with_local_means(num_classes: int, in_channels: int) -> nn.Module:
    """A network whose arrival turns the reduction into the usual mean of local means.

    The control of the invariance tests: every rank divides by the mass of its own slice, and
    data-parallel training averages the ranks.
    """
    from equiloss.invariance.controls import local_means

    control.enter_context(local_means())
    return ConvNet(num_classes, in_channels, widths=(8, 16))


class Noisy(ConvNet):
    """Draws from every generator of its process in each training step."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if not self.training:
            return logits
        noise = random.random() + np.random.rand() + torch.randn(logits.shape)
        return logits + noise.to(logits.dtype)


def noisy(num_classes: int, in_channels: int) -> nn.Module:
    return Noisy(num_classes, in_channels, widths=(8,))


class Leaves(ConvNet):
    """Ends the process in its third forward pass, as if all were well."""

    passes = 0

    def __init__(self, num_classes: int, in_channels: int, way: str) -> None:
        super().__init__(num_classes, in_channels, widths=(8,))
        self.way = way

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        if self.passes == 3:
            {"sys.exit": sys.exit, "os._exit": os._exit}[self.way](0)
        return super().forward(images)


def leaves(num_classes: int, in_channels: int, way: str) -> nn.Module:
    return Leaves(num_classes, in_channels, way)


class Routed(nn.Module):
    """Sends each image of 64 pixels to one of two heads by its brightness; a layer is unused.

    On a rank, and in a micro-batch, there may be no image for a head.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.dark, self.bright = nn.Linear(64, num_classes), nn.Linear(64, num_classes)
        self.unused = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        features = images.flatten(1)
        bright = features.mean(1) > 0.2
        heads = [self.dark(features[~bright])] if (~bright).any() else []
        heads += [self.bright(features[bright])] if bright.any() else []
        if not heads:
            return self.dark(features)  # no image at all
        order = torch.cat([(~bright).nonzero(), bright.nonzero()]).squeeze(1)
        return torch.cat(heads)[order.argsort()]


def routed(num_classes: int, in_channels: int) -> nn.Module:
    return Routed(num_classes)


class Learning(nn.Module):
    """Batch norm, and a mean of its rank's features that evaluation subtracts."""

    mean: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(64, 16), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, num_classes)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, images: Tensor) -> Tensor:
        features = self.linear(images.flatten(1))
        if self.training and len(features):
            self.mean.lerp_(features.detach().mean(0), 0.1)
        return self.head(self.norm(features) - self.mean * (not self.training))


def learning(num_classes: int, in_channels: int) -> nn.Module:
    return Learning(num_classes)


class Stage(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.norm(self.conv(maps)).relu()


class Normalised(nn.Module):
    """A small residual network with batch norm, of which one layer has no parameters."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.stages = nn.Sequential(Stage(8), Stage(8))
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.plain(self.stages(self.norm(self.stem(images)).relu()))
        return self.head(maps.mean((2, 3)))


def normalised(num_classes: int, in_channels: int) -> nn.Module:
    return Normalised(num_classes, in_channels)


def headless(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, num_classes + 1, 8), nn.Flatten())


def off_by_a_percent(logits: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    return 1.01 * F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")


def notes_its_surroundings(_: object, run_dir: Path) -> None:
    """Takes the place of a run on a rank, and leaves what the rank was given."""
    names = ("LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    noted = {name: os.environ[name] for name in names} | {"threads": torch.get_num_threads()}
    (run_dir / f"noted{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(noted))


def measured(seconds: float) -> Callable[[], float]:
    return lambda: float(seconds)


def hinge_of_cancelling_terms(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A squared hinge that takes away what the row's own class has added: [N, C], [N] -> [N]."""
    own = logits.gather(-1, target.unsqueeze(-1))
    return ((1 - own + logits).relu() ** 2).sum(-1) - 1
