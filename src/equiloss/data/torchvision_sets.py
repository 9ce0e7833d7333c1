"""Public sets that torchvision can download: MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equiloss.config import DataConfig
from equiloss.data.splits import Pair, Splits, holdout, in_memory
from equiloss.errors import DataError

log = logging.getLogger(__name__)

DEFAULT_ROOT = Path("data")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

GARMENTS = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def mnist(config: DataConfig) -> Splits:
    """MNIST: 60,000 + 10,000 handwritten digits, 28×28 grey.

    LeCun, Bottou, Bengio & Haffner, "Gradient-based learning applied to document recognition",
    Proceedings of the IEEE, 1998.
    """
    return _idx_set(config, "MNIST", [str(digit) for digit in range(10)], others=())


def fashion_mnist(config: DataConfig) -> Splits:
    """Fashion-MNIST: 60,000 + 10,000 garments, 28×28 grey.

    Xiao, Rasul & Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine
    learning algorithms", 2017.
    """
    return _idx_set(config, "FashionMNIST", GARMENTS, others=(DEBIAN_FASHION_MNIST,))


def cifar10(config: DataConfig) -> Splits:
    """CIFAR-10: 50,000 + 10,000 photographs of 10 classes, 32×32 RGB.

    Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """
    return _cifar(config, "CIFAR10")


def cifar100(config: DataConfig) -> Splits:
    """CIFAR-100: 50,000 + 10,000 photographs of 100 classes, 32×32 RGB.

    Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """
    return _cifar(config, "CIFAR100")


def _idx_set(
    config: DataConfig, name: str, class_names: Sequence[str], others: tuple[Path, ...]
) -> Splits:
    if config.download:
        for is_train in (True, False):
            _torchvision(name, config, train=is_train)
    root = Path(config.root or DEFAULT_ROOT)
    # Files right in the directory, or where torchvision puts them.
    candidates = [root, root / name / "raw", *(() if config.root else others)]
    train_images = "train-images-idx3-ubyte"
    directory = next((place for place in candidates if _idx_file(place, train_images)), None)
    if directory is None:
        hint = f", or install Debian's package dataset-{others[0].name}" if others else ""
        raise DataError(
            f"{config.name}: no IDX files in {', '.join(map(str, candidates))}. Set "
            f"data.root= to their directory, download them with data.download=true{hint}"
        )
    log.info("data=%s is read from %s", config.name, directory)
    train, test = (
        (
            _idx(directory, f"{part}-images-idx3-ubyte").unsqueeze(1),  # [N, H, W] -> [N, 1, H, W]
            _idx(directory, f"{part}-labels-idx1-ubyte").long(),
        )
        for part in ("train", "t10k")
    )
    return _with_validation(config, train, test, class_names)


def _cifar(config: DataConfig, name: str) -> Splits:
    pairs = []
    for train in (True, False):
        files = _torchvision(name, config, train=train)
        images = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()  # NHWC -> NCHW
        pairs.append((images, torch.tensor(files.targets)))
    return _with_validation(config, pairs[0], pairs[1], files.classes)


def _torchvision(name: str, config: DataConfig, *, train: bool) -> Any:
    from torchvision import datasets

    root = Path(config.root or DEFAULT_ROOT)
    try:
        return getattr(datasets, name)(root, train=train, download=config.download)
    except (RuntimeError, OSError) as error:
        if config.download:
            message = f"{config.name} cannot be downloaded to {root}: {error}"
        else:
            message = (
                f"{config.name} is not in {root}, or damaged: set data.root= to its directory, or "
                "download it with data.download=true"
            )
        raise DataError(message) from error


def _with_validation(
    config: DataConfig, train: Pair, test: Pair, class_names: Sequence[str]
) -> Splits:
    images, targets = train
    kept, held = holdout(targets, config.val_fraction, seed=config.split_seed)
    pairs = {
        "train": (images[kept], targets[kept]),
        "val": (images[held], targets[held]),
        "test": test,
    }
    return in_memory(config, pairs, class_names)


def _idx_file(directory: Path, name: str) -> Path | None:
    candidates = (directory / name, directory / f"{name}.gz")
    return next((file for file in candidates if file.is_file()), None)


def _idx(directory: Path, name: str) -> Tensor:
    """Read an IDX file of bytes, the format that MNIST's authors describe beside its files."""
    file = _idx_file(directory, name)
    if file is None:
        raise DataError(f"{directory / name} is missing, as a plain file and as .gz")
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    # Header: two zero bytes, the type (8: unsigned byte), the number of axes, each axis's length.
    axes = content[3] if len(content) > 3 else 0
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if content[:3] != b"\x00\x00\x08" or len(content) != start + math.prod(shape):
        raise DataError(f"{file} is damaged: it is no IDX file of bytes, or not a whole one")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
