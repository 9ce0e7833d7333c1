"""Sources of a split's images: a tensor in memory, or image files decoded as they are needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from equiloss.data import fingerprint, memory
from equiloss.data.decoding import Decoder
from equiloss.data.sampler import Slice
from equiloss.errors import DataError

Shape = tuple[int, int, int]


class Batch(NamedTuple):
    """One rank's part of a global batch; any of its tensors may have zero rows."""

    images: Tensor
    """[n, C, H, W]: uint8 as loaded, floating point and normalised on the device."""
    target: Tensor
    """Classes [n] int64, or class probabilities [n, K]."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which no one needs here
    """Positions within the split [n] int64."""
    epoch: int
    """Pass over the split, from 0."""
    number: int = 0
    """Number of the global batch in its epoch, from 0."""
    lead: int = 0
    """Whether the first row, as loaded, is only there to be mixed into the second: 0 or 1."""
    rows: int = 0
    """Rows of the global batch."""


class Source(Dataset[Batch], ABC):
    """The samples of one split, read a slice at a time.

    Args:
        targets: Classes [N] int64, or class probabilities [N, K], on the host.
        image_shape: (C, H, W) of every image.
    """

    def __init__(self, targets: Tensor, image_shape: Shape) -> None:
        self.targets = targets
        self.image_shape = image_shape

    def __len__(self) -> int:
        return len(self.targets)

    def hold(self) -> None:
        """Make ready what the processes that read it from now on can share."""

    @abstractmethod
    def read(self, part: Slice) -> Tensor:
        """The slice's images [n, C, H, W] uint8."""

    def fingerprint(self) -> dict[str, str]:
        """What the samples are, part by part: a resumed run refuses to go on if one differs.

        A source of your own may say more than its type, shape and targets:
        `super().fingerprint() | {"the archive": "version 3"}`.
        """
        shape = "x".join(map(str, self.image_shape))
        return {
            "the source": f"{type(self).__name__} {shape}",
            "the order of targets": fingerprint.of_tensor(self.targets),
        }

    def __getitems__(self, part: Slice) -> Batch:
        # torch's loader calls this in place of __getitem__, with what the batch sampler yields.
        target = self.targets[part.indices]
        images, index = self.read(part), part.indices
        return Batch(images, target, index, part.epoch, part.number, part.lead, part.rows)


class ArraySource(Source):
    """Images in one tensor, so that a batch is one indexing operation.

    Args:
        images: [N, C, H, W] uint8.
        targets: Classes [N] int64, or class probabilities [N, K].

    >>> source = ArraySource(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0]))
    >>> batch = source.__getitems__(Slice(epoch=0, indices=torch.tensor([2, 1])))
    >>> list(batch.images.shape), batch.target.tolist()
    ([2, 1, 8, 8], [0, 1])
    """

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        check_images(images, "images")
        if len(images) != len(targets):
            raise DataError(f"there are {len(images)} images and {len(targets)} targets")
        _, channels, height, width = images.shape
        super().__init__(targets, (channels, height, width))
        self.images = images

    def read(self, part: Slice) -> Tensor:
        """The slice's images [n, C, H, W] uint8."""
        return self.images.index_select(0, part.indices)

    def fingerprint(self) -> dict[str, str]:
        """As for every source, after a digest of each class's images."""
        rows = fingerprint.rows_by_class(self.targets).items()
        images = {
            label: f"{len(own):,} images (digest {fingerprint.of_tensor(self.images[own])})"
            for label, own in rows
        }
        return images | super().fingerprint()


class FileSource(Source):
    """Images that are decoded from their files each time they are needed, unless they are kept.

    Args:
        files: N image files that PIL can read.
        targets: Classes [N] int64.
        decoder: Makes pixels of a file.
        image_size: Height and width after resizing, in pixels (None: all files must have the
            size of the first).
        root: Directory that may move elsewhere with all files (None: their paths stay).

    Raises:
        DataError: for a file that cannot be read, or that has another size without `image_size`.
    """

    def __init__(
        self,
        files: Sequence[Path],
        targets: Tensor,
        *,
        decoder: Decoder,
        image_size: int | None,
        root: Path | None = None,
    ) -> None:
        assert len(files) == len(targets) > 0
        self.files = list(files)
        self.root = root
        self.decoder = decoder
        self.image_size = image_size
        self.keeps = False
        """Whether all images are decoded at once, and kept (see `equiloss.data.memory`)."""
        self._images: Tensor | None = None
        channels, height, width = decoder(self.files[0]).shape
        size = (height, width) if image_size is None else (image_size, image_size)
        super().__init__(targets, (channels, *size))

    @property
    def images(self) -> memory.Images:
        """What there is to decode."""
        read_as = repr((self.decoder, self.image_size))
        return memory.Images(self.files, self.image_shape, read_as, self.image)

    def hold(self) -> None:
        """Decode all images, where they are kept."""
        if self.keeps and self._images is None:
            self._images = memory.decoded(self.images)

    def read(self, part: Slice) -> Tensor:
        """The slice's images [n, C, H, W] uint8."""
        if self._images is not None:
            return self._images.index_select(0, part.indices)
        images = torch.empty(len(part.indices), *self.image_shape, dtype=torch.uint8)
        for row, position in enumerate(part.indices.tolist()):
            images[row] = self.image(self.files[position])
        return images

    def fingerprint(self) -> dict[str, str]:
        """As for every source, after each class's files: their names and sizes, unread."""
        rows = fingerprint.rows_by_class(self.targets).items()
        files = {
            label: fingerprint.of_files((self.files[row] for row in own.tolist()), self.root)
            for label, own in rows
        }
        return files | super().fingerprint()

    def image(self, file: Path) -> Tensor:
        """One file's image [C, H, W] uint8, resized where that is wanted."""
        image = self.decoder(file)  # [C, h, w]
        if image.shape == self.image_shape:
            return image
        if self.image_size is None:
            raise DataError(
                f"image {file} has {_size(image.shape)} pixels and {self.files[0]} has "
                f"{_size(self.image_shape)}: set data.image_size= to resize them all"
            )
        return resize(image, self.image_size)


def check_images(images: Tensor, what: str) -> None:
    """Refuse what are no images of a set in memory.

    Raises:
        DataError: for another type than uint8, or another shape than [N, C, H, W].
    """
    shape = list(images.shape)
    if images.ndim == 4 and shape[3] in (1, 3, 4) and min(shape[1:3]) > 4:
        raise DataError(
            f"{what} are {shape}, which looks like NHWC: move the channels forward, as with "
            "numpy.moveaxis(images, 3, 1)"
        )
    if images.dtype != torch.uint8 or images.ndim != 4:
        scale = "; multiply by 255 and round" if images.is_floating_point() else ""
        raise DataError(
            f"{what} are {images.dtype} {shape}: they must be torch.uint8 [N, C, H, W]{scale}"
        )


def resize(images: Tensor, size: int) -> Tensor:
    """Resize [..., C, H, W] uint8 to [..., C, size, size], with antialiasing."""
    from torchvision.transforms.v2 import functional

    resized: Tensor = functional.resize(images, [size, size], antialias=True)
    return resized


def _size(shape: Sequence[int]) -> str:
    return f"{shape[-2]}x{shape[-1]}"
