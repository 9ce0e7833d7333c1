"""`data=…`: the dataset, its splits, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from equiloss.config.checks import finite, open_dict, positive, require
from equiloss.errors import choose


@dataclass
class AugmentConfig:
    """Random augmentation of training images, keyed by (seed, epoch, sample index)."""

    shift: int = 0
    """Largest shift along each axis, in pixels; the border is filled with 0 (0: off)."""
    flip: bool = False
    """Mirror left to right with probability 1/2."""
    transforms: list[Any] = field(default_factory=list)
    """A torchvision.transforms.v2 pipeline instead: a list of `{name: ClassName, **arguments}`."""
    mixup: float = 0.0
    """Mix each row with the one before it, by a share from Beta(mixup, mixup) (0: off)."""
    cutmix: float = 0.0
    """Cut a box from the row before, of a share from Beta(cutmix, cutmix) (0: off)."""

    def __post_init__(self) -> None:
        for key in ("shift", "mixup", "cutmix"):
            finite(f"data.augment.{key}", getattr(self, key), least=0)
            # Beyond, every share is one half; much beyond, drawing one never ends.
            require(getattr(self, key) <= 1e6, f"data.augment.{key} must be at most 1e6")
        require(
            not (self.transforms and (self.shift or self.flip)),
            "data.augment.transforms replaces data.augment.shift and .flip, which the file of data="
            " may have set: add data.augment.shift=0 data.augment.flip=false",
        )

    @property
    def mixes(self) -> bool:
        """Whether rows are mixed, so that targets become probabilities."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass
class DataConfig:
    """A dataset, its split and how it is read."""

    name: str = MISSING
    """digits | fashion_mnist | mnist | cifar10 | cifar100 | image_folder | table | synthetic |
    custom."""
    root: str | None = None
    """Directory that holds the files (null: where the dataset is looked for by default)."""
    download: bool = False
    """Let torchvision download missing files into `root`."""
    batch_size: int = 50
    """Samples per optimizer step over ALL devices and micro-batches."""
    eval_batch_size: int = 1000
    """Samples per evaluation step over all devices."""
    num_workers: int = 0
    """Loader processes per rank; 0 is fastest for sets that live in memory."""
    worker_timeout_s: float = 300.0
    """Longest time to wait for a batch of a loader process, in seconds (0: for ever)."""
    val_fraction: float = 0.1
    """Part of the training files that validates, where a dataset has no validation split."""
    test_fraction: float = 0.2
    """Part of all files that tests, where a dataset has no test split."""
    split_seed: int = 0
    """Seed of the stratified split; not the run's seed, so that every run sees the same split."""
    max_samples: int | None = None
    """Use at most this many samples of each split (null: all)."""
    long_tail: float | None = None
    """Thin the training split out until its first class is this many times as large as its last,
    with sizes that fall geometrically in between (null: as it is); val and test stay whole."""
    image_size: int | None = None
    """Resize images to this height and width, in pixels (null: as stored)."""
    cache: str = "none"
    """none | memory: decode image files each time, or once, into memory that the jobs of a sweep
    share."""
    table: str | None = None
    """With name=table: a CSV file with columns path and label, and split if it has one."""
    range: list[float] | None = None
    """Values of black and white in image files of more than 8 bits (null: 0 and 65535 in 16 bits;
    others are refused)."""
    background: str = "white"
    """Colour that transparent images are composed on: a name or #rrggbb."""
    mean: list[float] | None = None
    """Mean per channel of pixel values in [0, 1] (null: from the training split)."""
    std: list[float] | None = None
    """Standard deviation per channel of pixel values in [0, 1] (null: from the training split)."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    target: str | None = None
    """With name=custom: `package.module:function` that returns the splits."""
    num_classes: int | None = None
    """With name=custom: K, where targets alone do not tell (null: the largest target and 1)."""
    options: dict[str, Any] = field(default_factory=open_dict)
    """Keyword arguments of the dataset: sizes of `synthetic`, or those of `target`."""

    def __post_init__(self) -> None:
        for key in ("batch_size", "eval_batch_size", "max_samples", "image_size", "num_classes"):
            positive(f"data.{key}", getattr(self, key))
        require(self.num_workers >= 0, f"data.num_workers must be >= 0, got {self.num_workers}")
        finite("data.worker_timeout_s", self.worker_timeout_s, least=0)
        for key in ("val_fraction", "test_fraction"):
            value = getattr(self, key)
            require(0 < value < 1, f"data.{key} must lie between 0 and 1, got {value}")
        choose("data.cache", self.cache, ("none", "memory"))
        finite("data.long_tail", self.long_tail, least=1)
        finite("data.range", *(self.range or ()))
        require(
            self.range is None or (len(self.range) == 2 and self.range[0] != self.range[1]),
            f"data.range is [BLACK,WHITE], two different numbers; got {self.range}",
        )
        for key in ("mean", "std"):
            require(getattr(self, key) != [], f"data.{key} needs one number per channel, got []")
        finite("data.mean", *(self.mean or ()))
        finite("data.std", *(self.std or ()))
        require(
            (self.name == "custom") == (self.target is not None),
            "data.target names a function for data=custom, and only there: "
            "data=custom data.target=package.module:function",
        )
        require(
            self.num_classes is None or self.name == "custom",
            "data.num_classes belongs to data=custom: other sets know their classes",
        )
        if self.std is not None:
            require(min(self.std) > 0, f"data.std must be positive, got {self.std}")
