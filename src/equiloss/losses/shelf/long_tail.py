"""Losses for training sets in which some classes are rare: class counts enter the logits.

`class_counts` is filled from the training set. Predictions are taken from the logits as they
are; only the loss sees them adjusted.

>>> import torch
>>> logits, target = torch.zeros(2, 2), torch.tensor([0, 1])
>>> counts = torch.tensor([90, 10])
>>> [f"{loss:.4f}" for loss in balanced_softmax(logits, target, class_counts=counts).tolist()]
['0.1054', '2.3026']
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from equiloss.losses.options import require
from equiloss.losses.rows import class_of
from equiloss.losses.signature import describes


@describes(
    soft_targets=True,
    min_class_count=1,
    reference="Menon, Jayasumana, Rawat, Jain, Veit & Kumar, 'Long-tail learning via logit "
    "adjustment', ICLR 2021",
)
def logit_adjusted(
    logits: Tensor,
    target: Tensor,
    *,
    class_counts: Tensor,
    tau: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy on logits to which the logarithm of each class's share is added.

        loss = cross_entropy(x + τ log π)        π_c = n_c / sum_j n_j

    A rare class so needs a larger logit for the same loss, and the logits as they are favour none.
    τ = 0, or equal counts, is cross-entropy. Sound for every finite logit.

    Args:
        logits: Unnormalised scores [N, C], float32 or float64.
        target: Classes [N] int64, or class probabilities [N, C].
        class_counts: n, training rows of each class [C], at least 1.
        tau: τ, at least 0; 1 is the prior itself.
        weight: Weight of each class [C].
        ignore_index: Integer target whose rows count as 0.
        label_smoothing: ε in [0, 1], the share of the target spread over all classes.

    Returns:
        Loss of each row [N], in nats.

    Raises:
        LossError: for a τ below 0.
    """
    require(0 <= tau < math.inf, "loss.tau must be finite and at least 0", tau)
    counts = class_counts.to(logits.dtype)
    return F.cross_entropy(
        logits + tau * (counts / counts.sum()).log(),
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )


@describes(
    soft_targets=True,
    min_class_count=1,
    reference="Ren, Yu, Sheng, Ma, Zhao, Yi & Li, 'Balanced meta-softmax for long-tailed visual "
    "recognition', NeurIPS 2020",
)
def balanced_softmax(
    logits: Tensor,
    target: Tensor,
    *,
    class_counts: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy whose softmax counts each class as often as it occurs in training.

        loss = cross_entropy(x + log n),   that is p_c = n_c exp(x_c) / sum_j n_j exp(x_j)

    It is `logit_adjusted` with τ = 1; arguments, result and errors are those.
    """
    return logit_adjusted(
        logits,
        target,
        class_counts=class_counts,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


@describes(
    min_class_count=1,
    reference="Cao, Wei, Gaidon, Arechiga & Ma, 'Learning imbalanced datasets with "
    "label-distribution-aware margin loss', NeurIPS 2019",
)
def ldam(
    logits: Tensor,
    target: Tensor,
    *,
    class_counts: Tensor,
    max_m: float = 0.5,
    s: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy with a margin that the true class must keep, the wider the rarer it is.

        loss = cross_entropy(s (x - Δ_y e_y))        Δ_c = m (n_min / n_c)^¼

    Δ is largest, m, for the rarest class. m = 0 with s = 1 is cross-entropy. Sound for every
    finite logit.

    Args:
        logits: Unnormalised scores [N, C], float32 or float64.
        target: Classes [N] int64.
        class_counts: n, training rows of each class [C], at least 1.
        max_m: m, at least 0, in units of the logits.
        s: Factor of the logits, above 0. The authors' code has 30, for logits that are cosines
            and so lie in [-1, 1].
        weight: Weight of each class [C].
        ignore_index: Integer target whose rows count as 0.

    Returns:
        Loss of each row [N], in nats.

    Raises:
        LossError: for an option outside its range.
    """
    require(0 <= max_m < math.inf, "loss.max_m must be finite and at least 0", max_m)
    require(0 < s < math.inf, "loss.s must be finite and above 0", s)
    counts = class_counts.to(logits.dtype)
    margins = max_m * (counts.amin() / counts) ** 0.25  # [C]
    true = class_of(target, ignore_index).unsqueeze(-1)  # [N, 1]
    moved = s * logits.scatter_add(-1, true, -margins[true])
    return F.cross_entropy(
        moved, target, weight=weight, ignore_index=ignore_index, reduction="none"
    )
