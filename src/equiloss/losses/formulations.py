"""Cross-entropy written in three ways, which are one function of the logits.

With logits x [N, C], class weights w [C], smoothing ε and target distribution t (one-hot for
integer targets), each returns, in nats, one value per row:

    t'   = (1 - ε) t + ε / C
    loss = -sum_c w_c t'_c log p_c        p = softmax(x)

What differs is where the logarithm is taken, and with it the largest range of logits that
floating point survives. Source: Blanchard, Higham & Higham, "Accurately computing the
log-sum-exp and softmax functions", IMA J. Numer. Anal. 41(4), 2021.

>>> logits = torch.tensor([[-0.7514, 1.2616, -0.4232, 1.3868, 1.2298]])
>>> target = torch.tensor([3])
>>> for loss in (softmax_nll, log_softmax_nll, cross_entropy):
...     print(f"{loss(logits, target).item():.4f}")
1.1048
1.1048
1.1048
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equiloss.losses.options import require
from equiloss.losses.rows import scaled
from equiloss.losses.signature import describes

REFERENCE = (
    "Blanchard, Higham & Higham, 'Accurately computing the log-sum-exp and softmax functions', "
    "IMA J. Numer. Anal. 41(4), 2021"
)


def _largest_softmax_range(dtype: torch.dtype) -> float:
    """logsumexp(x) - min(x) beyond which softmax leaves the normal numbers of `dtype`."""
    return -math.log(torch.finfo(dtype).tiny)


@describes(soft_targets=True, max_logit_range=_largest_softmax_range, reference=REFERENCE)
def softmax_nll(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Softmax, then the logarithm, then the negative log-likelihood: as textbooks write it.

        loss = -sum_c w_c t'_c log(exp(x_c) / sum_j exp(x_j))

    Sound while logsumexp(x) - min(x) stays below -log(tiny): 87.3 in float32, 708 in float64.
    Beyond that softmax underflows and the gradient is not finite. Nothing is clamped, because a
    clamp would zero the gradient of exactly the worst samples: use `log_softmax_nll`.

    Args:
        logits: Unnormalised scores [N, C], float32 or float64.
        target: Classes [N] int64, or class probabilities [N, C].
        weight: Weight of each class [C].
        ignore_index: Integer target whose rows count as 0.
        label_smoothing: ε in [0, 1], the share of the target spread over all classes.

    Returns:
        Loss of each row [N], in nats.
    """
    log_p = torch.softmax(logits, dim=-1).log()  # [N, C]
    return _negative_log_likelihood(log_p, target, weight, ignore_index, label_smoothing)


@describes(soft_targets=True, reference=REFERENCE)
def log_softmax_nll(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Log-softmax, then the negative log-likelihood: the logarithm never sees a probability.

        loss = sum_c w_c t'_c (logsumexp(x) - x_c)

    Sound for every finite logit. Arguments and result are those of `softmax_nll`.
    """
    log_p = F.log_softmax(logits, dim=-1)  # [N, C]
    return _negative_log_likelihood(log_p, target, weight, ignore_index, label_smoothing)


def _has_no_z_loss(options: Mapping[str, Any]) -> bool:
    return bool(options["z_loss"] == 0)


@describes(
    soft_targets=True,
    shift_invariant=_has_no_z_loss,
    reference="z-loss: Chowdhery et al., 'PaLM: Scaling language modeling with pathways', "
    "JMLR 24(240), 2023",
)
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` without its reduction: one fused call on the logits.

        loss = sum_c w_c t'_c (logsumexp(x) - x_c) + z w_y logsumexp(x)²

    Sound for every finite logit. The second term, off by default, keeps the normaliser near 1
    and so the logits from drifting; with it the loss is not shift invariant. Soft targets put
    sum_c w_c t_c in the place of w_y.

    Args:
        logits: Unnormalised scores [N, C], float32 or float64.
        target: Classes [N] int64, or class probabilities [N, C].
        weight: Weight of each class [C].
        ignore_index: Integer target whose rows count as 0.
        label_smoothing: ε in [0, 1], the share of the target spread over all classes.
        z_loss: z, at least 0; PaLM used 1e-4.

    Returns:
        Loss of each row [N], in nats.

    Raises:
        LossError: for a z_loss below 0.
    """
    require(0 <= z_loss < math.inf, "loss.z_loss must be finite and at least 0", z_loss)
    losses = F.cross_entropy(
        logits,
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if z_loss == 0:
        return losses
    normaliser = z_loss * logits.logsumexp(-1).square()  # [N, C] -> [N]
    return losses + scaled(normaliser, target, weight, ignore_index)


def _negative_log_likelihood(
    log_p: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """-sum_c w_c t'_c log p_c for each row of log-probabilities [N, C] -> [N]."""
    if target.is_floating_point():
        smoothed = (1 - label_smoothing) * target + label_smoothing / log_p.shape[-1]
        return -(_weighted(log_p, weight) * smoothed).sum(-1)
    nll = F.nll_loss(log_p, target, weight, ignore_index=ignore_index, reduction="none")
    if label_smoothing == 0:
        # Not only to save time: 0 · inf would turn an infinite log into NaN.
        return nll
    uniform = -_weighted(log_p, weight).mean(-1).masked_fill(target == ignore_index, 0)
    return (1 - label_smoothing) * nll + label_smoothing * uniform


def _weighted(log_p: Tensor, weight: Tensor | None) -> Tensor:
    return log_p if weight is None else log_p * weight
