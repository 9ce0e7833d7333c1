"""Metrics of an evaluation, exact over any number of ranks.

Every state is a sum over samples, in integers or float64, so adding the ranks' states gives the
figures of one device. (Averaging the ranks' averages does not, and neither does padding.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from equiloss.losses.criterion import LossSum
from equiloss.training.extra_metrics import ExtraMetrics

CALIBRATION_BINS = 15
SCALARS = ("loss_total", "loss_mass", "nll_total")
COUNTS = ("samples", "rows", "top5")
STATES = (*SCALARS, *COUNTS, "confusion", "calibration")


class Evaluated(NamedTuple):
    """What an evaluation found."""

    scalars: dict[str, float]
    """loss and nll in nats; acc, balanced_acc, acc_top5 and ece in [0, 1]; NaN where no row
    counts."""
    samples: int
    """Samples seen over all ranks, ignored ones included."""
    confusion: Tensor
    """Rows by (true class, predicted class) [K, K], int64; without those of NaN logits."""
    calibration: Tensor
    """Per bin of confidence: rows, sum of confidences, rows predicted rightly [3, B], float64."""

    def as_dict(self, *, matrix: bool) -> dict[str, Any]:
        """Confusion matrix (null unless asked for) and calibration, as evaluation.json has them."""
        bins = zip(("rows", "confidence", "right"), self.calibration.tolist(), strict=True)
        return {
            "confusion": self.confusion.tolist() if matrix else None,
            "calibration": dict(bins),
        }


class EvaluationMetric(Metric):
    """Loss, negative log-likelihood, accuracies, calibration error and confusion matrix.

    - `loss`: the configured loss, total over mass.
    - `nll`: plain cross-entropy, comparable between runs with different losses.
    - `acc`: share of rows whose largest logit is the true class (micro average).
    - `balanced_acc`: mean over the classes that occur of the share of their rows that is right
      (macro-averaged recall); Brodersen et al., "The balanced accuracy and its posterior
      distribution", ICPR 2010.
    - `acc_top5`: share of rows whose true class is among the min(5, K) largest logits.
    - `ece`: expected calibration error over 15 equal bins of the largest probability; Guo et al.,
      "On Calibration of Modern Neural Networks", ICML 2017. Bin m holds the confidences in
      ((m-1)/15, m/15]. It keeps sums per bin, not every confidence.

    Of equal logits the one of the lower class counts as the larger. A row whose logits have no
    softmax (NaN among them) is wrong in every accuracy, and makes nll and ece NaN.

    Rows whose target is `ignore_index` count in `samples` alone. Soft targets count by their
    largest class, except in `loss` and `nll`.

    Args:
        num_classes: K.
        ignore_index: Integer target of the rows that are left out, or None.
        extra: Further metrics, as `metrics.extra` has them.
    """

    full_state_update = False
    loss_total: Tensor
    loss_mass: Tensor
    nll_total: Tensor
    samples: Tensor
    rows: Tensor
    top5: Tensor
    confusion: Tensor
    calibration: Tensor

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.extra = ExtraMetrics(extra or {}, num_classes)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        for name in SCALARS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in COUNTS:
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # The last column is of rows that predict nothing.
        confusion = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
        self.add_state("confusion", confusion, dist_reduce_fx="sum")
        bins = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64)
        self.add_state("calibration", bins, dist_reduce_fx="sum")

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ""
    ) -> nn.Module:
        """Move to another device, and never to another dtype: half precision would round sums."""
        return super()._apply(lambda value: fn(value).to(value.dtype), exclude_state)

    def update(self, logits: Tensor, target: Tensor, loss: LossSum) -> None:
        """Add a batch: logits [N, K], target [N] or [N, K], and the loss's exact sums over it."""
        self.samples += len(target)
        self.loss_total += loss.total
        self.loss_mass += loss.mass
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.ignore_index is not None and not target.is_floating_point():
            kept = target != self.ignore_index
            logits, target = logits[kept], target[kept]
        self.rows += len(target)
        self.nll_total += F.cross_entropy(logits, target, reduction="none").double().sum()

        if target.is_floating_point():
            target = target.argmax(-1)
        probabilities = logits.softmax(-1)  # [N, K]
        self.extra.update(probabilities, target)
        confidence = probabilities.amax(-1)  # [N]
        decided = ~confidence.isnan()
        # A confidence that is NaN belongs nowhere: it makes the first bin, and with it ece, NaN.
        edges = torch.arange(1, CALIBRATION_BINS).to(confidence) / CALIBRATION_BINS
        bins = torch.bucketize(confidence.nan_to_num(), edges)
        predicted = logits.argmax(-1).where(decided, self.num_classes)
        right = predicted == target
        per_row = torch.stack([torch.ones_like(confidence), confidence, right]).double()  # [3, N]
        self.calibration.index_add_(1, bins, per_row)

        own = logits.gather(-1, target.unsqueeze(-1))  # [N, 1]
        lower = torch.arange(self.num_classes, device=logits.device) < target.unsqueeze(-1)
        before = ((logits > own) | ((logits == own) & lower)).sum(-1)  # [N, K] -> [N]
        self.top5 += (decided & (before < min(5, self.num_classes))).sum()
        pairs = target * (self.num_classes + 1) + predicted  # [N]
        pairs_seen = torch.bincount(pairs, minlength=self.confusion.numel())
        self.confusion += pairs_seen.view_as(self.confusion)

    def compute(self) -> dict[str, Tensor]:
        """The summed states; torchmetrics has added the ranks' before this runs."""
        return {name: getattr(self, name).clone() for name in STATES}

    def evaluate(self) -> Evaluated:
        """Add up the ranks and work out every figure."""
        sums: dict[str, Tensor] = self.compute()
        # Where no row counts nothing is measured: NaN, which wins no search.
        rows = int(sums["rows"]) or math.nan
        mass = float(sums["loss_mass"])
        counts = sums["confusion"]
        confusion = counts[:, :-1]
        _, confidence, right = sums["calibration"]
        scalars = {
            "loss": float(sums["loss_total"]) / mass if mass > 0 else math.nan,
            "nll": float(sums["nll_total"]) / rows,
            "acc": int(confusion.trace()) / rows,
            "balanced_acc": _balanced_accuracy(confusion, counts.sum(1)),
            "acc_top5": int(sums["top5"]) / rows,
            "ece": float((right - confidence).abs().sum()) / rows,
        }
        scalars |= self.extra.take()
        return Evaluated(scalars, int(sums["samples"]), confusion, sums["calibration"])


def _balanced_accuracy(confusion: Tensor, rows: Tensor) -> float:
    """Mean recall of the classes that occur, from counts [K, K] and rows [K]; NaN without one.

    >>> counts = torch.tensor([[8, 2, 0], [1, 1, 0], [0, 0, 0]])
    >>> _balanced_accuracy(counts, counts.sum(1))
    0.65
    """
    occurs = rows > 0
    recalls = confusion.diagonal()[occurs].double() / rows[occurs].double()
    return float(recalls.mean())
