"""Whether an exported file is the network that was trained: on the whole test split.

With z the logits of the checkpoint's weights in float64, c those of the checkpoint as it predicts
and f those of the file, the file is accepted if

    max |f - z|  <=  4 · max |c - z|  +  eps · (max z - min z)

and if each row has the class of c, but for rows whose two largest logits in z lie within twice
that bound of each other, which rounding may exchange; they are counted. Its probabilities p of K
classes must be those of its own logits:

    max |p - softmax f|  <=  (K + 8) · eps

A sum of K terms is off by K/2 · eps, an exponential by its own rounding (2 · eps) and that of its
argument, which is at most log K / 2 · eps after the division: together less than K + 8.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from equiloss.config.resolved import ResolvedConfig, from_stored, resolve
from equiloss.data import datasets
from equiloss.data.sampler import Slice
from equiloss.errors import CheckpointError
from equiloss.prediction.export import calling, classes_of, exactly, loaded
from equiloss.prediction.model import TrainedModel
from equiloss.records.reading import read_yaml
from equiloss.records.run_dir import CHECKPOINTS, CONFIG

TIMES = 4


@dataclass(frozen=True)
class Certificate:
    """What was found of a file on the test split; plain data."""

    format: str
    sha256: str
    """Digest of the file, as `sha256sum` prints it."""
    rows: int
    """Test images that went through checkpoint and file."""
    error: float
    """max |f - z|."""
    own_error: float
    """max |c - z|."""
    bound: float
    """What `error` may be at most."""
    differing: int
    """Rows of another class than the checkpoint's."""
    undecided: int
    """Rows whose two largest logits rounding may exchange."""
    unexplained: int
    """Differing rows that are not undecided."""
    same_classes: bool
    """Whether the file names the classes in the checkpoint's order."""
    confusion_apart: int
    """Sum of |differences| of the confusion matrices over 2, of decided rows: 0 where `unexplained`
    is, and otherwise how much of it shows in them."""
    softmax_error: float
    """max |p - softmax f|."""
    softmax_bound: float
    """What `softmax_error` may be at most."""

    @property
    def holds(self) -> bool:
        """Whether the file is accepted."""
        # Beyond the range of float32 the checkpoint itself says nothing to compare with.
        return (
            math.isfinite(self.bound)
            and self.error <= self.bound
            and self.softmax_error <= self.softmax_bound
            and self.unexplained == 0
            and self.same_classes
        )

    def as_dict(self) -> dict[str, Any]:
        """As `certificate.json` has it under the file's name."""
        return {"holds": self.holds, **asdict(self)}

    def describe(self) -> str:
        """One line."""
        verdict = "certified" if self.holds else "rejected"
        order = "" if self.same_classes else "; its classes are named in another order"
        if not self.softmax_error <= self.softmax_bound:
            order += f"; its probabilities are {self.softmax_error:.3g} off its logits' softmax"
        return (
            f"{verdict}: {self.rows} test images, logits within {self.error:.3g} of float64 "
            f"(at most {self.bound:.3g}; the checkpoint's own {self.own_error:.3g}), "
            f"{self.differing} classes differ, {self.undecided} rows undecided{order}"
        )


def certify(
    model: TrainedModel,
    kind: str,
    place: Path,
    images: Tensor,
    target: Tensor,
    *,
    name: Path | None = None,
) -> Certificate:
    """Hold a file against the checkpoint that it was made from.

    Args:
        model: The checkpoint's.
        kind: Format of the file.
        place: The file.
        images: Of the test split [N, C, H, W] uint8.
        target: Their classes [N] int64, or probabilities [N, K].
        name: What to call the file in errors (None: as it is named).

    Raises:
        UserError: if the file cannot be loaded and called, or the network cannot be computed in
            float64.
    """
    own, exact = model.logits(images).double(), exactly(model, images)
    with calling(place, name or place):
        probabilities, given = (part.double() for part in loaded(kind, place)(images))
        names = classes_of(kind, place)
    error, own_error = _distance(given, exact), _distance(own, exact)
    spread = float(exact.max() - exact.min())
    eps = torch.finfo(torch.float32).eps
    bound = TIMES * own_error + eps * spread
    first, second = exact.topk(2, dim=-1).values.unbind(-1)
    undecided = first - second <= 2 * bound
    differs = given.argmax(-1) != own.argmax(-1)
    truth = target.argmax(-1) if target.is_floating_point() else target
    counted = ~undecided & (truth >= 0) & (truth < own.shape[1])
    tables = [_confusion(each[counted], truth[counted]) for each in (given, own)]
    return Certificate(
        format=kind,
        sha256=hashlib.sha256(place.read_bytes()).hexdigest(),
        rows=len(images),
        error=error,
        own_error=own_error,
        bound=bound,
        differing=int(differs.sum()),
        undecided=int(undecided.sum()),
        unexplained=int((differs & ~undecided).sum()),
        same_classes=names == list(model.classes),
        confusion_apart=int((tables[0] - tables[1]).abs().sum()) // 2,
        softmax_error=_distance(probabilities, given.softmax(-1)),
        softmax_bound=(given.shape[1] + 8) * eps,
    )


def test_split(checkpoint: Path) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] uint8 and targets of the test split of a checkpoint's run.

    Raises:
        CheckpointError: where the run's configuration does not lie beside it, or names code.
        UserError: if the data cannot be read.
    """
    config = _configuration(checkpoint).config.data
    if config.target is not None:
        raise CheckpointError(f"the data of {checkpoint} come from code, {config.target}")
    source = datasets.load(config).test
    return source.read(Slice(0, torch.arange(len(source)))), source.targets


def _configuration(checkpoint: Path) -> ResolvedConfig:
    run_dir = checkpoint.absolute().parent.parent
    if checkpoint.absolute().parent.name != CHECKPOINTS or not (run_dir / CONFIG).is_file():
        raise CheckpointError(
            f"{checkpoint} lies in no run's {CHECKPOINTS}/: its test split is not known, and "
            "without it there is no certificate"
        )
    stored = from_stored(read_yaml(run_dir / CONFIG))
    if stored is None:
        raise CheckpointError(f"{run_dir / CONFIG} is no configuration of a run")
    return resolve(OmegaConf.create(stored))


def _distance(some: Tensor, other: Tensor) -> float:
    apart = (some - other).abs()
    return float("inf") if apart.isnan().any() else float(apart.max())


def _confusion(logits: Tensor, truth: Tensor) -> Tensor:
    classes = logits.shape[1]
    pairs = truth * classes + logits.argmax(-1)
    return torch.bincount(pairs, minlength=classes * classes)
