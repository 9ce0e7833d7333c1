"""What a checkpoint says of its run, beside weights, optimizer and loops."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from equiloss.errors import CheckpointError

KEY = "equiloss"


@dataclass(frozen=True)
class RunState:
    """What a checkpoint says of its run, beside weights, optimizer and loops.

    Plain data and tensors: a checkpoint is read with `weights_only`.
    """

    num_classes: int
    split_sizes: dict[str, int]
    loss: dict[str, Any]
    """Name and options, resolved: class weights as numbers."""
    scalars: dict[str, float]
    """The newest value of every metric."""
    samples: dict[str, int]
    """Samples evaluated of each split, in its newest evaluation."""
    counts: dict[str, Any]
    """What was counted so far."""
    segments: list[dict[str, int]]
    """As in `results.json`."""
    rng: list[dict[str, Any]]
    """State of the random generators of each rank."""

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put it into a checkpoint."""
        checkpoint[KEY] = asdict(self)

    @classmethod
    def load(cls, checkpoint: dict[str, Any], path: Path | str = "the checkpoint") -> RunState:
        """Take it out of a checkpoint.

        Raises:
            CheckpointError: if there is none.
        """
        if KEY not in checkpoint:
            raise CheckpointError(f"{path} was not written by equiloss")
        return cls(**checkpoint[KEY])

    def check_same_run(self, other: RunState) -> None:
        """Refuse to continue a run on other data or with another loss.

        Raises:
            CheckpointError: naming what differs.
        """
        pairs = [
            ("the loss", self.loss["name"], other.loss["name"]),
            ("the number of classes", self.num_classes, other.num_classes),
            *(
                (f"the length of the {split} split", length, other.split_sizes[split])
                for split, length in self.split_sizes.items()
            ),
            *(
                (f"loss.{option}", value, other.loss["options"].get(option))
                for option, value in self.loss["options"].items()
            ),
        ]
        for what, before, now in pairs:
            if before != now:
                raise CheckpointError(
                    f"cannot continue: {what} is {now} now and was {before} when the checkpoint "
                    "was written; start anew with another hydra.run.dir=…"
                )
