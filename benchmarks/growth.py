"""How a training step's time grows with the batch, the image and the number of classes."""

from __future__ import annotations

from benchmarks.loop import seconds_per_step
from benchmarks.paired import Arrangement, Measure

FIRST, COUNT = 3, 8
# Of the shipped convnet.
BASE = {"batch": 64, "size": 28, "classes": 10}


def step(batch: int, size: int, classes: int) -> Measure:
    """Seconds of an optimizer step of the convnet on synthetic pictures."""
    # All steps lie within the first epoch, of half of the samples at least; and some of each class.
    samples = max(2 * batch * (FIRST + COUNT), 4 * classes)
    options = f"{{num_samples: {samples}, size: {size}, num_classes: {classes}}}"
    words = ("data=synthetic", f"data.options={options}", f"data.batch_size={batch}")
    return lambda: seconds_per_step(FIRST, COUNT, *words)


def arrangements() -> list[Arrangement]:
    """One size changed at a time, the base first."""
    changes: dict[str, dict[str, int]] = {
        "batch 64, 28×28, 10 classes": {},
        "batch 128": {"batch": 128},
        "batch 256": {"batch": 256},
        "56×56": {"size": 56},
        "100 classes": {"classes": 100},
        "1,000 classes": {"classes": 1000},
    }
    return [
        Arrangement(name, "benchmarks.growth:step", BASE | change)
        for name, change in changes.items()
    ]
