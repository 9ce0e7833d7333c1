"""Random changes of training images that depend on (seed, epoch, sample index) and nothing else.

Shifts and flips work on a whole batch, on whatever device it is; a torchvision pipeline works
on one image at a time, in the loader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equiloss.config import AugmentConfig
from equiloss.data.sampler import Slice
from equiloss.data.sources import Source
from equiloss.errors import ConfigError, DataError, first_line, unknown
from equiloss.randomness import Stream, keyed_bits, keyed_uniform

Transform = Callable[[Tensor], Tensor]


def augment(images: Tensor, index: Tensor, epoch: int, seed: int, config: AugmentConfig) -> Tensor:
    """Shift and flip a batch as `config` says: the same for any world size, worker and order.

    Args:
        images: [N, C, H, W], of any type.
        index: Positions within the training split [N] int64, on the device of the images.
        epoch: Pass over the training split, from 0.
        seed: The run's seed.
        config: Which changes, and how large.

    Returns:
        Images of the same shape and type.
    """
    if not (config.shift or config.flip):
        return images
    # Every change has its own draws, so that turning one on does not alter the others.
    vertical, horizontal, mirror = keyed_uniform(seed, epoch, index, 3).unbind(1)  # 3 of [N]
    if config.shift:
        places = 2 * config.shift + 1
        offsets = torch.stack([vertical, horizontal], dim=1).mul(places).long() - config.shift
        images = shift(images, offsets, config.shift)
    if config.flip:
        images = flip(images, mirror < 0.5)
    return images


def shift(images: Tensor, offsets: Tensor, most: int | None = None) -> Tensor:
    """Move each image down and to the right; what comes in at the border is 0.

    Args:
        images: [N, C, H, W], of any type.
        offsets: Pixels down and to the right [N, 2] int64; negative ones go up and left.
        most: What no offset exceeds; else it is looked for, for which a device is waited.

    >>> shift(torch.tensor([[[[1, 2], [3, 4]]]]), torch.tensor([[1, -1]])).tolist()
    [[[[0, 0], [2, 0]]]]
    """
    n, _, height, width = images.shape
    if not n:
        return images
    farthest = int(offsets.abs().max()) if most is None else most
    padded = F.pad(images, [farthest] * 4)
    # Every window of the image's size that lies in the padded one: [N, C, places, places, H, W].
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    down, right = (farthest - offsets).unbind(1)  # [N] each: where the window begins
    return windows[torch.arange(n, device=images.device), :, down, right]


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror the chosen images left to right.

    Args:
        images: [N, C, H, W].
        mask: Which of them [N] bool.

    >>> flip(torch.tensor([[[[1, 2]]], [[[3, 4]]]]), torch.tensor([True, False])).flatten().tolist()
    [2, 1, 3, 4]
    """
    return torch.where(mask[:, None, None, None], images.flip(3), images)


class TransformedSource(Source):
    """A source whose images go through a torchvision pipeline, each with a generator of its own.

    Args:
        source: Where the images come from.
        transform: Takes [C, H, W] uint8 and returns the same shape and type.
        seed: The run's seed.

    Raises:
        DataError: (when read) if the pipeline fails, or changes the shape or the type.
    """

    def __init__(self, source: Source, transform: Transform, seed: int) -> None:
        super().__init__(source.targets, source.image_shape)
        self.source = source
        self.transform = transform
        self.seed = seed

    def hold(self) -> None:
        """Make the source itself ready."""
        self.source.hold()

    def read(self, part: Slice) -> Tensor:
        """The slice's images [n, C, H, W] uint8, transformed."""
        images = self.source.read(part)
        transformed = torch.empty_like(images)
        keys = keyed_bits(self.seed, part.epoch, part.indices, 1, stream=Stream.TRANSFORMS)
        with torch.random.fork_rng(devices=[]):
            for row, (position, key) in enumerate(
                zip(part.indices.tolist(), keys.squeeze(1).tolist(), strict=True)
            ):
                # torch.manual_seed would reseed the accelerators' generators too.
                torch.default_generator.manual_seed(key & (1 << 63) - 1)
                transformed[row] = self._transformed(images[row], position)
        return transformed

    def _transformed(self, image: Tensor, position: int) -> Tensor:
        try:
            changed: Any = self.transform(image)
        except Exception as error:  # a transform may fail in any way
            raise DataError(
                f"data.augment.transforms failed on train image {position}: {first_line(error)} "
                "(it is given one image, uint8 [C, H, W]; normalising and mixing come later, by "
                "data.mean, data.std, data.augment.mixup and .cutmix: leave them out)"
            ) from error
        if (
            not isinstance(changed, Tensor)
            or changed.dtype != torch.uint8
            or changed.shape != image.shape
        ):
            raise DataError(
                f"data.augment.transforms turned train image {position}, {_describe(image)}, into "
                f"{_describe(changed)}: type and shape must stay those of the evaluation images"
            )
        return changed


def build_transform(entries: Sequence[Any]) -> Transform:
    """Make a pipeline of torchvision.transforms.v2 from its configuration.

    Args:
        entries: One mapping `{name: ClassName, **arguments}` for each step; an argument
            `transforms` holds further steps, as RandomApply and RandomChoice need them.

    Raises:
        ConfigError: for an entry of another form, an unknown class or unsuitable arguments.
    """
    from torchvision.transforms import v2

    pipeline: Transform = v2.Compose([_step(entry) for entry in entries])
    return pipeline


def _step(entry: Any) -> Transform:
    from torchvision.transforms import v2

    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ConfigError(
            f"data.augment.transforms is a list of {{name: ClassName, **arguments}}; got {entry!r}"
        )
    known: dict[str, Callable[..., Transform]] = {
        name: value
        for name, value in vars(v2).items()
        if isinstance(value, type) and issubclass(value, v2.Transform)
    }
    arguments = dict(entry)
    name = arguments.pop("name")
    if name not in known:
        raise ConfigError(unknown("transform of torchvision.transforms.v2", name, sorted(known)))
    if "transforms" in arguments:
        arguments["transforms"] = [_step(step) for step in arguments["transforms"]]
    try:
        return known[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.augment.transforms: {name}: {error}") from error


def _describe(image: Any) -> str:
    if not isinstance(image, Tensor):
        return f"a {type(image).__name__}"
    return f"{list(image.shape)} {str(image.dtype).removeprefix('torch.')}"
