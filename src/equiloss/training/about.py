"""What the weights of a checkpoint are for, so that it can be used without its run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from equiloss.config import PRECISIONS, Config
from equiloss.data.splits import Splits
from equiloss.errors import CheckpointError
from equiloss.models.build import memory_order
from equiloss.records.reading import build, fits

# What of the network's configuration is kept.
MODEL = {"name": str, "target": str | None, "options": dict[str, Any]}
# And that, where it is another than torchvision, the only one that earlier versions had.
MODEL_OF_LIBRARY = {**MODEL, "library": str}


@dataclass(frozen=True)
class About:
    """The network, and how files become what it is given; plain data."""

    model: dict[str, Any]
    """`name`, `target`, `options` and perhaps `library`, as the configuration has them."""
    class_names: list[str]
    """In the order of the logits."""
    image_shape: list[int]
    """[C, H, W]."""
    image_size: int | None
    """To which pictures are resized; None: they have that size already."""
    mean: list[float]
    """Per channel, of pixel values in [0, 1]."""
    std: list[float]
    """Likewise."""
    range: list[float] | None
    """Values of black and white in files of more than 8 bits."""
    background: str
    """Colour that transparent pictures are composed on."""
    data: str
    """Name of the data set."""
    precision: str
    """As `trainer.precision`."""
    channels_last: bool
    """Whether images and weights are in NHWC order."""
    versions: dict[str, str]
    """Of the packages that trained it."""

    @classmethod
    def of_run(cls, config: Config, splits: Splits) -> About:
        """What a run's checkpoints say."""
        model, library = asdict(config.model), config.model.library
        kept = MODEL if library == "torchvision" else MODEL_OF_LIBRARY
        return cls(
            model={key: model[key] for key in kept},
            class_names=list(splits.class_names),
            image_shape=list(splits.image_shape),
            image_size=config.data.image_size,
            mean=list(splits.mean),
            std=list(splits.std),
            range=config.data.range,
            background=config.data.background,
            data=config.data.name,
            precision=config.trainer.precision,
            channels_last=memory_order(config) == torch.channels_last,
            versions={
                name: version(name)
                for name in dict.fromkeys(("equiloss", "torch", "torchvision", library))
            },
        )

    @classmethod
    def read(cls, saved: dict[str, Any], path: object) -> About:
        """From a checkpoint.

        Raises:
            CheckpointError: for one of a version that did not say it, or of another form.
        """
        if not saved:
            raise CheckpointError(
                f"{path} was written by a version of equiloss that did not say what its weights "
                "are for: evaluate it by task=test run=DIR"
            )
        try:
            about = build(cls, saved)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is of another version of equiloss") from error
        channels = about.image_shape[:1]
        rules = {
            "model": any(
                about.model.keys() == kinds.keys() and fits(about.model, kinds)
                for kinds in (MODEL, MODEL_OF_LIBRARY)
            ),
            "image_shape": len(about.image_shape) == 3 and min(about.image_shape) > 0,
            "mean": [len(about.mean)] == channels,
            "std": [len(about.std)] == channels,
            "range": about.range is None or len(about.range) == 2,
            "precision": about.precision in PRECISIONS,
        }
        if odd := [name for name, holds in rules.items() if not holds]:
            raise CheckpointError(
                f"{path} is of another version of equiloss: its {', '.join(odd)} cannot be read"
            )
        return about
