"""A training step of a network of which parts are frozen, against one that learns as a whole."""

from __future__ import annotations

from benchmarks.loop import seconds_per_step
from benchmarks.paired import Arrangement, Measure

# Batches of 32 images of 64 pixels, all within the first epoch.
WORK = (
    *("model=torchvision", "model.name=resnet18", "optimizer=adamw", "data=synthetic"),
    *("data.options={num_samples: 800, size: 64, channels: 3}", "data.batch_size=32"),
)
FIRST, COUNT = 3, 8


def step(overrides: list[str]) -> Measure:
    """Seconds of an optimizer step of resnet18."""
    return lambda: seconds_per_step(FIRST, COUNT, *WORK, *overrides)


def arrangements() -> list[Arrangement]:
    """What learns of the network, all of it first."""
    parts = {
        "all of it learns": [],
        "batch normalisation is frozen": ["model.freeze=[bn1,layer*.bn*,*.downsample.1]"],
        "the last 3 blocks learn": ["model.freeze=all_but_last:3"],
        "the head learns": ["model.freeze=backbone"],
        "all of it learns, and is averaged": ["ema.decay=0.999"],
    }
    return [
        Arrangement(name, "benchmarks.fine_tuning:step", {"overrides": options})
        for name, options in parts.items()
    ]
