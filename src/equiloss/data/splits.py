"""A dataset's three splits with their metadata, and how a split is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equiloss.config import DataConfig
from equiloss.data.sources import ArraySource, Shape, Source, resize
from equiloss.errors import ConfigError, DataError
from equiloss.randomness import Stream, keyed_bits

SPLITS = ("train", "val", "test")
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Splits:
    """The training, validation and test split of one dataset.

    Raises:
        DataError: for splits that hold images of different shapes, or none.
    """

    train: Source
    val: Source
    test: Source
    class_names: tuple[str, ...]
    """Names of the classes, in the order of the targets."""
    mean: tuple[float, ...]
    """Mean per channel of pixel values in [0, 1]; the network sees (pixels - mean) / std."""
    std: tuple[float, ...]
    """Standard deviation per channel of pixel values in [0, 1]."""
    notes: tuple[str, ...] = ()
    """What a user should know of how they were read, a line each."""

    def __post_init__(self) -> None:
        for split in SPLITS:
            source: Source = getattr(self, split)
            if not len(source):
                raise DataError(f"the {split} split is empty: each split needs a sample")
            if source.image_shape != self.image_shape:
                raise DataError(
                    f"{split} images are {list(source.image_shape)} and train images "
                    f"{list(self.image_shape)}: set data.image_size= to resize them all"
                )
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.image_shape[0]:
                raise ConfigError(
                    f"data.{key} has {len(values)} values for {self.image_shape[0]} channels: "
                    "give one per channel"
                )

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> Shape:
        """(C, H, W) of every image."""
        return self.train.image_shape

    @property
    def class_counts(self) -> Tensor:
        """Training samples of each class [K] int64.

        A row of probabilities counts for its most probable class (the first of equals); a row
        whose target is no class, such as an ignored one, does not count.
        """
        targets = self.train.targets
        if targets.is_floating_point():
            targets = targets.argmax(dim=1)  # [N, K] -> [N]
        known = targets[(targets >= 0) & (targets < self.num_classes)]
        return torch.bincount(known, minlength=self.num_classes)

    def fingerprint(self) -> dict[str, str]:
        """What the data are: names of the classes, then `Source.fingerprint` of each split."""
        parts = {f"the name of class {n}": name for n, name in enumerate(self.class_names)}
        named = {f"class {n}": f"class {n} ({name})" for n, name in enumerate(self.class_names)}
        for split in SPLITS:
            source: Source = getattr(self, split)
            for part, value in source.fingerprint().items():
                parts[f"{named.get(part, part)} of the {split} split"] = value
        return parts


def in_memory(config: DataConfig, pairs: Mapping[str, Pair], class_names: Sequence[str]) -> Splits:
    """Make splits of tensors, limited and resized as `config` says, with the training statistics.

    Args:
        config: `long_tail`, `max_samples`, `image_size` and `split_seed` are used.
        pairs: For train, val and test each: images [N, C, H, W] uint8 and targets, [N] int64 or
            [N, K] floating point.
        class_names: Names of the classes, in the order of the targets.
    """
    sources: dict[str, Any] = {}
    for split in SPLITS:
        images, targets = pairs[split]
        tail = long_tailed(targets, class_names, config) if split == "train" else None
        for rows in (tail, limited(len(targets) if tail is None else len(tail), config)):
            if rows is not None:
                images, targets = images[rows], targets[rows]
        if config.image_size is not None:
            images = resize(images, config.image_size)
        sources[split] = ArraySource(images, targets)
    mean, std = channel_statistics(sources["train"].images)
    return Splits(**sources, class_names=tuple(class_names), mean=mean, std=std)


def limited(length: int, config: DataConfig) -> Tensor | None:
    """The rows that `data.max_samples` keeps of a split, at random; None for all of them."""
    if config.max_samples is None or config.max_samples >= length:
        return None
    # Files are often sorted by class or by difficulty, so the first ones would not do.
    return _shuffled(length, config.split_seed)[: config.max_samples]


def long_tailed(targets: Tensor, class_names: Sequence[str], config: DataConfig) -> Tensor | None:
    """The rows that `data.long_tail` keeps of the training split, in order; None for all of them.

    With a ratio r, class k of K keeps n_0 r^(-k / (K - 1)) rows, drawn by `split_seed`, where n_0
    is the most that lets every class have so many; Cui et al., "Class-balanced loss based on
    effective number of samples", CVPR 2019. Rows whose target is no class are kept.

    Raises:
        DataError: for targets that are probabilities, and if a class has no row or keeps none.
    """
    ratio = config.long_tail
    if ratio is None:
        return None
    if targets.is_floating_point():
        raise DataError("data.long_tail thins out classes: train targets are probabilities")
    classes = len(class_names)
    is_class = (targets >= 0) & (targets < classes)
    counts = torch.bincount(targets[is_class], minlength=classes)  # [K]
    shares = ratio ** -(torch.arange(classes, dtype=torch.float64) / max(classes - 1, 1))
    sizes = (shares * (counts / shares).min()).round()
    if sizes.min() < 1:
        short = int(torch.where(sizes < 1, counts, counts.max() + 1).argmin())
        raise DataError(
            f"data.long_tail={ratio:g} leaves class {class_names[short]!r} without one of its "
            f"{int(counts[short])} training samples: make it smaller"
        )
    # What is no class is one class more, of which everything is kept.
    labels = targets.masked_fill(~is_class, classes)
    sizes = torch.cat([sizes, sizes.new_tensor([math.inf])])
    order = _shuffled(len(labels), config.split_seed, Stream.LONG_TAIL)
    kept = _rank_within_class(labels[order]) < sizes[labels[order]]
    return order[kept].sort().values


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images [N, C, H, W] uint8, over 255.

    Both come from the exact histogram of the 256 values, in float64, divided by the number of
    pixels; a constant channel gets a standard deviation of 1.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        mean = (counts @ values / counts.sum()).item()
        variance = (counts @ (values - mean).square() / counts.sum()).item()
        means.append(mean)
        # Rounding may leave a constant channel a variance that is not quite 0.
        stds.append(variance**0.5 if (counts > 0).sum() > 1 else 1.0)
    return tuple(means), tuple(stds)


def holdout(
    targets: Tensor, fraction: float, *, seed: int, reserve: int = 1
) -> tuple[Tensor, Tensor]:
    """Split rows in two so that each class is divided in the same proportion.

    The number of rows held out is fraction·N, rounded, and goes to the classes by largest
    remainder. Each class with more than `reserve` rows has a row held out, and keeps `reserve`.

    Args:
        targets: Classes [N] int64.
        fraction: Part of the rows to hold out.
        seed: Chooses the rows; torch's own generators play no part.
        reserve: Rows of each class that must be kept.

    Returns:
        Positions of the kept and of the held-out rows, int64, each in random order.

    >>> kept, held = holdout(torch.tensor([0] * 8 + [1] * 4), 0.25, seed=0)
    >>> len(kept), len(held)
    (9, 3)
    """
    counts = torch.bincount(targets)  # [K]
    largest = (counts - reserve).clamp(min=0)
    taken = _apportion(counts.double() * fraction, largest.clamp(max=1), largest)
    order = _shuffled(len(targets), seed)
    labels = targets[order]
    held = _rank_within_class(labels) < taken[labels]
    return order[~held], order[held]


def three_way(targets: Tensor, config: DataConfig) -> dict[str, Tensor]:
    """Positions of train, val and test for a dataset that has no splits of its own."""
    # Two rows of each class are kept at first: one for val and one for train.
    rest, test = holdout(targets, config.test_fraction, seed=config.split_seed, reserve=2)
    train, val = holdout(targets[rest], config.val_fraction, seed=config.split_seed)
    return {"train": rest[train], "val": rest[val], "test": test}


def _apportion(quotas: Tensor, smallest: Tensor, largest: Tensor) -> Tensor:
    """Whole numbers nearest to the quotas [K], within bounds, whose sum is the quotas', rounded."""
    numbers = quotas.floor().long().clamp(smallest, largest)
    missing = int(quotas.sum().round()) - int(numbers.sum())
    step = 1 if missing > 0 else -1
    for _ in range(abs(missing)):
        movable = numbers < largest if step > 0 else numbers > smallest
        if not movable.any():
            break  # the bounds do not allow the sum
        remainder = (quotas - numbers) * step
        numbers[remainder.masked_fill(~movable, -torch.inf).argmax()] += step
    return numbers


def _rank_within_class(labels: Tensor) -> Tensor:
    """Position of each row among the rows of its class, from 0 [N].

    >>> _rank_within_class(torch.tensor([7, 2, 7, 7, 2])).tolist()
    [0, 0, 1, 2, 1]
    """
    by_class = labels.argsort(stable=True)
    counts = torch.bincount(labels)  # [K]
    first = counts.cumsum(0) - counts  # [K]: where each class begins
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return rank


def _shuffled(length: int, seed: int, stream: Stream = Stream.SPLIT) -> Tensor:
    bits = keyed_bits(seed, 0, torch.arange(length), 1, stream=stream)  # [length, 1]
    return bits.squeeze(1).argsort(stable=True)
