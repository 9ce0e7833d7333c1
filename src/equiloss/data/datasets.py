"""Datasets by name: from the configuration to three splits."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor

from equiloss.config import DataConfig
from equiloss.config.checks import finite
from equiloss.data.folder import image_folder
from equiloss.data.sources import ArraySource, Batch, FileSource, Source, check_images
from equiloss.data.splits import SPLITS, Pair, Splits, in_memory, three_way
from equiloss.data.table import table
from equiloss.data.torchvision_sets import cifar10, cifar100, fashion_mnist, mnist
from equiloss.errors import ConfigError, DataError, choose, unknown
from equiloss.imports import import_target
from equiloss.randomness import Stream, keyed_bits
from equiloss.records.reading import fits

NONE = torch.empty(0, dtype=torch.int64)

__all__ = ["DATASETS", "ArraySource", "Batch", "FileSource", "Source", "Splits", "load"]


def load(config: DataConfig, *, ignore_index: int | None = None) -> Splits:
    """Read the configured dataset and divide it into train, val and test.

    Targets are not validated here, where the ignored class is not known: `ImageDataModule` does
    it.

    Args:
        config: What to read and how to split it.
        ignore_index: Integer target that is no class.

    Raises:
        ConfigError: for an unknown dataset or option.
        DataError: for files or targets that are missing or unusable.

    >>> splits = load(DataConfig(name="digits", val_fraction=0.2))
    >>> len(splits.train), len(splits.val), len(splits.test), splits.image_shape
    (1150, 288, 359, (1, 8, 8))
    """
    dataset = DATASETS[choose("dataset", config.name, DATASETS)]
    if config.name == "custom":
        splits = custom(config, ignore_index=ignore_index, **config.options)
    else:
        _check_options(config, dataset)
        splits = dataset(config, **config.options)
    return dataclasses.replace(
        splits, mean=tuple(config.mean or splits.mean), std=tuple(config.std or splits.std)
    )


def digits(config: DataConfig) -> Splits:
    """The embedded 1,797 handwritten digits of UCI, 8×8 grey (see digits/ATTRIBUTION.md)."""
    file = resources.files("equiloss.data") / "digits" / "digits.npz"
    with file.open("rb") as stream, np.load(stream) as arrays:
        images = torch.from_numpy(arrays["images"])  # [1797, 8, 8], values 0 to 16
        targets = torch.from_numpy(arrays["targets"]).long()
    # Up to 240: resizing rounds to whole numbers, and 17 levels would be too coarse for that.
    return _divided(config, images.unsqueeze(1) * 15, targets, 10)


def synthetic(
    config: DataConfig,
    *,
    num_samples: int = 1000,
    num_classes: int = 10,
    channels: int = 1,
    size: int = 8,
    seed: int = 0,
    imbalance: float = 1.0,
) -> Splits:
    """Images made of one random pattern per class and noise, which a network can tell apart.

    Args:
        config: Fractions of the splits.
        num_samples: Samples of all splits together.
        num_classes: K.
        channels: Channels of an image.
        size: Height and width, in pixels.
        seed: Seed of the patterns and the noise.
        imbalance: Size of the first class over that of the last; sizes in between fall
            geometrically, as in Cui et al., "Class-balanced loss based on effective number of
            samples", CVPR 2019.

    Raises:
        ConfigError: for sizes that make no sense, or fewer than three samples of a class.
    """
    keys = ("num_samples", "num_classes", "channels", "size")
    for key, value in zip(keys, (num_samples, num_classes, channels, size), strict=True):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"data.options.{key} must be a whole number above 0, got {value}")
    finite("data.options.imbalance", imbalance, least=1)
    few = ConfigError(
        f"data.options.num_samples={num_samples} leaves a class with fewer than 3 samples: "
        "each split needs one of each class"
    )
    if num_samples < 3 * num_classes:
        raise few
    # Sample n has the class whose share of [0, 1) holds the middle of its n-th part.
    exponents = torch.arange(num_classes, dtype=torch.float64) / max(num_classes - 1, 1)
    borders = (imbalance**-exponents).cumsum(0)  # [K]
    middles = (torch.arange(num_samples, dtype=torch.float64) + 0.5) / num_samples
    targets = torch.searchsorted(borders[:-1] / borders[-1], middles, right=True)  # [N]
    if int(torch.bincount(targets, minlength=num_classes).min()) < 3:
        raise few
    pixels = channels * size * size
    if num_samples * pixels >= 2**62:
        raise ConfigError(
            f"data.options: {num_samples} images of {channels} channels of {size}x{size} pixels "
            "are more than any memory holds"
        )
    # Whole numbers alone, so that the images are the same on every machine.
    patterns = keyed_bits(seed, 0, torch.arange(num_classes), pixels, stream=Stream.SYNTHETIC)
    noise = keyed_bits(seed, 1, torch.arange(num_samples), pixels, stream=Stream.SYNTHETIC)
    images = (patterns[targets] & 127) + (noise & 127)  # [N, C·H·W], 0 to 254
    images = images.to(torch.uint8).view(num_samples, channels, size, size)
    return _divided(config, images, targets, num_classes)


def custom(config: DataConfig, /, *, ignore_index: int | None = None, **options: Any) -> Splits:
    """The dataset that the function `data.target` returns when called with `data.options`.

    It returns either `Splits`, taken as they are, or the three splits as a mapping with the keys
    train, val and test, or as a sequence in this order. Each split is a pair (images, targets) of
    tensors or NumPy arrays: images uint8 [N, C, H, W], or [N, H, W] if grey; targets integers [N]
    or class probabilities [N, K]. A mapping may have a fourth key, class_names; without it the
    classes are numbered from 0 to the largest target, or to `data.num_classes`. Negative targets
    are left for `ignore_index` to allow.

    Raises:
        ConfigError: if the function cannot be imported or does not take the options.
        DataError: if it returns something else, or targets among which classes are missing
            though their number is not given.
    """
    where = f"data.target={config.target}"
    function = import_target(str(config.target), "data.target", ConfigError)
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise ConfigError(f"{where} does not go with data.options: {error}") from error
    returned = function(**options)
    if isinstance(returned, Splits):
        _refuse_changes(config, where)
        return returned
    names: Sequence[str] | None = None
    if isinstance(returned, Mapping):
        splits = dict(returned)
        names = splits.pop("class_names", None)
    elif isinstance(returned, Sequence) and len(returned) == len(SPLITS):
        splits = dict(zip(SPLITS, returned, strict=True))
    else:
        splits = {}
    if sorted(splits) != sorted(SPLITS):
        raise DataError(
            f"{where} returned {_describe(returned)}: it must return Splits, or train, val and "
            "test as a mapping or in this order"
        )
    pairs = {split: _pair(splits[split], f"{where}: {split}") for split in SPLITS}
    if names is None:
        names = _numbered(config, pairs, ignore_index, where)
    made = in_memory(config, pairs, names)
    without = [names[label] for label in (made.class_counts == 0).nonzero().flatten().tolist()]
    if not without:
        return made
    note = f"no training row for {len(without)} of {len(names)} classes: {', '.join(without[:5])}"
    return dataclasses.replace(made, notes=(note + ", …" * (len(without) > 5),))


DATASETS: dict[str, Callable[..., Splits]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "image_folder": image_folder,
    "table": table,
    "synthetic": synthetic,
    "custom": custom,
}


def _divided(config: DataConfig, images: Tensor, targets: Tensor, num_classes: int) -> Splits:
    rows = three_way(targets, config)
    pairs = {split: (images[rows[split]], targets[rows[split]]) for split in SPLITS}
    return in_memory(config, pairs, [str(label) for label in range(num_classes)])


def _check_options(config: DataConfig, dataset: Callable[..., Splits]) -> None:
    known = list(inspect.signature(dataset).parameters)[1:]
    kinds = get_type_hints(dataset)
    for option, value in config.options.items():
        if not known:
            raise ConfigError(f"data.options.{option}: data={config.name} has no options")
        if option not in known:
            raise ConfigError(unknown(f"option of data={config.name}", option, known))
        if not fits(value, kinds[option]):
            kind = getattr(kinds[option], "__name__", kinds[option])
            raise ConfigError(f"data.options.{option} must be of type {kind}, got {value}")


def _refuse_changes(config: DataConfig, where: str) -> None:
    """Refuse settings that would change images or rows of finished splits."""
    for key in ("max_samples", "long_tail", "image_size"):
        if getattr(config, key) is not None:
            raise ConfigError(
                f"data.{key} has no effect on the Splits that {where} returned: limit and resize "
                "there, or return pairs of images and targets"
            )


def _pair(value: Any, where: str) -> Pair:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise DataError(f"{where} is {_describe(value)}: it must be a pair (images, targets)")
    images, targets = _tensor(value[0], where), _tensor(value[1], where)
    if images.ndim == 3:
        images = images.unsqueeze(1)  # [N, H, W] -> [N, 1, H, W]
    check_images(images, f"{where} images")
    is_soft = targets.is_floating_point()
    if targets.dtype == torch.bool or targets.is_complex() or targets.ndim != 1 + is_soft:
        raise DataError(
            f"{where} targets are {targets.dtype} {list(targets.shape)}: they must be integers "
            "[N] or probabilities [N, K]"
        )
    if len(images) != len(targets):
        raise DataError(f"{where} has {len(images)} images and {len(targets)} targets")
    return images, targets if is_soft else targets.long()


def _tensor(value: Any, where: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.cpu()
    try:
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} holds what is no array of numbers: {error}") from error


def _numbered(
    config: DataConfig, pairs: Mapping[str, Pair], ignore_index: int | None, where: str
) -> list[str]:
    """Names of classes that have only numbers.

    Raises:
        DataError: where some numbers up to the largest are no target, so that these are labels of
            another kind, unless `data.num_classes` says that they are classes all the same.
    """
    soft = [targets.shape[1] for _, targets in pairs.values() if targets.ndim == 2]
    hard = torch.cat([targets for _, targets in pairs.values() if targets.ndim == 1] or [NONE])
    labels = torch.unique(hard[(hard >= 0) & (hard != ignore_index)]).tolist()
    largest = max([0, *labels, *(width - 1 for width in soft)])
    count = config.num_classes
    if count is not None:
        if largest >= count:
            raise DataError(
                f"{where} has the target {largest}: data.num_classes={count} ends below"
            )
        return [str(label) for label in range(count)]
    if labels and not soft and len(labels) <= largest:
        shown = ", ".join(map(str, labels[:4] if len(labels) > 5 else labels[:-1]))
        way_out = f"set data.num_classes={largest + 1} if the others are classes too"
        if labels[-1] - labels[0] + 1 == len(labels):
            way_out = f"subtract {labels[0]}, or {way_out}"
        elif labels[-2] - labels[0] + 2 == len(labels):
            way_out = (
                f"set loss.ignore_index={largest} if it marks rows without a class, or {way_out}"
            )
        else:
            way_out = f"number them anew (numpy.unique(targets, return_inverse=True)), or {way_out}"
        raise DataError(
            f"{where} has {len(labels)} different targets ({shown}{', …' * (len(labels) > 5)} and "
            f"{largest}): classes are 0 to K-1 without a gap; {way_out}"
        )
    return [str(label) for label in range(largest + 1)]


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(map(str, value))}"
    if isinstance(value, Sequence):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
