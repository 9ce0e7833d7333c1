"""MixUp and CutMix of a global batch: the same for each world size, worker and micro-batch.

Row i of the *global* batch is mixed with row i - 1 (the first with the last), so a rank's slice
needs one row more than it owns, which its loader reads along. How much of each row is kept, and
which box is cut, belongs to (seed, epoch, batch). torchvision's transforms pair the rows of the
batch that they are given, a rank's slice here, and would so depend on the number of ranks.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from equiloss.config import AugmentConfig
from equiloss.errors import DataError
from equiloss.randomness import Stream, keyed_bits


@dataclass(frozen=True)
class Mix:
    """Parameters of MixUp or CutMix for one global batch."""

    share: float
    """Part of each row that stays its own, λ in [0, 1]."""
    box: tuple[int, int, int, int] | None = None
    """CutMix: top, bottom, left and right of the pixels that come from the row before."""


def draw(
    config: AugmentConfig, seed: int, epoch: int, batch: int, *, height: int, width: int
) -> Mix | None:
    """Draw the parameters of one global batch, a function of the arguments alone.

    MixUp draws λ ~ Beta(α, α) (Zhang et al., "mixup: Beyond empirical risk minimization", ICLR
    2018). CutMix cuts a box of a share 1 - λ of the image, its middle anywhere, and takes as λ
    what the box leaves (Yun et al., "CutMix", ICCV 2019). With both, each batch gets one of them.

    Args:
        config: The two concentrations α, `mixup` and `cutmix`.
        seed: The run's seed.
        epoch: Pass over the training split, from 0.
        batch: Number of the global batch in its epoch, from 0.
        height: Of the images, in pixels.
        width: Likewise.

    Returns:
        None if both are off.
    """
    if not config.mixes:
        return None
    (key,) = keyed_bits(seed, epoch, torch.tensor([batch]), 1, stream=Stream.MIX).flatten().tolist()
    numbers = random.Random(key)
    cut = numbers.random() < 0.5 if config.mixup and config.cutmix else config.cutmix > 0
    alpha = config.cutmix if cut else config.mixup
    share = numbers.betavariate(alpha, alpha)
    if not cut:
        return Mix(share)
    side = math.sqrt(1 - share)
    top, bottom = _span(numbers.random(), side, height)
    left, right = _span(numbers.random(), side, width)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def _span(middle: float, side: float, length: int) -> tuple[int, int]:
    """Bounds on one axis of a box that spans a share `side` of it, clipped to the image."""
    centre, half = int(middle * length), int(side * length) // 2
    return max(centre - half, 0), min(centre + half, length)


def mix_images(images: Tensor, mix: Mix, *, lead: int) -> Tensor:
    """Mix each image with the one before it.

    Args:
        images: [lead + n, C, H, W], floating point.
        mix: Parameters.
        lead: 1: the first image is there for the second one alone; 0: there is no image.

    Returns:
        [n, C, H, W].

    >>> images = torch.tensor([0.0, 10.0, 20.0]).view(3, 1, 1, 1)
    >>> mix_images(images, Mix(0.75), lead=1).flatten().tolist()
    [7.5, 17.5]
    """
    own, before = images[lead:], images[: len(images) - lead]
    if mix.box is None:
        return own * mix.share + before * (1 - mix.share)
    top, bottom, left, right = mix.box
    mixed = own.clone()
    mixed[..., top:bottom, left:right] = before[..., top:bottom, left:right]
    return mixed


def mix_targets(
    target: Tensor, mix: Mix, *, lead: int, num_classes: int, dtype: torch.dtype
) -> Tensor:
    """Class probabilities of the images that `mix_images` returns.

    Args:
        target: Classes [lead + n] int64, or probabilities [lead + n, K].
        mix: Parameters of the images.
        lead: As for `mix_images`.
        num_classes: K.
        dtype: Type of the probabilities.

    Returns:
        [n, K].

    >>> two_of_three = torch.tensor([2, 0])
    >>> mix_targets(two_of_three, Mix(0.75), lead=1, num_classes=3, dtype=torch.float32).tolist()
    [[0.75, 0.0, 0.25]]
    """
    if not target.is_floating_point():
        target = F.one_hot(target, num_classes)
    target = target.to(dtype)  # [lead + n, K]
    return target[lead:] * mix.share + target[: len(target) - lead] * (1 - mix.share)


def check_mixable(targets: Tensor, ignore_index: int | None) -> None:
    """Refuse to mix rows that have no class: among probabilities no row can be ignored.

    Args:
        targets: Those of the training split.
        ignore_index: The class that marks rows without a target.

    Raises:
        DataError: naming the first such row.
    """
    if targets.is_floating_point() or ignore_index is None:
        return
    ignored = (targets == ignore_index).nonzero().flatten().tolist()
    if ignored:
        raise DataError(
            f"train target {ignored[0]} is {ignore_index} (ignored), and data.augment.mixup or "
            "cutmix would mix it into another row: every training row needs a class"
        )
