"""How far a run has come, and what a checkpoint says of it beside weights, optimizer and loops."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from equiloss.errors import CheckpointError
from equiloss.records.reading import build

log = logging.getLogger(__name__)

KEY = "equiloss"


@dataclass
class Counts:
    """What is counted over all ranks, from a run's first step on."""

    train_seen: int = 0
    """Samples trained on."""
    skipped_steps: int = 0
    """Steps that the gradient scaler of 16-mixed held back."""
    zero_mass_steps: int = 0
    """Steps whose global batch had no mass."""
    train_seconds: float = 0.0
    """Time spent on training, without the evaluations between epochs."""
    validated_step: int = -1
    """Optimizer steps taken when the newest validation ended."""


@dataclass
class Progress:
    """How far a run has come; plain data."""

    counts: Counts = field(default_factory=Counts)
    scalars: dict[str, float] = field(default_factory=dict)
    """The newest value of every metric, by its logged name."""
    samples: dict[str, int] = field(default_factory=dict)
    """Samples evaluated of each split, in its newest evaluation."""
    segments: list[dict[str, int]] = field(default_factory=list)
    """As in `results.json`: from which step on how many ranks trained."""
    notes: list[str] = field(default_factory=list)
    """As in `results.json`: what a reader of the metrics must know."""

    def of_split(self, split: str) -> dict[str, float]:
        """The newest metrics of one split, by their logged names."""
        return {n: value for n, value in self.scalars.items() if n.startswith(f"{split}/")}


class Clock:
    """Measures training without the evaluations between epochs."""

    def __init__(self) -> None:
        self.began: float | None = None
        """Reading of time.perf_counter when training began."""
        self._since = (0.0, 0)

    def start(self, counts: Counts) -> None:
        """Measure from now on."""
        self._since = (time.perf_counter(), counts.train_seen)
        if self.began is None:
            self.began = self._since[0]

    def lap(self, counts: Counts) -> float:
        """Add the time since the last reading to the counts; returns samples per second in it."""
        then, seen = self._since
        self.start(counts)
        seconds = self._since[0] - then
        counts.train_seconds += seconds
        return (counts.train_seen - seen) / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class RunState:
    """What a checkpoint says of its run: plain data and tensors, as `weights_only` reads them."""

    num_classes: int
    split_sizes: dict[str, int]
    loss: dict[str, Any]
    """Name and options, resolved: class weights as numbers."""
    progress: Progress
    rng: list[dict[str, Any]]
    """State of the random generators of each rank."""
    fingerprint: dict[str, str] = field(default_factory=dict)
    """`Splits.fingerprint`; empty in checkpoints of versions that had none."""
    about: dict[str, Any] = field(default_factory=dict)
    """`About`, as plain data; empty likewise."""

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put it into a checkpoint."""
        saved = asdict(self)
        progress = saved.pop("progress")
        checkpoint[KEY] = saved | progress

    @classmethod
    def load(cls, checkpoint: dict[str, Any], path: Path | str = "the checkpoint") -> RunState:
        """Take it out of a checkpoint.

        Raises:
            CheckpointError: if there is none, or one of another form.
        """
        if KEY not in checkpoint:
            raise CheckpointError(f"{path} was not written by equiloss")
        try:
            saved = dict(checkpoint[KEY])
            parts = {name: saved.pop(name) for name in ("scalars", "samples", "segments")}
            parts |= {"counts": build(Counts, saved.pop("counts")), "notes": saved.pop("notes", [])}
            return build(cls, saved | {"progress": build(Progress, parts)})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is of another version of equiloss") from error

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
        if self.fingerprint:
            before, now = self.fingerprint, other.fingerprint
            parts = dict.fromkeys([*before, *now])
            pairs += [(part, before.get(part), now.get(part)) for part in parts]
        else:
            log.info("the checkpoint has no digest of the data: they are taken to be the same")
        for what, before, now in pairs:
            if before != now:
                raise CheckpointError(
                    f"cannot continue: {what} is {now} now and was {before} when the checkpoint "
                    "was written; start anew with another hydra.run.dir=…"
                )
